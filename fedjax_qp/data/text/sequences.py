"""Records as token sequences of one length: encoding, packing, and where the loss is counted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from fedjax_qp.config import Text
from fedjax_qp.data.text.instructions import Record
from fedjax_qp.data.text.templates import Tokenizer, tokenise
from fedjax_qp.registry import ConfigurationError


class Sequences(NamedTuple):
    """Records in sequences of T tokens, on the host (numpy) or on the device (JAX). Padding holds token 0."""

    tokens: Int32[np.ndarray | Array, "N T"]
    segments: Int32[np.ndarray | Array, "N T"]  # 0 = padding, then 1, 2, … the records of this sequence
    positions: Int32[np.ndarray | Array, "N T"]  # inside the record, from 0; 0 in the padding
    targets: Bool[np.ndarray | Array, "N T"]  # counts in the loss: predicted from the token before it, same segment


class Encoded(NamedTuple):
    """Records as tokens, the longest no longer than the cut-off, and what the cut-off cost."""

    tokens: list[Int32[np.ndarray, "n"]]
    targets: list[Bool[np.ndarray, "n"]]  # False at position 0, which nothing predicts
    kept: Int[np.ndarray, "R"]  # index of each among the records given
    cut: int  # kept, but without their end
    dropped: int  # left out: nothing to predict within the cut-off, or too long with `longer = drop`


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    formatting: Text,
    *,
    owner: str = "the data",
    vocabulary: int | None = None,
) -> Encoded:
    """Tokenises records, marks the tokens to predict, and applies the cut-off.

    A record that is cut loses its end-of-text token too, so that nobody learns to stop in the middle. A record without
    any token to predict before the cut-off (its prompt alone is too long) is dropped and counted.

    Args:
      records: one client's records, or the test records; none give none.
      tokenizer: of the model that is trained.
      formatting: template, cut-off and what counts in the loss.
      owner: whose records they are, for the message.
      vocabulary: rows of the model's embedding; None where there is no model.

    Raises:
      ConfigurationError: nothing is left of the records, or the model has no row for a token.
    """
    tokens, targets, kept, cut = [], [], [], 0
    shortest = 0  # cut-off that would have kept at least one record
    tokenised = tokenise(records, tokenizer, formatting.template, vocabulary=vocabulary)
    for index, (prompt, response) in enumerate(tokenised):
        ids = np.array([*prompt, *response], np.int32)
        # Counted from 1 at least: the first token of a record has no token before it.
        first = max(1, len(prompt) if formatting.train_on == "response" else 0)
        needed = len(ids) if formatting.longer == "drop" else first + 1
        shortest = min(shortest or needed, needed)
        if len(ids) <= first or formatting.cut_off < needed:
            continue
        cut += len(ids) > formatting.cut_off
        tokens.append(ids[: formatting.cut_off])
        targets.append(np.arange(len(tokens[-1])) >= first)
        kept.append(index)
    if len(records) and not kept:
        shorter = "" if formatting.template == "short" else ", or take template = 'short'"
        raise ConfigurationError(
            f"cut_off = {formatting.cut_off} leaves nothing to train on of {owner}: all {len(records)} records are "
            f"dropped, since with template = {formatting.template!r} and longer = {formatting.longer!r} the shortest "
            f"needs {shortest} tokens. Raise cut_off to at least {shortest}{shorter}."
        )
    return Encoded(tokens, targets, np.array(kept, np.int64), cut, len(records) - len(kept))


def pack(encoded: Encoded, length: int, enabled: bool = True) -> Sequences:
    """Lays records into sequences of T tokens, without splitting any.

    Best-fit decreasing: the longest record first, each into the fullest sequence that still takes it. Both the records
    of a sequence and the sequences (by their first record) then stand in the order given, so that the result does not
    sort the data by length. Draws nothing.

    Source: Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM Journal
    on Computing, 1974 (at most 11/9 of the fewest possible sequences, plus a constant).

    Args:
      encoded: one client's records.
      length: T.
      enabled: whether records share sequences; False gives each its own.

    Raises:
      ConfigurationError: a record is longer than T.
    """
    sizes = np.array([len(ids) for ids in encoded.tokens], np.int64)
    if len(sizes) and sizes.max() > length:
        raise ConfigurationError(
            f"sequences of {length} tokens are too short for a record of {sizes.max()} tokens: take the cut_off, or more."
        )
    groups = _best_fit(sizes, length) if enabled else [[record] for record in range(len(sizes))]
    shape = (len(groups), length)
    sequences = Sequences(*(np.zeros(shape, np.int32) for _ in range(3)), targets=np.zeros(shape, bool))
    if not groups:
        return sequences
    # Every token's place in the flattened arrays, in the order of `order`.
    order = np.concatenate(groups)
    packed_sizes = sizes[order]
    members = [len(group) for group in groups]
    row = np.repeat(np.arange(len(groups)), members)
    first_of_row = np.repeat(np.cumsum([0, *members[:-1]]), members)
    begins = np.cumsum(packed_sizes) - packed_sizes
    start = row * length + begins - begins[first_of_row]
    position = np.arange(packed_sizes.sum()) - np.repeat(begins, packed_sizes)
    place = np.repeat(start, packed_sizes) + position
    sequences.tokens.reshape(-1)[place] = np.concatenate([encoded.tokens[record] for record in order])
    sequences.segments.reshape(-1)[place] = np.repeat(np.arange(len(order)) - first_of_row + 1, packed_sizes)
    sequences.positions.reshape(-1)[place] = position
    sequences.targets.reshape(-1)[place] = np.concatenate([encoded.targets[record] for record in order])
    return sequences


def _best_fit(sizes: Int[np.ndarray, "R"], length: int) -> list[list[int]]:
    """Returns the records of each sequence; both levels in the order of the records."""
    groups: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # the sequences that have so many tokens left
    rooms = 0  # bit r is set where by_room[r] is not empty: the next larger one is found without a search
    for record in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[record])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            group = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, group = length, len(groups)
            groups.append([])
        groups[group].append(record)
        by_room[room - size].append(group)
        rooms |= 1 << (room - size)
    return sorted(sorted(group) for group in groups)


def padding_share(sequences: Sequences) -> float:
    """The share of the tokens that are padding; 0 where there are no sequences."""
    return float((np.asarray(sequences.segments) == 0).mean()) if sequences.segments.size else 0.0
