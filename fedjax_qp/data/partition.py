"""Partitions: which training examples each client holds.

A partition is a function `(dataset, rng, *, options)` that returns one sorted int64 array of indices into the training
examples for each client. They are disjoint, none is empty, and unless an entry says otherwise they cover the data.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from jaxtyping import Array, Float, Int, Int32
from pydantic import Field

from fedjax_qp.data.client_tests import client_tests
from fedjax_qp.registry import ConfigurationError, Registry
from fedjax_qp.settings.strict import load_json, read_text
from fedjax_qp.settings.values import shown

partitions = Registry("partition", common=client_tests)
"""Partitions, by name."""

# When to give up drawing: after so many seconds, or where the first draws all leave so many clients with too little that
# none with enough for all is to be expected (were the clients independent, one draw in e^30 at most).
PATIENCE = 15.0
FIRST_DRAWS, HOPELESS = 20, 30


class Labels(Protocol):
    """Training examples, as far as a partition looks at them."""

    @property
    def labels(self) -> Int32[np.ndarray | Array, "N"]: ...


class Labelled(Protocol):
    """What a partition needs of a data set: `Dataset` and `Instructions` are such."""

    @property
    def train(self) -> Labels: ...
    @property
    def classes(self) -> int: ...
    @property
    def client_ids(self) -> Int[np.ndarray, "N"] | None: ...


@partitions.register
def iid(dataset: Labelled, rng: np.random.Generator, *, clients: int = 100) -> list[Int[np.ndarray, "n"]]:
    """Deals the shuffled examples evenly; sizes differ by one at most.

    Source: McMahan et al., "Communication-efficient learning of deep networks from
    decentralized data", 2017, section 3.
    """
    examples = len(dataset.train.labels)
    _check_clients(clients, examples)
    parts = [np.sort(part) for part in np.array_split(rng.permutation(examples), clients)]
    return check_partition(parts, dataset, complete=True)


@partitions.register
def dirichlet(
    dataset: Labelled,
    rng: np.random.Generator,
    *,
    clients: int = 100,
    beta: float = 0.5,
    minimum: int = 10,
    attempts: Annotated[int, Field(ge=1, le=10_000)] = 1000,
) -> list[Int[np.ndarray, "n"]]:
    """Draws each class's shares from a Dirichlet distribution: the smaller beta, the fewer classes a client has.

    Source: FedMut (AAAI 2024), data settings; the idea of Dirichlet label shares is from Hsu, Qi and Brown, "Measuring
    the effects of non-identical data distribution for federated visual classification", arXiv 1909.06335, 2019.
    Class after class, a client that already holds its even share (N / K examples) gets none of the class. The whole
    draw is repeated until the smallest client has `minimum` examples.

    Args:
      clients: K.
      beta: concentration, above 0; 0.1 is very uneven, 100 nearly IID.
      minimum: examples that every client must have.
      attempts: draws before giving up; there are fewer where they take more than 15 seconds, or where the first 20 show
        that all will fail.

    Raises:
      ConfigurationError: no draw satisfied `minimum`, or an option is out of range.
    """
    labels = np.asarray(dataset.train.labels)
    _check_clients(clients, len(labels))
    _require(beta > 0, f"beta = {beta} must be above 0, such as 0.1 or 0.5.")
    _require(attempts >= 1, f"attempts = {attempts} must be at least 1.")
    _require(
        1 <= minimum <= len(labels) // clients,
        f"minimum = {minimum} must be between 1 and {len(labels) // clients}, the even share of {clients} clients of "
        f"{len(labels)} examples. Lower it, or take fewer clients.",
    )
    sizes = np.bincount(labels, minlength=dataset.classes)
    fewest, tried, end = clients, 0, time.monotonic() + PATIENCE
    while tried < attempts and time.monotonic() < end and not (tried == FIRST_DRAWS and fewest >= HOPELESS):
        counts = _draw_counts(sizes, rng, clients, beta)
        lacking = int((counts.sum(axis=0) < minimum).sum())
        if not lacking:
            return check_partition(_deal(labels, counts, rng), dataset, complete=True)
        fewest, tried = min(fewest, lacking), tried + 1
    raise ConfigurationError(
        f"partition 'dirichlet': {attempts} draws of beta = {beta} over {clients} clients and {len(labels)} examples do not "
        f"suffice: in each of the {tried} that were made, at least {fewest} of the clients had fewer examples than "
        f"minimum = {minimum}. Lower minimum or clients, or raise beta."
    )


def _draw_counts(
    sizes: Int[np.ndarray, "C"], rng: np.random.Generator, clients: int, beta: float
) -> Int[np.ndarray, "C K"]:
    """One draw, as numbers of examples by class and client; indices are dealt only for the draw that is kept."""
    shares: Float[np.ndarray, "C K"] = rng.dirichlet(np.full(clients, beta), size=len(sizes))
    counts = np.zeros(shares.shape, np.int64)
    held = np.zeros(clients, np.int64)
    for label in np.flatnonzero(sizes):
        share = np.where(held < sizes.sum() / clients, shares[label], 0.0)
        # Where all the share fell on clients that are full, nobody is left to take the class: such a draw is void.
        cumulative = np.cumsum(share)
        if not cumulative[-1] > 0:
            return np.zeros_like(counts)
        cuts = (cumulative[:-1] / cumulative[-1] * sizes[label]).astype(np.int64)
        counts[label] = np.diff(cuts, prepend=0, append=sizes[label])
        held += counts[label]
    return counts


def _deal(
    labels: Int[np.ndarray, "N"], counts: Int[np.ndarray, "C K"], rng: np.random.Generator
) -> list[Int[np.ndarray, "n"]]:
    """Gives each client its number of random examples of each class."""
    owner = np.empty(len(labels), np.int64)
    for label, row in enumerate(counts):
        members = rng.permutation(np.flatnonzero(labels == label))
        owner[members] = np.repeat(np.arange(len(row)), row)
    return _group(owner, counts.shape[1])


@partitions.register
def shards(
    dataset: Labelled, rng: np.random.Generator, *, clients: int = 100, shards_per_client: int = 2
) -> list[Int[np.ndarray, "n"]]:
    """Sorts by label, cuts into equal shards and deals them: most clients see about `shards_per_client` classes.

    Source: McMahan et al., "Communication-efficient learning of deep networks from
    decentralized data", 2017, section 3.
    A shard spans two classes where a class boundary falls inside it.
    """
    labels = np.asarray(dataset.train.labels)
    _check_clients(clients, len(labels))
    total = clients * shards_per_client
    _require(
        shards_per_client >= 1 and total <= len(labels),
        f"shards_per_client = {shards_per_client} must be between 1 and {len(labels) // clients} for {clients} clients "
        f"of {len(labels)} examples.",
    )
    pieces = np.array_split(np.argsort(labels, kind="stable"), total)
    hands = rng.permutation(total).reshape(clients, shards_per_client)
    parts = [np.sort(np.concatenate([pieces[piece] for piece in hand])) for hand in hands]
    return check_partition(parts, dataset, complete=True)


@partitions.register
def categories(
    dataset: Labelled, rng: np.random.Generator, *, clients: int = 10, categories_per_client: int = 2
) -> list[Int[np.ndarray, "n"]]:
    """Gives each client a few whole categories (classes), each shared evenly among the clients that have it.

    Source: the pathological split of McMahan et al., "Communication-efficient learning of deep networks from
    decentralized data", 2017, section 3, by whole categories in place of shards: no client has a part of a class more
    than `categories_per_client`. The assignment is random and as even as it can be: the numbers of owners of two
    categories differ by one at most. With clients · categories_per_client below the number of categories, some have no
    owner, and their examples are left out.

    Args:
      clients: K.
      categories_per_client: 1 … the number of classes that have examples.

    Raises:
      ConfigurationError: an option is out of range, or a category has fewer examples than owners.
    """
    labels = np.asarray(dataset.train.labels)
    _check_clients(clients, len(labels))
    present, sizes = np.unique(labels, return_counts=True)
    _require(
        1 <= categories_per_client <= len(present),
        f"categories_per_client = {categories_per_client} must be between 1 and {len(present)}, the number of "
        "categories that have training examples.",
    )
    held, owned = np.zeros((clients, len(present)), bool), np.zeros(len(present), np.int64)
    for client in held:
        # The least owned first, ties at random: no category is ever two owners ahead of another.
        client[np.lexsort((rng.random(len(present)), owned))[:categories_per_client]] = True
        owned += client
    owner = np.full(len(labels), -1)
    for category, size, column in zip(present, sizes, held.T, strict=True):
        owners = rng.permutation(np.flatnonzero(column))
        _require(
            len(owners) <= size,
            f"category {category} has {size} examples for {len(owners)} clients. Take fewer clients (not {clients}) or "
            f"fewer categories_per_client (not {categories_per_client}).",
        )
        if len(owners):
            members = rng.permutation(np.flatnonzero(labels == category))
            owner[members] = owners[np.arange(size) % len(owners)]
    parts = _group(owner + 1, clients + 1)[1:]  # the first group, of -1, has no owner
    return check_partition(parts, dataset, complete=bool(held.any(axis=0).all()))


@partitions.register
def natural(dataset: Labelled, rng: np.random.Generator, *, minimum: int = 1) -> list[Int[np.ndarray, "n"]]:
    """One client for each person or device the data came from, in the order of their ids; draws nothing.

    Source: Caldas et al., "LEAF: a benchmark for federated settings", arXiv 1812.01097, 2018.

    Args:
      minimum: clients with fewer examples are left out, with their examples (as LEAF does); 1 keeps all.
    """
    if dataset.client_ids is None:
        raise ConfigurationError(
            "partition 'natural' needs a data source that knows its clients, such as 'arrays' with client_ids; this "
            "one does not. Take 'dirichlet', 'iid' or 'shards' instead."
        )
    _require(minimum >= 1, f"minimum = {minimum} must be at least 1.")
    _, owner = np.unique(dataset.client_ids, return_inverse=True)
    parts = _group(owner, owner.max() + 1)
    kept = [part for part in parts if len(part) >= minimum]
    largest = max(len(part) for part in parts)
    _require(
        bool(kept), f"minimum = {minimum} leaves out all {len(parts)} clients; the largest has {largest} examples."
    )
    return check_partition(kept, dataset, complete=minimum == 1)


@partitions.register
def json_file(
    dataset: Labelled, rng: np.random.Generator, *, path: str, complete: bool = True
) -> list[Int[np.ndarray, "n"]]:
    """Reads a published split, in the JSON format of FedMut's repository; draws nothing.

    Source: FedMut (AAAI 2024), the authors' repository: `train_data` maps client numbers to lists of indices into the
    training examples in the order of the original files; `num_users`, where present, is the number of clients.

    Args:
      path: the JSON file.
      complete: whether the split must use every training example.
    """
    file = Path(os.path.expanduser(path))
    content = load_json(read_text(file), f"partition 'json_file': {file}")
    lists = content.get("train_data") if isinstance(content, dict) else None
    if not isinstance(lists, dict) or not lists or not all(key.isdecimal() for key in lists):
        raise ConfigurationError(f"{file} needs an entry `train_data` that maps client numbers to lists of indices.")
    stated = content.get("num_users", len(lists))
    numbers = [str(number) for number in range(len(lists))]
    if type(stated) is not int or stated != len(lists) or lists.keys() != set(numbers):
        raise ConfigurationError(
            f"{file} states {shown(stated)} clients but lists {len(lists)}; clients must be numbered from 0 without a "
            "gap."
        )
    try:
        parts = [_indices(lists[number], number, len(dataset.train.labels)) for number in numbers]
        return check_partition(parts, dataset, complete=complete)
    except ConfigurationError as error:
        remedy = "" if complete is False else " (a split that leaves examples out on purpose: complete = false)"
        raise ConfigurationError(f"a split file that does not fit the data: {file}: {error}{remedy}") from None


def _indices(values: object, client: str, examples: int) -> Int[np.ndarray, "n"]:
    """Python's whole numbers as an array; one that does not fit into 64 bits is outside the data too."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ConfigurationError(f"partition: client {client} must be a list of whole numbers.")
    for value in (min(values, default=0), max(values, default=0)):
        _check_index(client, value, examples)
    return np.sort(np.array(values, np.int64))


