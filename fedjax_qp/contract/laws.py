"""The laws of methods, see CONTRIBUTING: the result depends on nothing but configuration and seed.

Each law is a function of a `Candidate` that raises an AssertionError with a reason where the method breaks it.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fedjax_qp.contract.federations import (
    COHORT,
    ROUNDS,
    Federation,
    play,
    run_rounds,
    small_engine,
    small_plan,
    small_state,
    small_work,
    worst_difference,
)
from fedjax_qp.engine import Engine
from fedjax_qp.engine.plan import IDLE, Lanes, Plan
from fedjax_qp.federated import Algorithm, FederatedState, init_state

TOLERANCE = 1e-5  # relative, after at most five local steps a round
LANES = 3


class Candidate:
    """A method on a small federation, with one compiled engine and one result that all laws share."""

    def __init__(
        self,
        algorithm: Algorithm,
        federation: Federation,
        agree: Callable[[FederatedState, FederatedState], None] | None = None,
    ):
        """Args:
        agree: raises an AssertionError unless two states are the same up to rounding; default by the largest difference.
        """
        self.algorithm, self.federation = algorithm, federation
        self.agree = agree or _agree

    @cached_property
    def engine(self) -> Engine:
        """With any number of lanes, on one device."""
        return small_engine(self.algorithm, federation=self.federation)

    @cached_property
    def reference(self) -> tuple[FederatedState, dict]:
        """The state after `ROUNDS` rounds on three lanes, and the metrics of these rounds."""
        return self.run()

    def run(self, rounds: int = ROUNDS, state: FederatedState | None = None) -> tuple[FederatedState, dict]:
        """Rounds on three lanes, from the start or from a state."""
        return run_rounds(self.algorithm, self.engine, LANES, rounds, state, self.federation)

    def start(self) -> FederatedState:
        """The state before round 0."""
        return small_state(self.algorithm, federation=self.federation)

    def plan(self, first_round: int, rounds: int) -> Plan:
        """On three lanes, with what the method asks to prepare."""
        work = small_work(self.federation, self.algorithm)
        return small_plan(first_round, rounds, lanes=LANES, work=work)


def structure(candidate: Candidate) -> None:
    """Every function returns the structure, shapes and types that it was given."""
    before = candidate.start()
    after, _ = jax.eval_shape(candidate.engine.run, before, candidate.engine.place_plan(candidate.plan(0, ROUNDS)))
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    assert old == new, f"the state has another structure after a round: {new} in place of {old}"
    for path, (a, b) in _paired(before, after):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{path} was {_type(a)} and is {_type(b)} after a round"


def interface(candidate: Candidate) -> None:
    """The engine gives what a plain loop over the clients of a round gives."""
    played = play(candidate.algorithm, candidate.federation)
    state, metrics = candidate.reference
    memories = jax.tree.map(lambda *leaves: np.stack(leaves), *played.memories)
    candidate.agree(state, FederatedState(jax.numpy.int32(ROUNDS), played.server, memories))
    clients = candidate.plan(0, ROUNDS).cohorts.clients
    for number, reports in enumerate(played.metrics):
        losses = [float(reports[int(client)]["client/loss"]) for client in clients[number]]
        np.testing.assert_allclose(metrics["client/loss"][number], losses, rtol=TOLERANCE)


def layout(candidate: Candidate, parallel: str = "vmap", devices: int = 1, lanes: int = 1) -> None:
    """Another number of lanes or devices gives the same result, up to the rounding of floats."""
    one_device = (parallel, devices) == ("vmap", 1)
    engine = (
        candidate.engine if one_device else small_engine(candidate.algorithm, parallel, devices, candidate.federation)
    )
    state, metrics = run_rounds(candidate.algorithm, engine, lanes, federation=candidate.federation)
    expected_state, expected = candidate.reference
    for name in expected:
        if name.endswith("/loss"):
            assert worst_difference(expected[name], metrics[name]) <= TOLERANCE, f"{name} depends on the layout"
    np.testing.assert_array_equal(expected["test/count"], metrics["test/count"])
    assert int(state.round) == ROUNDS
    candidate.agree(expected_state, state)


def all_lanes(candidate: Candidate) -> None:
    """As `layout`, with a lane for each client of the cohort."""
    layout(candidate, lanes=COHORT)


def padding(candidate: Candidate) -> None:
    """Padded examples change nothing: three more columns of them in every batch."""
    plan = candidate.plan(0, ROUNDS)
    padded = np.pad(plan.lanes.examples, [(0, 0)] * 3 + [(0, 3)], constant_values=IDLE)
    engine = small_engine(candidate.algorithm, federation=candidate.federation)
    state, _ = engine.run(
        engine.place_states([candidate.start()]),
        engine.place_plan(plan._replace(lanes=plan.lanes._replace(examples=padded))),
    )
    candidate.agree(candidate.reference[0], jax.device_get(state))


def order(candidate: Candidate) -> None:
    """The order of the cohort is irrelevant. Methods that draw something for each place are exempt."""
    plan = candidate.engine.place_plan(_reversed(candidate.plan(0, ROUNDS)))
    state, _ = candidate.engine.run(candidate.engine.place_states([candidate.start()]), plan)
    candidate.agree(candidate.reference[0], jax.device_get(state))


def same_key(candidate: Candidate) -> None:
    """The same key gives the same result, to the bit."""
    _assert_bitwise(candidate.run(), candidate.reference)


def one_program(candidate: Candidate) -> None:
    """The second call compiles nothing."""
    candidate.reference  # noqa: B018 (compiles)
    before = compilations()
    candidate.run(3 * ROUNDS)
    again = compilations() - before
    assert again == 0, f"{again} more programs were compiled in later rounds: shapes or Python values must not change"


def chunks(candidate: Candidate) -> None:
    """A program of many rounds equals a loop of one, to the bit."""
    state = candidate.engine.place_states([candidate.start()])
    for first_round in range(ROUNDS):
        state, _ = candidate.engine.run(state, candidate.engine.place_plan(candidate.plan(first_round, 1)))
    _assert_bitwise(jax.device_get(state), candidate.reference[0])


def resuming(candidate: Candidate) -> None:
    """A state that was saved and restored continues bit by bit."""
    through, _ = candidate.run(2 * ROUNDS)
    halfway = jax.tree.map(lambda leaf: np.array(leaf, copy=True), candidate.reference[0])
    resumed, _ = candidate.run(state=halfway)
    _assert_bitwise(through, resumed)


def ownership(candidate: Candidate) -> None:
    """The caller's arrays survive."""
    params = candidate.federation.model.init(jax.random.key(0))
    before = jax.device_get(params)
    state = candidate.engine.place_states([init_state(candidate.algorithm, params, len(candidate.federation.parts))])
    candidate.engine.run(state, candidate.engine.place_plan(candidate.plan(0, ROUNDS)))
    _assert_bitwise(before, params)


