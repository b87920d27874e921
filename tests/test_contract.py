"""Every registered algorithm keeps the engine's contract: the result depends on nothing but configuration and seed."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from support.contract import TOLERANCE, candidate, reference
from support.federations import CASES, MUTATING, small_algorithm

from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract import laws
from fedjax_qp.contract.federations import (
    BATCH,
    COHORT,
    ROUNDS,
    digits,
    language,
    small_engine,
    small_model,
    small_parts,
    small_plan,
    small_state,
    small_work,
    worst_difference,
)
from fedjax_qp.federated import Batch

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


def test_every_registered_algorithm_is_a_case():
    assert {case.name for case in CASES.values()} == set(algorithms.names())


@pytest.mark.parametrize("case", CASES)
def test_structure_in_is_structure_out(case):
    laws.structure(candidate(case))


@pytest.mark.parametrize(
    ("case", "parallel", "devices", "lanes"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (run[0] not in QUICK or run in LONG)) for run in RUNS],
)
def test_lanes_and_devices_agree(case, parallel, devices, lanes):
    laws.layout(candidate(case), parallel, devices, lanes)


@pytest.mark.parametrize("case", some("fedavg", "ditto", "perfit-grouped", "flora"))
def test_the_engine_does_what_the_interface_says(case):
    """Against a plain loop over the clients of a round."""
    laws.interface(candidate(case))


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
@pytest.mark.parametrize("law", [laws.same_key, laws.one_program, laws.resuming, laws.chunks, laws.ownership])
def test_laws_of_every_method(case, law):
    law(candidate(case))


@pytest.mark.parametrize("case", ["fedavg", "fedmut", "fedqp-clients", "ditto", "fedit"])
def test_padding_is_inert(case):
    laws.padding(candidate(case))


@pytest.mark.parametrize("case", some(*(case for case in CASES if CASES[case].name not in MUTATING)))
def test_order_in_the_cohort_is_irrelevant(case):
    """Mutating methods are exempt: which mutant a client gets is a draw over the slots."""
    laws.order(candidate(case))


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