def check_partition(
    parts: list[Int[np.ndarray, "n"]], dataset: Labelled, *, complete: bool = False
) -> list[Int[np.ndarray, "n"]]:
    """Returns `parts` after checking them.

    Args:
      parts: sorted indices into the training examples, one array a client.
      complete: whether every training example must belong to a client.

    Raises:
      ConfigurationError: a client is empty, an index is no whole number, outside the data or used twice, or an example is
        left over.
    """
    examples = len(dataset.train.labels)
    _require(len(parts) > 0, "there are no clients; at least one is needed.")
    for client, part in enumerate(parts):
        _require(
            isinstance(part, np.ndarray) and part.ndim == 1,
            f"client {client} is given as {type(part).__name__}; it must be an array of indices.",
        )
        _require(len(part) > 0, f"client {client} has no examples; every client needs one. Take fewer clients.")
        _require(
            part.dtype.kind in "iu",
            f"client {client} has indices of the type {part.dtype}; they must be whole numbers.",
        )
        for index in (int(part.min()), int(part.max())):
            _check_index(client, index, examples)
    uses = np.bincount(np.concatenate(parts), minlength=examples)
    _require(uses.max() <= 1, f"the training example {uses.argmax()} is used {uses.max()} times; once at most.")
    unused = int((uses == 0).sum())
    _require(
        not (complete and unused),
        f"{unused} of {examples} training examples belong to no client, the first is {uses.argmin()}.",
    )
    return parts


