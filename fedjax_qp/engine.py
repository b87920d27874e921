"""Device side: runs a plan. The only file that knows vmap, scan, meshes, shard_map and pmap.

One program runs a whole chunk of rounds: a loop over rounds around a loop over steps around `vmap` over lanes, with
evaluation inside. A lane runs its clients one after another: at a client's first step it loads the start model, at its
last it adds the upload to the round's sum. That boundary work sits under a scalar `lax.cond`, so ordinary steps do not
pay for it. The number of steps and of rounds are dynamic trip counts: nothing is recompiled from round to round.

Several devices split the lanes; everything else is replicated, and the devices meet in one sum at the end of a round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key, PyTree

from fedjax_qp.federated import (
    Algorithm,
    Batch,
    Client,
    Cohort,
    FederatedState,
    Model,
    client_key,
    federated_round,
)
from fedjax_qp.plan import IDLE, Lanes, Plan

AXIS = "clients"


class TestSet(NamedTuple):
    """Test examples cut into batches for the device."""

    __test__ = False  # the name is the field's; it is not a test case

    examples: PyTree  # [batches, B, ...]
    mask: Bool[Array | np.ndarray, "batches B"]


class Engine(NamedTuple):
    """A compiled simulator. `place_…` puts host arrays where `run` wants them; `run` consumes the state it is given."""

    place_state: Callable[[FederatedState], FederatedState]
    place_plan: Callable[[Plan], Plan]
    run: Callable[[FederatedState, Plan], tuple[FederatedState, dict[str, Array]]]


class LoopState(NamedTuple):
    """What the step loop carries."""

    carry: PyTree  # [L, ...] the clients in training
    collected: PyTree  # sum of uploads, or uploads [M, ...]
    memories: PyTree  # [M, ...]; zero where the client has not reported on this device
    reported: Bool[Array, "M"]
    metrics: dict[str, Array]  # [M]


def run_clients(
    algorithm: Algorithm,
    frozen: PyTree,
    examples: PyTree,
    lanes: Lanes,
    cohort: Cohort,
    axis: str | None,
    shared: PyTree,
    own: PyTree,
    memories: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Trains one cohort.

    Args:
      examples: training set, arrays [N, ...].
      lanes: this round's work of this device's lanes: arrays [L, S], examples [L, S, B], steps [L].
      axis: name of the device axis, or None on one device.
      shared, own, memories: from `dispatch` and the client store; `own` and memories have leading axis M.

    Returns:
      The sum of the uploads (or all of them, [M, ...], for `combine_each`), the new memories [M, ...], metrics [M].
    """
    members = len(cohort.clients)
    stacked = algorithm.combine_each is not None

    def of(tree: PyTree, slot: Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[slot], tree)

    def start(slot: Int[Array, ""]) -> PyTree:
        return algorithm.start(shared, of(own, slot), of(memories, slot), client_key(key, cohort.clients[slot], 0))

    def step(carry: PyTree, slot: Array, local_step: Array, indices: Int[Array, "B"]) -> PyTree:
        batch = Batch(jax.tree.map(lambda leaf: leaf[jnp.maximum(indices, 0)], examples), indices != IDLE)
        return algorithm.step(frozen, shared, carry, batch, client_key(key, cohort.clients[slot], local_step + 1))

    def finish(slot: Int[Array, ""], carry: PyTree) -> tuple[PyTree, PyTree, dict]:
        client = Client(*of(cohort, slot))
        return algorithm.finish(shared, of(own, slot), carry, of(memories, slot), client)

    def load(begins: Bool[Array, "L"], slots: Int[Array, "L"], carry: PyTree) -> PyTree:
        return _select(begins, jax.vmap(start)(slots), carry)

    def report(ends: Bool[Array, "L"], slots: Int[Array, "L"], state: LoopState) -> LoopState:
        uploads, new_memories, metrics = jax.vmap(finish)(slots, state.carry)
        target = jnp.where(ends, slots, members)  # out of range = dropped

        def put(whole: PyTree, rows: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf, new: leaf.at[target].set(new, mode="drop"), whole, rows)

        if stacked:
            collected = put(state.collected, uploads)
        else:
            ended = _select(ends, uploads, jax.tree.map(jnp.zeros_like, uploads))
            collected = jax.tree.map(lambda total, new: total + new.sum(0), state.collected, ended)
        return LoopState(
            state.carry,
            collected,
            put(state.memories, new_memories),
            state.reported.at[target].set(True, mode="drop"),
            put(state.metrics, metrics),
        )

    def body(index: Int[Array, ""], state: LoopState) -> LoopState:
        slots, local_steps, indices = (jnp.asarray(leaf)[:, index] for leaf in lanes[:3])
        active, slots = slots != IDLE, jnp.maximum(slots, 0)
        begins = active & (local_steps == 0)
        carry = jax.lax.cond(begins.any(), partial(load, begins, slots), lambda carry: carry, state.carry)
        carry = jax.vmap(step)(carry, slots, local_steps, indices)
        state = state._replace(carry=carry)
        ends = active & (local_steps == cohort.steps[slots] - 1)
        return jax.lax.cond(ends.any(), partial(report, ends, slots), lambda state: state, state)

    one_carry = jax.eval_shape(start, 0)
    one_upload, _, one_metrics = jax.eval_shape(finish, 0, one_carry)
    empty = LoopState(
        _zeros(one_carry, len(lanes.slots)),
        _zeros(one_upload, members) if stacked else _zeros(one_upload),
        jax.tree.map(jnp.zeros_like, memories),
        jnp.zeros(members, bool),
        _zeros(one_metrics, members),
    )
    final = jax.lax.fori_loop(0, lanes.steps.max(), body, empty)
    collected, new, reported, metrics = _across(axis, (final.collected, final.memories, final.reported, final.metrics))
    memories = _select(reported > 0, new, memories)
    return collected, memories, metrics


