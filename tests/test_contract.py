"""Every registered algorithm keeps the engine's contract: the result depends on nothing but configuration and seed."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from support.contract import TOLERANCE, assert_agree, compiled, reference
from support.federations import (
    BATCH,
    CASES,
    COHORT,
    MUTATING,
    ROUNDS,
    digits,
    federation_of,
    language,
    play,
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
from fedjax_qp.engine.plan import IDLE, Lanes, Plan
from fedjax_qp.federated import Batch, FederatedState, init_state

# One case of each kind of server, client memory and message; the others are slow here, since each compiles a program of its
# own. All are traced in the ordinary suite, and run against numpy in the tests of their own files.
QUICK = ("fedavg", "fedmut", "fedqp-clients", "ditto", "scaffold", "clustered_sampling", "fedit", "perfit")


def some(*names: str) -> list:
    """Cases as parameters."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


cases = pytest.mark.parametrize("case", some(*CASES))
LANGUAGE = [case for case in CASES if CASES[case].language]

# Eight devices with a lane each are for (nearly) all; other numbers of lanes and pmap are for one of each kind: sums of
# uploads, mutants, single uploads, memories. FedIT stands for the methods that only differ from it in what they average,
# FedAvg for FedSAM, whose loss alone is another.
KINDS = ("fedavg", "fedmut", "fedqp-clients", "ditto")
AS_FEDIT = ("local_lora", "ffa_lora", "fedsa_lora")
RUNS = [
    *((case, "shard_map", 8, 8) for case in CASES if case not in (*AS_FEDIT, "perfit", "fedsam")),
    *((case, "vmap", 1, lanes) for case in KINDS for lanes in (1, COHORT)),
    *((case, "pmap", 8, 8) for case in ("fedavg", "fedqp-clients", "fedsa_lora")),
    ("perfit", "vmap", 1, 1),
]
LONG = [("perfit", "vmap", 1, 1), ("fedqp-clients", "pmap", 8, 8)]


def start_state(case: str) -> FederatedState:
    return small_state(compiled(case)[0], federation=federation_of(case))


def plan_of(case: str, first_round: int, rounds: int) -> Plan:
    work = small_work(federation_of(case), compiled(case)[0])
    return small_plan(first_round, rounds, lanes=3, work=work)


def test_every_registered_algorithm_is_a_case():
    assert {case.name for case in CASES.values()} == set(algorithms.names())


@pytest.mark.parametrize("case", CASES)
def test_structure_in_is_structure_out(case):
    before, engine = start_state(case), compiled(case)[1]
    after, _ = jax.eval_shape(engine.run, before, engine.place_plan(plan_of(case, 0, ROUNDS)))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
    assert all(jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("case", "parallel", "devices", "lanes"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (run[0] not in QUICK or run in LONG)) for run in RUNS],
)
def test_lanes_and_devices_agree(case, parallel, devices, lanes):
    algorithm, federation = small_algorithm(case), federation_of(case)
    engine = small_engine(algorithm, parallel, devices, federation)
    state, metrics = run_rounds(algorithm, engine, lanes, federation=federation)
    expected_state, expected = reference(case)
    for name in expected:
        if name.endswith("/loss"):
            assert worst_difference(expected[name], metrics[name]) <= TOLERANCE, name
    np.testing.assert_array_equal(expected["test/count"], metrics["test/count"])
    assert int(state.round) == ROUNDS
    assert_agree(case, expected_state, state)


@pytest.mark.parametrize("case", some("fedavg", "ditto", "perfit-grouped", "flora"))
def test_the_engine_does_what_the_interface_says(case):
    """Against a plain loop over the clients of a round."""
    played = play(small_algorithm(case), federation_of(case))
    state, metrics = reference(case)
    memories = jax.tree.map(lambda *leaves: np.stack(leaves), *played.memories)
    assert_agree(case, state, FederatedState(np.int32(ROUNDS), played.server, memories))
    clients = plan_of(case, 0, ROUNDS).cohorts.clients
    for number, reports in enumerate(played.metrics):
        losses = [float(reports[int(client)]["client/loss"]) for client in clients[number]]
        np.testing.assert_allclose(metrics["client/loss"][number], losses, rtol=TOLERANCE)


@pytest.mark.parametrize("case", some(*LANGUAGE))
def test_methods_of_adapters_report_budget_and_personal_tests(case):
    _, metrics = reference(case)
    clients = len(language().parts)
    assert {"client/trained_entries", "client/upload_bytes", "client/download_bytes"} <= set(metrics)
    for kind in ("personal", "tuned"):
        assert metrics[f"{kind}/loss"].shape == (ROUNDS, clients)
        assert np.isfinite(metrics[f"{kind}/loss"]).all()
        assert (metrics[f"{kind}/count"] == metrics["personal/count"]).all()
    assert (metrics["personal/count"] > 0).all()