def hold_out(
    parts: list[Int[np.ndarray, "n"]],
    generator: np.random.Generator,
    *,
    test: int | Sequence[int],
    train: int | None = None,
) -> tuple[list[Int[np.ndarray, "m"]], list[Int[np.ndarray, "t"]]]:
    """Sets examples of each client aside for testing, and limits what is left to train on.

    Every client has a stream of random numbers of its own, so its draw depends on the generator's seed, its number and
    its size alone. `train` does not change which examples are for testing, and a larger one keeps those of a smaller.

    Args:
      parts: indices into the training examples, one array a client.
      generator: `spawn` is called on it once.
      test: examples of each client to test on, one number for all or one each.
      train: examples of each client to train on at most; None keeps all.

    Returns:
      The clients' examples to train on (at least one each) and to test on (`test` each), both sorted.

    Raises:
      ConfigurationError: an option is out of range, or a client has no more than `test` examples.
    """
    tests = [int(number) for number in np.broadcast_to(test, len(parts))]
    _require(min(tests) >= 0, f"test = {min(tests)} must be at least 0.")
    _require(train is None or train >= 1, f"train = {train} must be at least 1, or null for all that is left.")
    kept, held_out = [], []
    streams = generator.spawn(len(parts))
    for client, (part, stream, test) in enumerate(zip(parts, streams, tests, strict=True)):
        _require(
            len(part) > test,
            f"client {client} has {len(part)} examples, too few to hold out test = {test} of them and to train on at "
            f"least one. Lower test (the smallest client has {min(map(len, parts))}), or take fewer clients or a more "
            "even partition.",
        )
        shuffled = stream.permutation(part)
        held_out.append(np.sort(shuffled[:test]))
        kept.append(np.sort(shuffled[test:][:train]))
    return kept, held_out


def _group(owner: Int[np.ndarray, "N"], clients: int) -> list[Int[np.ndarray, "n"]]:
    """Returns the sorted indices of each owner."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _check_index(client: int | str, index: int, examples: int) -> None:
    if not 0 <= index < examples:
        raise ConfigurationError(
            f"partition: client {client} has the index {shown(index)}, but the training set has size {examples} "
            f"(0 … {examples - 1})."
        )


def _check_clients(clients: int, examples: int) -> None:
    _require(
        1 <= clients <= examples,
        f"clients = {clients} must be between 1 and {examples}, the number of training examples.",
    )


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ConfigurationError(f"partition: {message}")
