"""The program: a loop over the rounds of a chunk, with evaluation inside."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from fedjax_qp.engine.arrays import zeros
from fedjax_qp.engine.clients import prepare_clients, run_clients
from fedjax_qp.engine.evaluation import PersonalTests, TestSet, evaluate, evaluate_clients
from fedjax_qp.federated import Algorithm, Cohort, FederatedState, Model, federated_round
from fedjax_qp.plan import Lanes, Plan, Preparations


def run_chunk(
    algorithm: Algorithm,
    model: Model,
    axis: str | None,
    state: FederatedState,
    frozen: PyTree,
    examples: PyTree,
    test: TestSet,
    personal: PersonalTests | None,
    plan: Plan,
    key: Key[Array, ""],
) -> tuple[FederatedState, dict[str, Array]]:
    """Runs the rounds of one plan; see `Engine.run`."""

    def one_round(index: Int[Array, ""], state: FederatedState) -> tuple[FederatedState, dict[str, Array]]:
        cohort = Cohort(*(leaf[index] for leaf in plan.cohorts))
        lanes = Lanes(*(leaf[:, index] for leaf in plan.lanes))
        due = Preparations(*(leaf[:, index] for leaf in plan.preparations))
        prepare = partial(prepare_clients, algorithm, frozen, examples, due, cohort, axis)
        train = partial(run_clients, algorithm, frozen, examples, lanes, cohort, axis)
        state, metrics = federated_round(algorithm, prepare, train, state, cohort, plan.rows[index], key)
        test_all = partial(_test, algorithm, model, frozen, test, personal, len(lanes.slots), axis, state)
        skipped = partial(zeros, jax.eval_shape(test_all))
        return state, metrics | jax.lax.cond(plan.evaluate[index], test_all, skipped)

    def body(index: Int[Array, ""], carry: tuple) -> tuple:
        state, records = carry
        state, metrics = one_round(index, state)
        return state, jax.tree.map(lambda record, value: record.at[index].set(value), records, metrics)

    capacity = len(plan.evaluate)
    _, metrics = jax.eval_shape(one_round, jnp.zeros((), jnp.int32), state)
    records = zeros(metrics, capacity)
    return jax.lax.fori_loop(0, plan.rounds, body, (state, records))


def _test(
    algorithm: Algorithm,
    model: Model,
    frozen: PyTree,
    test: TestSet,
    personal: PersonalTests | None,
    lanes: int,
    axis: str | None,
    state: FederatedState,
) -> dict[str, Array]:
    """Sums over the common test set ("test/…"), and over each client's own ("personal/…", "tuned/…") where there are any."""
    sums = {"test": evaluate(model, frozen, algorithm.serve(state.server, ()), test, axis)}
    if personal is not None:
        sums["personal"] = evaluate_clients(model, frozen, algorithm.serve, state, personal, lanes, axis)
        if algorithm.tuned is not None:
            sums["tuned"] = evaluate_clients(model, frozen, algorithm.tuned, state, personal, lanes, axis)
    return {f"{kind}/{name}": value for kind, found in sums.items() for name, value in found.items()}
