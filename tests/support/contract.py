"""One compiled engine per case of the contract, and what other arrangements are compared with."""

from functools import cache

import jax

from fedjax_qp.federated import FederatedState
from support.federations import (
    CASES,
    federation_of,
    run_rounds,
    small_algorithm,
    small_engine,
    worst_difference,
)

TOLERANCE = 1e-5  # relative, after at most five local steps a round


@cache
def compiled(case: str) -> tuple:
    """One algorithm and one engine a case, so that each compiles once for all tests that need 3 lanes."""
    algorithm = small_algorithm(case)
    return algorithm, small_engine(algorithm, federation=federation_of(case))


@cache
def reference(case: str) -> tuple[FederatedState, dict]:
    return run_rounds(*compiled(case), lanes=3, federation=federation_of(case))


def assert_agree(case: str, expected: FederatedState, state: FederatedState) -> None:
    """For a method that searches, the last bit may decide which entry is the last to be kept: its masks must overlap."""
    if CASES[case].name == "perfit" and CASES[case].options.get("search") != "random":
        assert mask_overlap(expected.clients.masks, state.clients.masks) >= 0.98
    else:
        assert worst_difference(expected, state) <= TOLERANCE


def mask_overlap(first, second) -> float:
    """Share of the entries of both that are in both."""
    pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    return sum((a & b).sum() for a, b in pairs) / sum((a | b).sum() for a, b in pairs)