def evaluate(model: Model, frozen: PyTree, params: PyTree, test: TestSet, axis: str | None) -> dict[str, Array]:
    """Sums of the model's metrics over the whole test set; every device takes its share of the batches."""
    batches = len(test.mask)
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    device = 0 if axis is None else jax.lax.axis_index(axis)

    def add(turn: Int[Array, ""], sums: dict[str, Array]) -> dict[str, Array]:
        index = turn * devices + device
        examples = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, batches - 1)], test.examples)
        mask = test.mask[jnp.minimum(index, batches - 1)] & (index < batches)
        return jax.tree.map(jnp.add, sums, model.evaluate(frozen, params, Batch(examples, mask)))

    first = Batch(jax.tree.map(lambda leaf: leaf[0], test.examples), test.mask[0])
    sums = _zeros(jax.eval_shape(model.evaluate, frozen, params, first))
    return _across(axis, jax.lax.fori_loop(0, -(-batches // devices), add, sums))


def run_chunk(
    algorithm: Algorithm,
    model: Model,
    axis: str | None,
    state: FederatedState,
    frozen: PyTree,
    examples: PyTree,
    test: TestSet,
    plan: Plan,
    key: Key[Array, ""],
) -> tuple[FederatedState, dict[str, Array]]:
    """Runs the rounds of one plan; see `Engine.run`."""

    def one_round(index: Int[Array, ""], state: FederatedState) -> tuple[FederatedState, dict[str, Array]]:
        cohort = Cohort(*(leaf[index] for leaf in plan.cohorts))
        lanes = Lanes(*(leaf[:, index] for leaf in plan.lanes))
        train = partial(run_clients, algorithm, frozen, examples, lanes, cohort, axis)
        state, metrics = federated_round(algorithm, train, state, cohort, plan.rows[index], key)

        def test_model() -> dict[str, Array]:
            return evaluate(model, frozen, algorithm.serve(state.server, ()), test, axis)

        skipped = partial(_zeros, jax.eval_shape(test_model))
        tested = jax.lax.cond(plan.evaluate[index], test_model, skipped)
        return state, {**metrics, **{f"test/{name}": value for name, value in tested.items()}}

    def body(index: Int[Array, ""], carry: tuple) -> tuple:
        state, records = carry
        state, metrics = one_round(index, state)
        return state, jax.tree.map(lambda record, value: record.at[index].set(value), records, metrics)

    capacity = len(plan.evaluate)
    _, metrics = jax.eval_shape(one_round, jnp.zeros((), jnp.int32), state)
    records = _zeros(metrics, capacity)
    return jax.lax.fori_loop(0, plan.rounds, body, (state, records))


def cut_test_set(examples: PyTree, batch_size: int) -> TestSet:
    """Cuts arrays [N, ...] into batches, the last one padded."""
    count = len(jax.tree.leaves(examples)[0])
    batches = -(-count // batch_size)
    padding = batches * batch_size - count

    def cut(leaf: np.ndarray) -> np.ndarray:
        padded = np.concatenate([leaf, np.zeros((padding, *leaf.shape[1:]), leaf.dtype)])
        return padded.reshape(batches, batch_size, *leaf.shape[1:])

    return TestSet(jax.tree.map(cut, examples), cut(np.ones(count, bool)))


def make_engine(
    algorithm: Algorithm,
    model: Model,
    *,
    frozen: PyTree,
    train: PyTree,
    test: TestSet,
    seed: int,
    parallel: str = "vmap",
    devices: int = 1,
) -> Engine:
    """Compiles nothing yet; the first `run` does, once for the whole run.

    Args:
      train: training examples, arrays [N, ...]; they go to the device once, in their own dtype (uint8 images stay so).
      parallel: "vmap" (one device), "shard_map" or "pmap" (lanes split over `devices`; the number of lanes must be a
        multiple of it).
    """
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    axis = None if parallel == "vmap" else AXIS
    chunk = partial(run_chunk, algorithm, model, axis)
    pmapped = parallel == "pmap"

    def place_plan(plan: Plan) -> Plan:
        lanes = Lanes(*(_by_device(leaf, devices) if pmapped else leaf for leaf in plan.lanes))
        common = jax.device_put(plan._replace(lanes=()), everywhere)
        return common._replace(lanes=jax.device_put(lanes, split))

    whole, by_lane = PartitionSpec(), PartitionSpec(AXIS)
    if parallel == "vmap":
        program = jax.jit(chunk, donate_argnums=0)
    elif parallel == "shard_map":
        mapped = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(whole,) * 4 + (_for_lanes(by_lane, whole), whole),
            out_specs=whole,
            check_vma=False,
        )
        program = jax.jit(mapped, donate_argnums=0)
    else:
        program = jax.pmap(
            chunk,
            AXIS,
            in_axes=(None, None, None, None, _for_lanes(0, None), None),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    fixed = jax.device_put((frozen, train, test), everywhere)
    key = jax.device_put(jax.random.key(seed), everywhere)

    def run(state: FederatedState, plan: Plan) -> tuple[FederatedState, dict[str, Array]]:
        return program(state, *fixed, plan, key)

    return Engine(partial(jax.device_put, device=everywhere), place_plan, run)


def _for_lanes(lanes: Any, rest: Any) -> Any:
    """A plan-shaped tree: one thing for the lanes, another for all else."""
    return Plan(rest, rest, lanes, rest, rest)


def _by_device(leaf: Array | np.ndarray, devices: int) -> Array | np.ndarray:
    """[L, ...] → [devices, L/devices, ...], the layout that pmap wants."""
    return leaf.reshape(devices, -1, *leaf.shape[1:])


def _select(condition: Bool[Array, "L"], new: PyTree, old: PyTree) -> PyTree:
    def select(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, new, old)


def _zeros(shapes: PyTree, *leading: int) -> PyTree:
    """Zeros of the given shapes behind the `leading` axes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leading + leaf.shape, leaf.dtype), shapes)


def _across(axis: str | None, tree: PyTree) -> PyTree:
    """Sums over the devices."""
    if axis is None:
        return tree
    as_number = jax.tree.map(lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, tree)
    return jax.lax.psum(as_number, axis)
