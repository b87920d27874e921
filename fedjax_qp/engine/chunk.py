"""The program: a loop over the rounds of a chunk, with evaluation inside, for one run or several that share it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from fedjax_qp.engine.arrays import of, zeros
from fedjax_qp.engine.clients import prepare_clients, run_clients
from fedjax_qp.engine.evaluation import PersonalTests, TestSet, evaluate, evaluate_clients
from fedjax_qp.engine.plan import Lanes, Plan, Preparations
from fedjax_qp.federated import Algorithm, FederatedState, Model, federated_round

Method = Callable[[Mapping[str, Any]], Algorithm]
"""Makes a method from the settings of one run."""


class Runs(NamedTuple):
    """Several runs in one program: what makes them different, apart from their plans and first states."""

    settings: Mapping[str, Float[Array | np.ndarray, "X"]]  # options of the method
    keys: Key[Array, "X"]


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
    """Runs the rounds of one plan; see `Engine.run`. A run alone is a program of one run."""
    state = jax.tree.map(lambda leaf: leaf[None], state)
    alone = Runs({}, key[None])
    state, metrics = run_chunks(
        lambda settings: algorithm, model, axis, state, frozen, examples, test, personal, plan, alone
    )
    return of(state, 0), {name: values[:, 0] for name, values in metrics.items()}


def run_chunks(
    method: Method,
    model: Model,
    axis: str | None,
    state: FederatedState,
    frozen: PyTree,
    examples: PyTree,
    test: TestSet,
    personal: PersonalTests | None,
    plan: Plan,
    runs: Runs,
) -> tuple[FederatedState, dict[str, Array]]:
    """Runs the rounds of one plan for X runs: states [X, ...], plan as by `plan.plan_together`.

    Their clients share the lanes: what a lane trains is a client of a run, and uploads are summed by run. (A `vmap` over
    whole runs would turn every boundary's `cond` into a select and every trip count into the longest.)

    Returns:
      The states, and metrics [R, X, ...].
    """
    count = len(runs.keys)

    def one_round(index: Int[Array, ""], state: FederatedState) -> tuple[FederatedState, dict[str, Array]]:
        members = jax.tree.map(lambda leaf: leaf[index], plan.cohorts)
        cohorts = jax.tree.map(lambda leaf: leaf.reshape(count, -1), members)
        lanes = Lanes(*(leaf[:, index] for leaf in plan.lanes))
        due = Preparations(*(leaf[:, index] for leaf in plan.preparations))
        prepare = partial(prepare_clients, method, frozen, examples, due, members, runs.settings, axis)
        train = partial(run_clients, method, frozen, examples, lanes, members, runs.settings, axis)
        rows = plan.rows[index].reshape(count, -1)
        state, metrics = federated_round(
            method, partial(_each, count), prepare, train, state, cohorts, rows, runs.settings, runs.keys
        )
        test_all = partial(_test, method, model, frozen, test, personal, len(lanes.slots), axis, runs.settings, state)
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


def _each(count: int, function: Callable) -> Callable:
    """A function of one run for all of them. One run alone is not vmapped: its program stays what it would be."""
    if count > 1:
        return jax.vmap(function)
    return lambda *arguments: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*of(arguments, 0)))


def _test(
    method: Method,
    model: Model,
    frozen: PyTree,
    test: TestSet,
    personal: PersonalTests | None,
    lanes: int,
    axis: str | None,
    settings: Mapping[str, Any],
    states: FederatedState,
) -> dict[str, Array]:
    """Sums over the common test set ("test/…"), and over each client's own ("personal/…", "tuned/…") where there are any."""

    def of_run(one: tuple[Mapping[str, Any], FederatedState]) -> dict[str, Array]:
        settings, state = one
        algorithm = method(settings)
        sums = {"test": evaluate(model, frozen, algorithm.serve(state.server, ()), test, axis)}
        if personal is not None:
            sums["personal"] = evaluate_clients(model, frozen, algorithm.serve, state, personal, lanes, axis)
            if algorithm.tuned is not None:
                sums["tuned"] = evaluate_clients(model, frozen, algorithm.tuned, state, personal, lanes, axis)
        return {f"{kind}/{name}": value for kind, found in sums.items() for name, value in found.items()}

    if len(states.round) == 1:
        return jax.tree.map(lambda leaf: leaf[None], of_run(of((settings, states), 0)))
    return jax.lax.map(of_run, (settings, states))  # one after another: test batches are large already
