"""What the engine promises beyond the contract: transfers, absences, memories, evaluation."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.federations import counting, small_algorithm

from fedjax_qp.contract.federations import (
    CLIENTS,
    COHORT,
    ROUNDS,
    digits,
    run_rounds,
    small_engine,
    small_model,
    small_parts,
    small_plan,
    small_state,
    small_work,
    worst_difference,
)
from fedjax_qp.engine import cut_test_set
from fedjax_qp.federated import Batch


def test_no_host_transfer_inside_a_chunk():
    algorithm = small_algorithm("fedqp-joint")
    engine = small_engine(algorithm)
    state = engine.place_states([small_state(algorithm)])
    plans = [engine.place_plan(small_plan(first, ROUNDS, lanes=3)) for first in (0, ROUNDS)]
    with jax.transfer_guard("disallow"):
        for plan in plans:
            state, metrics = engine.run(state, plan)
            jax.block_until_ready(metrics)


@pytest.mark.parametrize("parallel", ["shard_map", "pmap"])
def test_several_devices_compile_once_too(parallel, compilations):
    algorithm = small_algorithm("fedmut")
    engine = small_engine(algorithm, parallel, 8)
    run_rounds(algorithm, engine, lanes=8)
    before = compilations()
    run_rounds(algorithm, engine, lanes=8, rounds=3 * ROUNDS)
    assert compilations() == before


COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+)(?:-start)?\(")


def exchanges(case: str) -> list[tuple[str, str, int]]:
    """(kind, type, elements) of all that eight devices exchange in a chunk, by the compiled program."""
    algorithm = small_algorithm(case)
    engine = small_engine(algorithm, "shard_map", 8)
    state, plan = engine.place_states([small_state(algorithm)]), engine.place_plan(small_plan(0, ROUNDS, lanes=8))
    found = []
    for shapes, kind in COLLECTIVE.findall(engine.compiled(state, plan).as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        assert len({dtype for dtype, _ in arrays}) == 1
        found.append((kind, arrays[0][0], sum(math.prod(map(int, filter(None, d.split(",")))) for _, d in arrays)))
    return found


@pytest.mark.parametrize(("case", "memories"), [("fedavg", 0), ("fedqp-nearest", 0), ("ditto", 1)])
def test_devices_meet_once_a_round_and_only_the_cohorts_rows_move(case, memories):
    """The round's one exchange is the sum of the uploads (the update, and the direction that clients' agreement is taken
    from), the cohort's metrics and, for Ditto, its memories (a model and a flag each); the other is the evaluation's."""
    model = sum(leaf.size for leaf in jax.tree.leaves(small_model().init(jax.random.key(0))))
    upload, metrics = 2 * model + 2, 2
    found = exchanges(case)
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    floats = sorted(elements for _, dtype, elements in found if dtype == "f32")
    assert floats == [10 + 10 + 1, upload + COHORT * (metrics + memories * (model + 1))]
    others = [elements for _, dtype, elements in found if dtype != "f32"]
    assert sum(others) <= COHORT * 8  # who has reported


def test_evaluation_equals_the_model_on_the_whole_test_set():
    algorithm = small_algorithm("fedavg")
    for parallel, devices in (("vmap", 1), ("shard_map", 8)):
        state, metrics = run_rounds(algorithm, small_engine(algorithm, parallel, devices), lanes=8)
        test = digits().test
        whole = Batch(test, np.ones(len(test.labels), bool))
        expected = small_model().evaluate((), state.server.params, whole)
        np.testing.assert_array_equal(metrics["test/correct"][-1], expected["correct"])
        np.testing.assert_allclose(metrics["test/loss"][-1], expected["loss"], rtol=1e-5)
        np.testing.assert_array_equal(metrics["test/count"][-1], np.bincount(test.labels, minlength=10))


def test_cutting_the_test_set_keeps_every_example_once():
    cut = cut_test_set(digits().test, 64)
    np.testing.assert_array_equal(np.asarray(cut.examples.labels)[np.asarray(cut.mask)], digits().test.labels)


@pytest.mark.parametrize(
    ("count", "most", "shape"),
    [(10000, 500, (20, 500)), (1000, 500, (2, 500)), (8, 500, (1, 8)), (501, 500, (2, 251)), (360, 64, (6, 60))],
)
def test_test_batches_are_even_and_no_larger_than_they_need_be(count, most, shape):
    cut = cut_test_set(np.arange(count), most)
    assert cut.mask.shape == shape
    np.testing.assert_array_equal(cut.examples[cut.mask], np.arange(count))


@pytest.mark.parametrize("case", ["fedavg", "fedavgm", "fedyogi", "fedqp-history"])
def test_a_round_in_which_everybody_drops_out_changes_nothing(case):
    """Not even by the server's momentum, which a first round has filled."""
    algorithm = small_algorithm(case)
    engine = small_engine(algorithm)
    before, _ = engine.run(engine.place_states([small_state(algorithm)]), engine.place_plan(small_plan(0, 1, lanes=3)))
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(before))
    plan = small_plan(1, 1, lanes=3)
    absent = plan._replace(
        cohorts=plan.cohorts._replace(steps=np.zeros_like(plan.cohorts.steps)),
        lanes=plan.lanes._replace(slots=np.full_like(plan.lanes.slots, -1), steps=np.zeros_like(plan.lanes.steps)),
    )
    state, metrics = engine.run(engine.place_states([before]), engine.place_plan(absent))
    assert worst_difference(before.server, state.server) == 0
    assert int(state.round) == 2
    assert np.isfinite(metrics["update/norm"]).all()


