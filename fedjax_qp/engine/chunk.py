"""The program: a loop over the rounds of a chunk, with evaluation inside, for all runs that share it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from fedjax_qp.engine.arrays import take, zeros
from fedjax_qp.engine.clients import RoundWork, prepare_clients, run_clients
from fedjax_qp.engine.evaluation import PersonalTests, TestSet, evaluate, evaluate_clients
from fedjax_qp.engine.plan import Lanes, Plan, Preparations
from fedjax_qp.federated import Algorithm, FederatedState, Model, federated_round

Method = Callable[[Mapping[str, Any]], Algorithm]
"""Makes a method from the settings of one run."""


class Data(NamedTuple):
    """What stays the same over all rounds and runs."""

    frozen: PyTree
    train: PyTree  # arrays [N, ...]
    test: TestSet
    personal: PersonalTests | None = None  # each client's own test examples, where there are any


class Runs(NamedTuple):
    """The runs in one program: what makes them different, apart from their plans and first states."""

    settings: Mapping[str, Float[Array | np.ndarray, "X"]]  # of the method; those that differ
    keys: Key[Array, "X"]  # of each run, jax.random.key(seed)


def run_chunk(
    method: Method, model: Model, axis: str | None, state: FederatedState, data: Data, plan: Plan, runs: Runs
) -> tuple[FederatedState, dict[str, Array]]:
    """Runs the rounds of one plan for X runs: states [X, ...], plan as by `plan.plan_chunk`.

    Their clients share the lanes: what a lane trains is a client of a run, and uploads are summed by run. (A `vmap` over
    whole runs would turn every boundary's `cond` into a select and every trip count into the longest.)

    A run alone is folded: its state and its key come without the axis of runs, and so do the results.

    Returns:
      The states, and metrics [R, X, ...].
    """
    folded = runs.keys.ndim == 0
    if folded:
        state, runs = jax.tree.map(lambda leaf: leaf[None], (state, runs))
    count = len(runs.keys)

    def one_round(index: Int[Array, ""], state: FederatedState) -> tuple[FederatedState, dict[str, Array]]:
        members = jax.tree.map(lambda leaf: leaf[index], plan.cohorts)
        cohorts = jax.tree.map(lambda leaf: leaf.reshape(count, -1), members)
        lanes = Lanes(*(leaf[:, index] for leaf in plan.lanes))
        due = Preparations(*(leaf[:, index] for leaf in plan.preparations))
        work = RoundWork(method, runs.settings, data.frozen, data.train, members, axis)
        rows = plan.rows[index].reshape(count, -1)
        state, metrics = federated_round(
            method,
            partial(_each, count),
            partial(prepare_clients, work, due),
            partial(run_clients, work, lanes),
            state,
            cohorts,
            rows,
            runs.settings,
            runs.keys,
        )
        test_all = partial(_test, method, model, data, len(lanes.slots), axis, runs.settings, state)
        skipped = partial(zeros, jax.eval_shape(test_all))
        return state, metrics | jax.lax.cond(plan.evaluate[index], test_all, skipped)

    def body(index: Int[Array, ""], carry: tuple) -> tuple:
        state, records = carry
        state, metrics = one_round(index, state)
        return state, jax.tree.map(lambda record, value: record.at[index].set(value), records, metrics)

    capacity = len(plan.evaluate)
    _, metrics = jax.eval_shape(one_round, jnp.zeros((), jnp.int32), state)
    records = zeros(metrics, capacity)
    state, metrics = jax.lax.fori_loop(0, plan.rounds, body, (state, records))
    return (take(state, 0), {name: values[:, 0] for name, values in metrics.items()}) if folded else (state, metrics)


def _each(count: int, function: Callable) -> Callable:
    """A function of one run for all of them. One run alone is not vmapped: its program stays what it would be."""
    if count > 1:
        return jax.vmap(function)
    return lambda *arguments: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*take(arguments, 0)))


def _test(
    method: Method,
    model: Model,
    data: Data,
    lanes: int,
    axis: str | None,
    settings: Mapping[str, Any],
    states: FederatedState,
) -> dict[str, Array]:
    """Sums over the common test set ("test/…"), and over each client's own ("personal/…", "tuned/…") where there are any."""

    def of_run(one: tuple[Mapping[str, Any], FederatedState]) -> dict[str, Array]:
        settings, state = one
        algorithm = method(settings)
        sums = {"test": evaluate(model, data.frozen, algorithm.serve(state.server, ()), data.test, axis)}
        if data.personal is not None:
            sums["personal"] = evaluate_clients(model, data.frozen, algorithm.serve, state, data.personal, lanes, axis)
            if algorithm.tuned is not None:
                sums["tuned"] = evaluate_clients(model, data.frozen, algorithm.tuned, state, data.personal, lanes, axis)
        return {f"{kind}/{name}": value for kind, found in sums.items() for name, value in found.items()}

    if len(states.round) == 1:
        return jax.tree.map(lambda leaf: leaf[None], of_run(take((settings, states), 0)))
    return jax.lax.map(of_run, (settings, states))  # one after another: test batches are large already
