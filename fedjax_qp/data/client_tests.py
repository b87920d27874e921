"""Tests of each client's own, for models that are made for single clients."""

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from fedjax_qp.registry import ConfigurationError

Kind = Literal["common", "matched", "own"]


def client_tests(*, test: Kind = "common", test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2) -> None:
    """Options of every partition: what the clients' own models are tested on, beside the common test set.

    Args:
      test: "common", nothing else; "matched", a part of the common test set that has the client's labels, see `match`; "own",
        some of the client's training examples, which it is then not trained on.
      test_share: of a client's examples that "own" holds out, at least one.
    """


def match(
    counts: Int[np.ndarray, "K C"], labels: Int[np.ndarray, "T"], generator: np.random.Generator
) -> list[Int[np.ndarray, "t"]]:
    """Deals test examples out so that each client gets the labels it trains on, and the more of them the more it has.

    Source: the train and test split of each client's data in PFLlib, Zhang et al., "PFLlib: A Beginner-Friendly and
    Comprehensive Personalized Federated Learning Library and Benchmark", 2025; there all examples are dealt to the clients
    first, and then split.

    The test examples of a class are divided among the clients that train on it in proportion to their training examples of
    it. Everybody gets the whole part of its share; those that are left over go, one each, to the clients whose share had a
    fraction and who are furthest behind over the classes so far (the first of equals). So nobody's number is off by one or
    more in any class, and small clients are not left without.

    Args:
      counts: training examples of each client and class.
      labels: of the test examples.
      generator: decides which examples of a class a client gets.

    Returns:
      Per client, sorted indices of test examples. They are disjoint; examples of classes that no client has are in none.
    """
    owner, behind = np.full(len(labels), -1), np.zeros(len(counts))
    for label, held in enumerate(counts.T):
        members = generator.permutation(np.flatnonzero(labels == label))
        if not held.sum():
            continue
        numbers, rest = np.divmod(len(members) * held, held.sum())
        behind += rest / held.sum()
        left = len(members) - numbers.sum()
        order = np.lexsort((-np.round(behind, 9), rest == 0))  # those with a fraction first, then by how far behind
        numbers[order[:left]] += 1
        behind[order[:left]] -= 1
        owner[members] = np.repeat(np.arange(len(counts)), numbers)
    return [np.flatnonzero(owner == client) for client in range(len(counts))]


def own_counts(parts: list[Int[np.ndarray, "n"]], share: float) -> list[int]:
    """How many of its examples each client is tested on: a share of them, at least one, and not all.

    Raises:
      ConfigurationError: a client has a single example.
    """
    for client, part in enumerate(parts):
        if len(part) < 2:
            raise ConfigurationError(
                f"partition.test = 'own' needs two examples of every client, one to test on and one to train on, and client "
                f"{client} has {len(part)}: choose partition.test = matched, or a partition of larger clients."
            )
    return [min(max(round(share * len(part)), 1), len(part) - 1) for part in parts]