def test_the_average_is_over_those_who_report():
    """FedAvg by size with one dropout equals FedAvg over the remaining clients."""
    algorithm = small_algorithm("fedavg")
    engine = small_engine(algorithm)
    plan = small_plan(0, 1, lanes=1)
    gone = int(plan.lanes.slots[0, 0, 0])
    steps = plan.cohorts.steps.copy()
    kept = plan.lanes.slots[0, 0] != gone
    order = np.argsort(~kept, kind="stable")
    lanes = type(plan.lanes)(
        np.where(kept, plan.lanes.slots[0, 0], -1)[order][None, None],
        plan.lanes.local_steps[0, 0][order][None, None],
        plan.lanes.examples[0, 0][order][None, None],
        plan.lanes.steps - steps[0, gone],
    )
    steps[0, gone] = 0
    capacity_one = small_plan(0, 1, lanes=1, capacity=1)
    partial_plan = capacity_one._replace(
        cohorts=type(plan.cohorts)(*(leaf[:1] for leaf in plan.cohorts._replace(steps=steps))),
        lanes=lanes._replace(steps=lanes.steps[:, :1]),
    )
    state, _ = engine.run(engine.place_states([small_state(algorithm)]), engine.place_plan(partial_plan))

    start = small_model().init(jax.random.key(0))
    total, weight = jax.tree.map(jnp.zeros_like, start), 0.0
    for slot in range(COHORT):
        if slot == gone:
            continue
        client = int(plan.cohorts.clients[0, slot])
        one = small_work(cohort=1)._replace(parts=[small_parts()[client]])
        alone = small_plan(0, 1, lanes=1, capacity=1, work=one)
        batches = plan.lanes.examples[0, 0][plan.lanes.slots[0, 0] == slot]
        examples = np.full_like(alone.lanes.examples, -1)
        examples[0, 0, : len(batches)] = batches
        only = alone._replace(lanes=alone.lanes._replace(examples=examples))
        trained, _ = small_engine(algorithm).run(
            engine.place_states([small_state(algorithm, 1)]), engine.place_plan(only)
        )
        size = float(plan.cohorts.sizes[0, slot])
        total = jax.tree.map(lambda t, w, s=size: t + s * w, total, trained.server.params)
        weight += size
    expected = jax.tree.map(lambda leaf: leaf / weight, total)
    assert worst_difference(expected, state.server.params) <= 1e-5


@pytest.mark.parametrize(("parallel", "devices", "lanes"), [("vmap", 1, 2), ("shard_map", 8, 8), ("pmap", 8, 8)])
def test_client_memories_follow_their_clients(parallel, devices, lanes):
    rounds, algorithm = 3 * ROUNDS, counting()
    state, _ = run_rounds(algorithm, small_engine(algorithm, parallel, devices), lanes, rounds=rounds, dropout=0.2)
    times, steps = np.zeros(CLIENTS), np.zeros(CLIENTS)
    for first in range(0, rounds, ROUNDS):
        cohorts = small_plan(first, ROUNDS, lanes, work=small_work(dropout=0.2)).cohorts
        np.add.at(times, cohorts.clients, cohorts.steps > 0)
        np.add.at(steps, cohorts.clients, cohorts.steps)
    np.testing.assert_array_equal(state.clients["rounds"], times)
    np.testing.assert_array_equal(state.clients["steps"], steps)
    assert state.server[1] == times.sum()
