"""From the program to devices: vmap on one, shard_map or pmap over several. The only file that knows meshes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from fedjax_qp.engine.chunk import run_chunk
from fedjax_qp.engine.evaluation import PersonalTests, TestSet
from fedjax_qp.federated import Algorithm, FederatedState, Model
from fedjax_qp.plan import Plan

AXIS = "clients"


class Engine(NamedTuple):
    """A compiled simulator. `place_…` puts host arrays where `run` wants them; `run` consumes the state it is given."""

    place_state: Callable[[FederatedState], FederatedState]
    place_plan: Callable[[Plan], Plan]
    run: Callable[[FederatedState, Plan], tuple[FederatedState, dict[str, Array]]]


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
) -> Engine:
    """Compiles nothing yet; the first `run` does, once for the whole run.

    Args:
      train: training examples, arrays [N, ...]; they go to the device once, in their own dtype (uint8 images stay so).
      personal: each client's own test examples, where there are any.
      parallel: "vmap" (one device), "shard_map" or "pmap" (lanes split over `devices`; the number of lanes must be a
        multiple of it).
    """
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    axis = None if parallel == "vmap" else AXIS
    chunk = partial(run_chunk, algorithm, model, axis)
    pmapped = parallel == "pmap"

    def place_plan(plan: Plan) -> Plan:
        by_lane = (plan.lanes, plan.preparations)
        if pmapped:
            by_lane = jax.tree.map(lambda leaf: leaf.reshape(devices, len(leaf) // devices, *leaf.shape[1:]), by_lane)
        lanes, preparations = jax.device_put(by_lane, split)
        common = jax.device_put(plan._replace(lanes=(), preparations=()), everywhere)
        return common._replace(lanes=lanes, preparations=preparations)

    whole, by_lane = PartitionSpec(), PartitionSpec(AXIS)
    if parallel == "vmap":
        program = jax.jit(chunk, donate_argnums=0)
    elif parallel == "shard_map":
        mapped = jax.shard_map(
            chunk,
            mesh=mesh,
            in_specs=(whole,) * 5 + (_for_lanes(by_lane, whole), whole),
            out_specs=whole,
            check_vma=False,
        )
        program = jax.jit(mapped, donate_argnums=0)
    else:
        program = jax.pmap(
            chunk,
            AXIS,
            in_axes=(None,) * 5 + (_for_lanes(0, None), None),
            out_axes=None,
            devices=list(mesh.devices.flat),
        )
    fixed = jax.device_put((frozen, train, test, personal), everywhere)
    key = jax.device_put(jax.random.key(seed), everywhere)

    def run(state: FederatedState, plan: Plan) -> tuple[FederatedState, dict[str, Array]]:
        return program(state, *fixed, plan, key)

    return Engine(partial(jax.device_put, device=everywhere), place_plan, run)


def _for_lanes(lanes: Any, rest: Any) -> Any:
    """A plan-shaped tree: one thing for the lanes, another for all else."""
    return Plan(rest, rest, lanes, lanes, rest, rest)
