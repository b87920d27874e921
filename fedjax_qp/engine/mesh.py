"""From the program to devices: vmap on one, shard_map or pmap over several. The only file that knows meshes.

Lanes are split over the mesh axis `clients`. Where the frozen weights are too big for one device, a second axis `model`
shares them out: each group of lanes then has `model_devices` devices, and the compiler finds from the weights' places how
these divide the work and what they exchange: XLA partitions the second axis, shard_map is manual over the first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, PyTree

from fedjax_qp.engine.chunk import Data, Method, Runs, run_chunk
from fedjax_qp.engine.host_data import HostExamples
from fedjax_qp.engine.layout import Layout
from fedjax_qp.engine.plan import Plan
from fedjax_qp.federated import FederatedState, Model

AXIS = "clients"
"""Name of the mesh axis whose devices share the lanes."""
MODEL_AXIS = "model"
"""Name of the mesh axis whose devices share the frozen weights."""


class Engine(NamedTuple):
    """A compiled simulator of X runs.

    `place_…` puts host arrays where `run` wants them; `run` consumes the state it is given. On the devices a run alone has no
    axis of runs; `place_states`, `states` and `metrics` hide that.
    """

    place_states: Callable[[Sequence[PyTree]], PyTree]  # of each run its state, or a part of it
    place_plan: Callable[[Plan], "PlacedPlan"]
    run: Callable[[FederatedState, "PlacedPlan"], tuple[FederatedState, dict[str, Array]]]
    states: Callable[[FederatedState], list[FederatedState]]  # of each run, on the host; copies
    metrics: Callable[[dict[str, Array]], list[dict[str, np.ndarray]]]  # of each run [R, ...], on the host
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


def make_program(
    method: Method, model: Model, layout: Layout, *, frozen_axes: PyTree = None, examples_on_host: bool = False
) -> Program:
    """Lays the program of a chunk out on devices; see `make_engine`."""
    chunk = partial(run_chunk, method, model)
    _, devices, model_devices, parallel = layout
    sizes = (devices, model_devices) if model_devices > 1 else (devices,)
    names = (AXIS, MODEL_AXIS)[: len(sizes)]
    grid = np.array(jax.devices()[: devices * model_devices]).reshape(sizes)
    mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(sizes))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    chunk = partial(chunk, None if parallel == "vmap" else AXIS)
    whole, by_lane = PartitionSpec(), PartitionSpec(AXIS)
    if parallel == "pmap":
        if model_devices > 1:
            raise ValueError(f"pmap has one axis of devices, so it cannot use model_devices = {model_devices}")
        program = jax.pmap(
            chunk,
            AXIS,
            in_axes=(None, _for_examples(0 if examples_on_host else None, None), _for_lanes(0, None), None),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
        return Program(program, everywhere, split, everywhere)
    if parallel == "shard_map":
        chunk = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(
                whole,
                _for_examples(by_lane if examples_on_host else whole, whole),
                _for_lanes(by_lane, whole),
                whole,
            ),
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
    method: Method,
    model: Model,
    data: Data,
    layout: Layout,
    runs: Runs,
    *,
    frozen_axes: PyTree = None,
    examples_on_host: bool = False,
) -> Engine:
    """The engine of X runs of a method. Compiles nothing yet; the first `run` does, once for the whole run.

    Args:
      method: `(settings of one run) -> Algorithm`; where runs differ in settings, its functions must trace with arrays.
      data: the same for all runs. Training examples go to every device once, in their own dtype (uint8 images stay so).
      layout: with "vmap" one device takes all lanes; "shard_map" and "pmap" split them over `layout.devices`.
      runs: the settings that differ, and every run's key, [X].
      frozen_axes: for each frozen array the axis that is split over `layout.model_devices`, or None for one that each
        device holds; None alone: all of them.
      examples_on_host: leaves the training examples there, and sends each device those of its lanes, plan by plan.
    """
    program = make_program(method, model, layout, frozen_axes=frozen_axes, examples_on_host=examples_on_host)
    everywhere, count = program.everywhere, len(runs.keys)
    alone = count == 1
    frozen = _place(data.frozen, program.frozen)
    runs = jax.tree.map(lambda leaf: leaf[0], runs) if alone else runs
    test, personal, runs = _place((data.test, data.personal, runs), everywhere)
    host = HostExamples(data.train, layout.devices) if examples_on_host else None
    resident = None if host is not None else _place(data.train, everywhere)

    def by_device(tree: PyTree) -> PyTree:
        return jax.tree.map(partial(_with_devices, layout.devices), tree) if layout.parallel == "pmap" else tree

    def place_states(states: Sequence[PyTree]) -> PyTree:
        return _place(states[0] if alone else jax.tree.map(lambda *leaves: np.stack(leaves), *states), everywhere)

    def place_plan(plan: Plan) -> PlacedPlan:
        plan, examples = (plan, resident) if host is None else host.take(plan)
        lanes, preparations = _place(by_device((plan.lanes, plan.preparations)), program.by_lane)
        common = _place(plan._replace(lanes=(), preparations=()), everywhere)
        if host is not None:
            examples = _place(by_device(examples), program.by_lane)
        return PlacedPlan(common._replace(lanes=lanes, preparations=preparations), examples)

    def arguments(state: FederatedState, placed: PlacedPlan) -> tuple:
        return state, Data(frozen, placed.examples, test, personal), placed.plan, runs

    def run(state: FederatedState, placed: PlacedPlan) -> tuple[FederatedState, dict[str, Array]]:
        return program.call(*arguments(state, placed))

    def compiled(state: FederatedState, placed: PlacedPlan) -> Compiled:
        return program.call.lower(*arguments(state, placed)).compile()  # type: ignore[attr-defined]

    return Engine(
        place_states,
        place_plan,
        run,
        states=lambda state: _separate(host_copy(state), count, axis=0),
        metrics=lambda metrics: _separate(jax.device_get(metrics), count, axis=1),
        compiled=compiled,
    )


def host_copy(tree: PyTree) -> PyTree:
    """Copies to numpy. A real copy: on CPU the plain transfer is a view of memory that the next chunk overwrites."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def _separate(tree: PyTree, runs: int, axis: int) -> list[PyTree]:
    """The parts of each run; a run alone has no axis of runs."""
    if runs == 1:
        return [tree]
    return [jax.tree.map(partial(np.take, indices=run, axis=axis), tree) for run in range(runs)]


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


def _for_examples(examples: Any, rest: Any) -> Any:
    """A data-shaped tree: one thing for the training examples, another for all else."""
    return Data(rest, examples, rest, rest)
