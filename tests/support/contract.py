"""One compiled engine per case of the contract, and how other arrangements are compared with it."""

from functools import cache, partial

import jax

from fedjax_qp.contract import Candidate
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.contract.laws import TOLERANCE
from fedjax_qp.federated import FederatedState
from support.federations import CASES, federation_of, small_algorithm


@cache
def candidate(case: str) -> Candidate:
    """One algorithm and one engine a case, so that each compiles once for all tests that need 3 lanes."""
    return Candidate(small_algorithm(case), federation_of(case), partial(assert_agree, case))


def compiled(case: str) -> tuple:
    return candidate(case).algorithm, candidate(case).engine


def reference(case: str) -> tuple[FederatedState, dict]:
    return candidate(case).reference


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