def methods_laws() -> dict[str, Callable[[Candidate], None]]:
    """The laws that hold for every method, by name; the cheapest first, and those that only rounding can tell apart last."""
    laws = (structure, interface, same_key, one_program, chunks, resuming, ownership, layout, all_lanes, padding, order)
    return {law.__name__.replace("_", " "): law for law in laws}


_compiled: list[str] = []


def compilations() -> int:
    """How many programs XLA has compiled in this process since this was first asked."""
    if not _compiled:
        _compiled.append("the beginning")

        def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                _compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(note)
    return len(_compiled) - 1


def _agree(expected: FederatedState, state: FederatedState) -> None:
    for path, (a, b) in _paired(expected, state):
        difference = worst_difference(a, b)
        assert difference <= TOLERANCE, (
            f"{path} differs by {difference:.1g} of its size; rounding explains {TOLERANCE:g}"
        )


def _assert_bitwise(first: PyTree, second: PyTree) -> None:
    for path, (a, b) in _paired(first, second):
        assert np.array_equal(a, b, equal_nan=True), f"{path} is not the same to the bit"


def _paired(first: PyTree, second: PyTree) -> list[tuple[str, tuple[Any, Any]]]:
    leaves = jax.tree_util.tree_leaves_with_path(first)
    others = jax.tree.leaves(second)
    return [(jax.tree_util.keystr(path), (a, b)) for (path, a), b in zip(leaves, others, strict=True)]


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _reversed(plan: Plan) -> Plan:
    slots = np.where(plan.lanes.slots == IDLE, IDLE, COHORT - 1 - plan.lanes.slots)
    cohorts = type(plan.cohorts)(*(leaf[:, ::-1] for leaf in plan.cohorts))
    lanes = Lanes(slots, *plan.lanes[1:])
    due = np.where(plan.preparations.slots == IDLE, IDLE, COHORT - 1 - plan.preparations.slots)
    preparations = plan.preparations._replace(slots=due)
    return plan._replace(cohorts=cohorts, rows=plan.rows[:, ::-1], lanes=lanes, preparations=preparations)