@cases
def test_same_key_same_result(case):
    state, metrics = run_rounds(*compiled(case), lanes=3, federation=federation_of(case))
    expected_state, expected = reference(case)
    for a, b in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves((expected_state, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@cases
def test_compiles_once(case, compilations):
    algorithm, engine = compiled(case)
    reference(case)
    before = compilations()
    run_rounds(algorithm, engine, lanes=3, rounds=3 * ROUNDS, federation=federation_of(case))
    assert compilations() == before


@cases
def test_restored_state_continues_bitwise(case):
    algorithm, engine = compiled(case)
    federation = federation_of(case)
    through, _ = run_rounds(algorithm, engine, lanes=3, rounds=2 * ROUNDS, federation=federation)
    halfway = jax.tree.map(lambda leaf: np.array(leaf, copy=True), reference(case)[0])
    resumed, _ = run_rounds(algorithm, engine, lanes=3, rounds=ROUNDS, state=halfway, federation=federation)
    for a, b in zip(jax.tree.leaves(through), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@cases
def test_one_program_for_rounds_equals_a_loop(case):
    """Two rounds in one chunk against two chunks of one round, run by the same program."""
    _, engine = compiled(case)
    state = engine.place_states([start_state(case)])
    for first_round in range(ROUNDS):
        state, _ = engine.run(state, engine.place_plan(plan_of(case, first_round, 1)))
    for a, b in zip(jax.tree.leaves(jax.device_get(state)), jax.tree.leaves(reference(case)[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", ["fedavg", "fedmut", "fedqp-clients", "ditto", "fedit"])
def test_padding_is_inert(case):
    """Three more columns of padding in every batch change nothing."""
    algorithm, _ = compiled(case)
    plan = plan_of(case, 0, ROUNDS)
    padded = np.pad(plan.lanes.examples, [(0, 0)] * 3 + [(0, 3)], constant_values=IDLE)
    engine = small_engine(algorithm, federation=federation_of(case))
    state, _ = engine.run(
        engine.place_states([start_state(case)]),
        engine.place_plan(plan._replace(lanes=plan.lanes._replace(examples=padded))),
    )
    assert worst_difference(reference(case)[0], state) <= TOLERANCE


@pytest.mark.parametrize("case", some(*(case for case in CASES if CASES[case].name not in MUTATING)))
def test_order_in_the_cohort_is_irrelevant(case):
    """Mutating methods are exempt: which mutant a client gets is a draw over the slots."""
    _, engine = compiled(case)
    plan = engine.place_plan(_reversed(plan_of(case, 0, ROUNDS)))
    state, _ = engine.run(engine.place_states([start_state(case)]), plan)
    assert_agree(case, reference(case)[0], state)


def _reversed(plan: Plan) -> Plan:
    slots = np.where(plan.lanes.slots == IDLE, IDLE, COHORT - 1 - plan.lanes.slots)
    cohorts = type(plan.cohorts)(*(leaf[:, ::-1] for leaf in plan.cohorts))
    lanes = Lanes(slots, *plan.lanes[1:])
    due = np.where(plan.preparations.slots == IDLE, IDLE, COHORT - 1 - plan.preparations.slots)
    preparations = plan.preparations._replace(slots=due)
    return plan._replace(cohorts=cohorts, rows=plan.rows[:, ::-1], lanes=lanes, preparations=preparations)


@cases
def test_callers_params_survive_donation(case):
    algorithm, engine = compiled(case)
    federation = federation_of(case)
    params = federation.model.init(jax.random.key(0))
    before = jax.device_get(params)
    state = engine.place_states([init_state(algorithm, params, len(federation.parts))])
    engine.run(state, engine.place_plan(plan_of(case, 0, ROUNDS)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "case", some("fedavg", "fedavg-uniform", "fedavgm", "fedmut", "fedqp-nearest", "fedqp-box", "ditto")
)
def test_one_client_with_full_batches_is_plain_sgd(case):
    """The first round of one client: nothing federated is left, only SGD on its batches in the plan's order."""
    algorithm = small_algorithm(case)
    work = small_work(cohort=1)
    work = work._replace(parts=[small_parts()[1]], local=dataclasses.replace(work.local, batch_size=BATCH))
    plan = small_plan(0, 1, lanes=1, capacity=1, work=work)
    engine = small_engine(algorithm)
    state, _ = engine.run(engine.place_states([small_state(algorithm, 1)]), engine.place_plan(plan))

    params, optimizer = small_model().init(jax.random.key(0)), optax.sgd(0.05, 0.9)
    optimizer_state = optimizer.init(params.trainable)
    for indices in plan.lanes.examples[0, 0, : plan.lanes.steps[0, 0]]:
        batch = Batch(jax.tree.map(lambda leaf, i=indices: leaf[i], digits().train), np.ones(BATCH, bool))
        gradient = jax.grad(lambda p, b=batch: small_model().loss((), p, b, None)[0])(params).trainable
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        params = params._replace(trainable=optax.apply_updates(params.trainable, updates))
    assert worst_difference(params, algorithm.serve(state.server, ())) <= TOLERANCE
