"""From the program to devices: vmap on one, shard_map or pmap over several. The only file that knows meshes.

Lanes are split over the mesh axis `clients`. Where the frozen weights are too big for one device, a second axis `model`
shares them out: each group of lanes then has `model_devices` devices, and the compiler finds from the weights' places how
these divide the work and what they exchange: XLA partitions the second axis, shard_map is manual over the first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, PyTree

from fedjax_qp.engine.chunk import Method, Runs, run_chunk, run_chunks
from fedjax_qp.engine.evaluation import PersonalTests, TestSet
from fedjax_qp.engine.host_data import HostExamples
from fedjax_qp.engine.plan import Plan
from fedjax_qp.federated import Algorithm, FederatedState, Model

AXIS = "clients"
"""Name of the mesh axis whose devices share the lanes."""
MODEL_AXIS = "model"
"""Name of the mesh axis whose devices share the frozen weights."""


class Engine(NamedTuple):
    """A compiled simulator. `place_…` puts host arrays where `run` wants them; `run` consumes the state it is given."""

    place_state: Callable[[FederatedState], FederatedState]
    place_plan: Callable[[Plan], "PlacedPlan"]
    run: Callable[[FederatedState, "PlacedPlan"], tuple[FederatedState, dict[str, Array]]]
    compiled: Callable[[FederatedState, "PlacedPlan"], Compiled]  # what `run` would run; compiles it without running it


class PlacedPlan(NamedTuple):
    """A plan on the devices, with the training examples that it points into."""

    plan: Plan
    examples: PyTree


def bytes_needed(compiled: Compiled) -> int:
    """Bytes that a program takes on each device, its arguments included."""
    found = compiled.memory_analysis()
    assert found is not None, "the compiler knows what its programs take"
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )


class Program(NamedTuple):
    """The program of a chunk, not yet compiled, and where it wants its arguments."""

    call: Callable[..., tuple[FederatedState, dict[str, Array]]]  # the arguments of `chunk.run_chunk` from `state` on
    everywhere: NamedSharding
    by_lane: NamedSharding
    frozen: PyTree  # shardings, a prefix of the frozen tree


class Data(NamedTuple):
    """What stays the same over all rounds; see `make_engine`."""

    frozen: PyTree
    train: PyTree
    test: TestSet
    personal: PersonalTests | None = None


class Devices(NamedTuple):
    """How the work is laid out; see `make_engine`."""

    parallel: str = "vmap"
    devices: int = 1
    model_devices: int = 1
    frozen_axes: PyTree = None
    data_store: str = "device"


def make_program(algorithm: Algorithm, model: Model, layout: Devices) -> Program:
    """Lays the program of a chunk out on devices."""
    return _program(partial(run_chunk, algorithm, model), layout)


def _program(chunk: Callable, layout: Devices) -> Program:
    parallel, devices, model_devices, frozen_axes, data_store = layout
    sizes = (devices, model_devices) if model_devices > 1 else (devices,)
    names = (AXIS, MODEL_AXIS)[: len(sizes)]
    grid = np.array(jax.devices()[: devices * model_devices]).reshape(sizes)
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(sizes))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    chunk = partial(chunk, None if parallel == "vmap" else AXIS)
    whole, by_lane = PartitionSpec(), PartitionSpec(AXIS)
    on_host = data_store == "host"  # the examples then come by lane, as the plan does
    if parallel == "pmap":
        if model_devices > 1:
            raise ValueError(f"pmap has one axis of devices, so it cannot use model_devices = {model_devices}")
        program = jax.pmap(
            chunk,
            AXIS,
            in_axes=(None, None, 0 if on_host else None, None, None, _for_lanes(0, None), None),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
        return Program(program, everywhere, split, everywhere)
    if parallel == "shard_map":
        chunk = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(whole, whole, by_lane if on_host else whole, whole, whole, _for_lanes(by_lane, whole), whole),
            out_specs=whole,
            axis_names={AXIS},
            check_vma=False,
        )
    # With a model axis the compiler would choose where the new state lies, and the next chunk would be another program.
    program = jax.jit(chunk, donate_argnums=0, out_shardings=everywhere if model_devices > 1 else None)

    def of_weights(axis: int | None) -> NamedSharding:
        return everywhere if axis is None else NamedSharding(mesh, PartitionSpec(*[None] * axis, MODEL_AXIS))

    shared_out = model_devices > 1 and frozen_axes is not None
    frozen = jax.tree.map(of_weights, frozen_axes, is_leaf=lambda axis: axis is None) if shared_out else everywhere
    return Program(program, everywhere, split, frozen)


def make_engine(
    algorithm: Algorithm,
    model: Model,
    *,
    frozen: PyTree,
    train: PyTree,
    test: TestSet,
    personal: PersonalTests | None = None,
    seed: int,
    parallel: str = "vmap",
    devices: int = 1,
    model_devices: int = 1,
    frozen_axes: PyTree = None,
    data_store: str = "device",
) -> Engine:
    """Compiles nothing yet; the first `run` does, once for the whole run.

    Args:
      train: training examples, arrays [N, ...]; they go to every device once, in their own dtype (uint8 images stay so).
      personal: each client's own test examples, where there are any.
      parallel: "vmap" (one device for all lanes), "shard_map" or "pmap" (lanes split over `devices`; the number of lanes
        must be a multiple of it).
      model_devices: devices that share the frozen weights of each group of lanes; not with pmap. All in all
        `devices` · `model_devices` are used.
      frozen_axes: for each frozen array the axis that is split over `model_devices`, or None for one that each device
        holds; None alone: all of them.
      data_store: "host" leaves the training examples there, and sends each device those of its lanes, plan by plan.
    """
    layout = Devices(parallel, devices, model_devices, frozen_axes, data_store)
    program = make_program(algorithm, model, layout)
    return _engine(program, Data(frozen, train, test, personal), jax.random.key(seed), layout)


def make_shared_engine(method: Method, model: Model, data: Data, layout: Devices, runs: Runs) -> Engine:
    """One engine for several runs of a method: states have a leading axis [X], plans are those of `plan_together`.

    Args:
      method: `(settings of one run) -> Algorithm`; its functions must trace with settings that are arrays.
      data: the same for all runs.
      runs: the settings that differ, and every run's key, `jax.random.key(seed)`.
    """
    return _engine(_program(partial(run_chunks, method, model), layout), data, runs, layout)


def _engine(program: Program, data: Data, last: PyTree, layout: Devices) -> Engine:
    """Args: last: the program's last argument."""
    everywhere = program.everywhere
    frozen = _place(data.frozen, program.frozen)
    test, personal, last = _place((data.test, data.personal, last), everywhere)
    host = HostExamples(data.train, layout.devices) if layout.data_store == "host" else None
    resident = None if host is not None else _place(data.train, everywhere)

    def by_device(tree: PyTree) -> PyTree:
        return jax.tree.map(partial(_with_devices, layout.devices), tree) if layout.parallel == "pmap" else tree

    def place_plan(plan: Plan) -> PlacedPlan:
        plan, examples = (plan, resident) if host is None else host.take(plan)
        lanes, preparations = _place(by_device((plan.lanes, plan.preparations)), program.by_lane)
        common = _place(plan._replace(lanes=(), preparations=()), everywhere)
        if host is not None:
            examples = _place(by_device(examples), program.by_lane)
        return PlacedPlan(common._replace(lanes=lanes, preparations=preparations), examples)

    def arguments(state: FederatedState, placed: PlacedPlan) -> tuple:
        return state, frozen, placed.examples, test, personal, placed.plan, last

    def run(state: FederatedState, placed: PlacedPlan) -> tuple[FederatedState, dict[str, Array]]:
        return program.call(*arguments(state, placed))

    def compiled(state: FederatedState, placed: PlacedPlan) -> Compiled:
        return program.call.lower(*arguments(state, placed)).compile()  # type: ignore[attr-defined]

    return Engine(lambda state: _place(state, everywhere), place_plan, run, compiled)


def _place(tree: PyTree, where: PyTree) -> PyTree:
    """Puts host arrays on the mesh; `where` may be a prefix of the tree.

    Where the mesh has devices of other processes, each process puts its own part: all have the same arrays, and
    `jax.device_put` would send them around to compare.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    def put(sharding: NamedSharding, leaf: Any) -> Array:
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(sharding, jax.random.key_data(leaf)))
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(lambda sharding, part: jax.tree.map(partial(put, sharding), part), where, tree)


def _with_devices(devices: int, leaf: np.ndarray) -> np.ndarray:
    """[L, ...] → [devices, L / devices, ...]"""
    return leaf.reshape(devices, len(leaf) // devices, *leaf.shape[1:])


def _for_lanes(lanes: Any, rest: Any) -> Any:
    """A plan-shaped tree: one thing for the lanes, another for all else."""
    return Plan(rest, rest, lanes, lanes, rest, rest)
