"""Every registered algorithm keeps the engine's contract: the result depends on nothing but configuration and seed."""

import dataclasses
from functools import cache

import jax
import numpy as np
import optax
import pytest
from small import (
    BATCH,
    CASES,
    COHORT,
    MUTATING,
    ROUNDS,
    digits,
    run_rounds,
    small_algorithm,
    small_engine,
    small_model,
    small_parts,
    small_plan,
    small_state,
    small_work,
    worst_difference,
)

from fedjax_qp.algorithms import algorithms
from fedjax_qp.federated import Algorithm, Batch, FederatedState, init_state
from fedjax_qp.plan import IDLE, Lanes, Plan

cases = pytest.mark.parametrize("case", CASES)
TOLERANCE = 1e-5  # relative, after at most five local steps a round


@cache
def compiled(case: str) -> tuple:
    """One algorithm and one engine a case, so that each compiles once for all tests that need 3 lanes."""
    algorithm = small_algorithm(case)
    return algorithm, small_engine(algorithm)


@cache
def reference(case: str) -> tuple[FederatedState, dict]:
    return run_rounds(*compiled(case), lanes=3)


def model_of(algorithm: Algorithm, state: FederatedState):
    return algorithm.serve(state.server, ())


def test_every_registered_algorithm_is_a_case():
    assert {name for name, _ in CASES.values()} == set(algorithms.names())


@cases
def test_structure_in_is_structure_out(case):
    algorithm, _ = compiled(case)
    before, after = small_state(algorithm), reference(case)[0]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
    assert all(jax.tree.leaves(shapes))
    assert int(after.round) == ROUNDS


@cases
@pytest.mark.parametrize(
    ("parallel", "devices", "lanes"), [("vmap", 1, 1), ("vmap", 1, COHORT), ("shard_map", 8, 8), ("pmap", 8, 8)]
)
def test_lanes_and_devices_agree(case, parallel, devices, lanes):
    algorithm, _ = compiled(case)
    state, metrics = run_rounds(algorithm, small_engine(algorithm, parallel, devices), lanes)
    expected_state, expected = reference(case)
    assert worst_difference(expected_state, state) <= TOLERANCE
    assert worst_difference(expected["client/loss"], metrics["client/loss"]) <= TOLERANCE
    np.testing.assert_array_equal(expected["test/count"], metrics["test/count"])


@cases
def test_same_key_same_result(case):
    state, metrics = run_rounds(*compiled(case), lanes=3)
    expected_state, expected = reference(case)
    for a, b in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((expected_state, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@cases
def test_compiles_once(case, compilations):
    algorithm, engine = compiled(case)
    reference(case)
    before = compilations()
    run_rounds(algorithm, engine, lanes=3, rounds=3 * ROUNDS)
    assert compilations() == before


@cases
def test_restored_state_continues_bitwise(case):
    algorithm, engine = compiled(case)
    through, _ = run_rounds(algorithm, engine, lanes=3, rounds=2 * ROUNDS)
    halfway = jax.tree.map(lambda leaf: np.array(leaf, copy=True), reference(case)[0])
    resumed, _ = run_rounds(algorithm, engine, lanes=3, rounds=ROUNDS, state=halfway)
    for a, b in zip(jax.tree.leaves(through), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@cases
def test_one_program_for_rounds_equals_a_loop(case):
    """Two rounds in one chunk against two chunks of one round, run by the same program."""
    algorithm, engine = compiled(case)
    state = engine.place_state(small_state(algorithm))
    for first_round in range(ROUNDS):
        state, _ = engine.run(state, engine.place_plan(small_plan(first_round, 1, lanes=3)))
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(reference(case)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@cases
def test_padding_is_inert(case):
    """Three more columns of padding in every batch change nothing."""
    algorithm, _ = compiled(case)
    plan = small_plan(0, ROUNDS, lanes=3)
    padded = np.pad(plan.lanes.examples, [(0, 0)] * 3 + [(0, 3)], constant_values=IDLE)
    engine = small_engine(algorithm)
    state, _ = engine.run(
        engine.place_state(small_state(algorithm)),
        engine.place_plan(plan._replace(lanes=plan.lanes._replace(examples=padded))),
    )
    assert worst_difference(reference(case)[0], state) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name not in MUTATING])
def test_order_in_the_cohort_is_irrelevant(case):
    """Mutating methods are exempt: which mutant a client gets is a draw over the slots."""
    algorithm, engine = compiled(case)
    state, _ = engine.run(
        engine.place_state(small_state(algorithm)), engine.place_plan(_reversed(small_plan(0, ROUNDS, lanes=3)))
    )
    assert worst_difference(reference(case)[0], state) <= TOLERANCE


def _reversed(plan: Plan) -> Plan:
    slots = np.where(plan.lanes.slots == IDLE, IDLE, COHORT - 1 - plan.lanes.slots)
    cohorts = type(plan.cohorts)(*(leaf[:, ::-1] for leaf in plan.cohorts))
    lanes = Lanes(slots, *plan.lanes[1:])
    return plan._replace(cohorts=cohorts, rows=plan.rows[:, ::-1], lanes=lanes)


@cases
def test_callers_params_survive_donation(case):
    algorithm, engine = compiled(case)
    params = small_model().init(jax.random.key(0))
    before = jax.device_get(params)
    state = engine.place_state(init_state(algorithm, params, 12))
    engine.run(state, engine.place_plan(small_plan(0, ROUNDS, lanes=3)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", ["fedavg", "fedavg-uniform", "fedavgm", "fedmut", "fedqp-nearest", "fedqp-box"])
def test_one_client_with_full_batches_is_plain_sgd(case):
    """The first round of one client: nothing federated is left, only SGD on its batches in the plan's order."""
    algorithm = small_algorithm(case)
    work = small_work(cohort=1)
    work = work._replace(parts=[small_parts()[1]], local=dataclasses.replace(work.local, batch_size=BATCH))
    plan = small_plan(0, 1, lanes=1, capacity=1, work=work)
    engine = small_engine(algorithm)
    state, _ = engine.run(engine.place_state(small_state(algorithm, 1)), engine.place_plan(plan))

    params, optimizer = small_model().init(jax.random.key(0)), optax.sgd(0.05, 0.9)
    optimizer_state = optimizer.init(params.trainable)
    for indices in plan.lanes.examples[0, 0, : plan.lanes.steps[0, 0]]:
        batch = Batch(jax.tree.map(lambda leaf, i=indices: leaf[i], digits().train), np.ones(BATCH, bool))
        gradient = jax.grad(lambda p, b=batch: small_model().loss((), p, b, None)[0])(params).trainable
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        params = params._replace(trainable=optax.apply_updates(params.trainable, updates))
    assert worst_difference(params, model_of(algorithm, state)) <= TOLERANCE
