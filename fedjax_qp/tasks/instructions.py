"""Instruction tuning of a pre-trained language model with adapters.

Each client's records are split into a training and a test part, turned into tokens and packed by client, so that a sequence
never mixes clients. Every client is judged on its own test part, and all of them on the common test records.
"""

from collections.abc import Iterable

import jax
import numpy as np

from fedjax_qp.config import Config, Text
from fedjax_qp.data import label_counts
from fedjax_qp.data.partition import hold_out
from fedjax_qp.data.text.instructions import Instructions, Record
from fedjax_qp.data.text.sequences import Encoded, Sequences, encode, pack, padding_share
from fedjax_qp.engine import cut_client_tests, cut_test_set
from fedjax_qp.models import models
from fedjax_qp.models.language.adapted import AdaptedModel
from fedjax_qp.models.language.llama import check_length, split_axes
from fedjax_qp.precision import in_precision
from fedjax_qp.streams import Stream, generator
from fedjax_qp.tasks.task import Task


def instruction_task(config: Config, data: Instructions, parts: list[np.ndarray], *, rank_factor: int = 1) -> Task:
    """The task of answering instructions.

    Args:
      parts: per client, indices of its records. Those that the cut-off leaves nothing to predict of are left out first, so
        that `text.test_records` and `text.train_records` count records that are really used.
      rank_factor: factor on the adapters' rank and alpha that the algorithm asks for.

    Raises:
      ConfigurationError: a client has too few records, or nothing of them fits the cut-off.
    """
    text = config.text
    language = models[config.model.name](rank_factor, **config.model.options)
    records = data.train.records

    def encoded(owner: str, some: Iterable[Record]) -> Encoded:
        vocabulary = language.config.vocabulary
        return encode(list(some), language.tokenizer, text, owner=owner, vocabulary=vocabulary)

    clients = [encoded(f"client {client}", (records[i] for i in part)) for client, part in enumerate(parts)]
    usable = [np.arange(len(client.tokens)) for client in clients]
    chosen = hold_out(usable, generator(config.seed, Stream.HELD_OUT), test=text.test_records, train=text.train_records)
    trains, tests = ([_some(client, part) for client, part in zip(clients, kind, strict=True)] for kind in chosen)
    common = encoded("the common test records", data.test.records) if data.test.records else _together(tests)
    longest = max(len(tokens) for of in (*clients, common) for tokens in of.tokens)
    length = min(text.cut_off, max(longest, language.config.maximum_positions))
    check_length(language.config, length)
    train = [pack(client, length, text.pack) for client in trains]
    kept = [part[client.kept[some]] for part, client, some in zip(parts, clients, chosen[0], strict=True)]
    ends = np.cumsum([len(sequences.tokens) for sequences in train])
    return Task(
        model=language.model._replace(evaluate=in_precision(language.model.evaluate, config.precision)),
        frozen=language.frozen,
        frozen_axes=split_axes(language.config, config.engine.model_devices),
        train=_joined(train),
        test=cut_test_set(pack(common, length, text.pack), config.evaluation.batch_size),
        personal=cut_client_tests(
            [pack(client, length, text.pack) for client in tests],
            config.evaluation.batch_size,
            remedy=f"lower text.test_records = {text.test_records} or text.cut_off = {text.cut_off}, or choose fewer clients",
        ),
        parts=[np.arange(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)],
        sizes=[len(client.tokens) for client in trains],
        counts=label_counts(kept, np.asarray(data.train.labels), data.classes),
        class_names=data.class_names,
        shares=None,
        language=language,
        notes=(
            *_notes(text, _joined(train), clients, trains),
            *_beyond(text, language.config.maximum_positions, longest),
            _cost(language, length, len(_joined(train).tokens) / len(parts)),
        ),
    )


def _some(encoded: Encoded, chosen: np.ndarray) -> Encoded:
    """Some of a client's records; how many were cut is no longer known."""
    tokens, targets = ([of[index] for index in chosen] for of in (encoded.tokens, encoded.targets))
    return Encoded(tokens, targets, encoded.kept[chosen], cut=0, dropped=0)


def _together(tests: list[Encoded]) -> Encoded:
    """The clients' test parts as common test records."""
    tokens, targets = ([item for test in tests for item in getattr(test, name)] for name in ("tokens", "targets"))
    return Encoded(tokens, targets, np.concatenate([test.kept for test in tests]), cut=0, dropped=0)


def _joined(all_sequences: list[Sequences]) -> Sequences:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *all_sequences)


def _beyond(text: Text, positions: int, longest: int) -> list[str]:
    """What a cut-off beyond the model's positions does."""
    if text.cut_off <= positions:
        return []
    known = f"text.cut_off = {text.cut_off} is beyond the model's {positions} positions"
    if longest <= positions:
        return [f"{known}: no record is longer than they are, so sequences have {positions} tokens"]
    return [f"{known}, and so are records (of up to {longest} tokens), which it was not trained for: set {positions}"]


def _cost(language: AdaptedModel, length: int, sequences: float) -> str:
    each = language.training_flops(length)
    epoch = each * length * sequences
    return (
        f"{each / 1e9:.3g} GFLOP a training token, {epoch / 1e12:.3g} TFLOP a client's epoch (mean, padding included; "
        "a forward pass alone is about half)"
    )


def _notes(text: Text, train: Sequences, clients: list[Encoded], trains: list[Encoded]) -> list[str]:
    """What the cut-off did to the clients' records, and how much of the training sequences is padding."""
    tokens, targets = int((train.segments > 0).sum()), int(train.targets.sum())
    records, length = sum(len(client.tokens) for client in trains), train.tokens.shape[1]
    padding = f"{padding_share(train):.1%} padding"
    if text.pack:
        padding += f" ({1 - tokens / (records * length):.1%} if no records shared a sequence)"
    notes = [
        f"{records} training records in {len(train.tokens)} sequences of {length} tokens: {tokens} tokens, "
        f"{targets} of them to predict, {padding}"
    ]
    cut, dropped = sum(client.cut for client in clients), sum(client.dropped for client in clients)
    if cut or dropped:
        total = sum(len(client.tokens) for client in clients) + dropped
        notes.append(
            f"text.cut_off = {text.cut_off}: of the clients' {total} records {cut} are cut, {dropped} left out"
        )
    return notes
