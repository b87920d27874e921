"""How much memory a run of a language model takes on each device, before there are weights, data or devices for it.

The program of a chunk is compiled on shapes alone, for the mesh of the configuration's `engine` section, on host devices. Of
the model's folder only config.json is read. What the arguments take is exact for any device; what the program needs besides
is the CPU compiler's, which keeps other intermediate results than that of a GPU, so it is an estimate.
"""

import dataclasses
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from rich.table import Table

from fedjax_qp.config import Config
from fedjax_qp.data.text.sequences import Sequences
from fedjax_qp.engine import Data, Layout, PersonalTests, Program, Runs, TestSet, make_program
from fedjax_qp.engine.layout import check_layout, most_lanes
from fedjax_qp.engine.plan import Plan, Workload, plan_chunk
from fedjax_qp.experiment import declared, method, resolve
from fedjax_qp.federated import Algorithm, FederatedState, Model
from fedjax_qp.models import models
from fedjax_qp.models.language import gguf, lora
from fedjax_qp.models.language.llama import LlamaConfig, abstract_weights, split_axes
from fedjax_qp.models.language.model import language_model
from fedjax_qp.models.language.pretrained_config import read_config
from fedjax_qp.registry import ConfigurationError

MOST_SEQUENCES = 10**8  # of all clients together; their numbers are laid out on this machine


class Memory(NamedTuple):
    """Bytes per device, by purpose."""

    frozen: int
    clients: int  # all memories
    server: int
    batches: int  # training and test sequences, the plan, the key
    outputs: int  # metrics; the new state takes the place of the old one
    temporaries: int
    trainable_entries: int  # of one client, before any mask
    per_client: int  # what one more client adds to the arguments
    lanes: int  # on one device
    argument_bytes: int  # by the compiler's count, for comparison
    seconds: float  # of lowering and compiling

    @property
    def total(self) -> int:
        return self.frozen + self.clients + self.server + self.batches + self.outputs + self.temporaries


class _Arguments(NamedTuple):
    """Of a chunk's program, in its order; shapes with their places."""

    state: FederatedState
    data: Data
    plan: Plan
    runs: Runs


def assumed_layout(config: Config) -> Layout:
    """The most lanes that the settings allow, and one device where none are named: those of this machine do not matter."""
    return most_lanes(config.engine, config.participation.cohort)


def measure(config: Config, *, clients: int, sequences_per_client: int) -> Memory:
    """Compiles a run's program on shapes.

    Args:
      config: of a run with a language model; pmap is laid out as shard_map, which takes the same memory.
      clients: K, the federation's clients.
      sequences_per_client: packed training sequences of each client; they count as on the device, also where
        engine.data_store is host. Test sequences are `text.test_records` of each.

    Raises:
      ConfigurationError: no language model, more devices than are visible, or a number out of range.
    """
    if clients < 1 or sequences_per_client < 1 or clients * sequences_per_client > MOST_SEQUENCES:
        raise ConfigurationError(
            f"--clients = {clients} and --sequences-per-client = {sequences_per_client} must be at least 1 each, and their "
            f"product at most {MOST_SEQUENCES:,}: choose other numbers."
        )
    config = resolve(config)
    folder = _folder(config)
    layout = assumed_layout(config)
    engine = dataclasses.replace(config.engine, devices=layout.devices, parallel=layout.parallel)
    check_layout(dataclasses.replace(config, engine=engine))
    if config.participation.cohort > clients:
        raise ConfigurationError(
            f"participation.cohort = {config.participation.cohort} is more than the {clients} clients assumed: choose a "
            "smaller cohort, or a larger --clients."
        )
    base = read_config(folder)
    model = _model(config, base)
    of_settings = method(config, model)
    layout = layout._replace(parallel="vmap" if layout.parallel == "vmap" else "shard_map")
    program = make_program(of_settings, model, layout, frozen_axes=split_axes(base, layout.model_devices))
    arguments = _arguments(config, base, model, of_settings({}), program, layout.lanes, clients, sequences_per_client)
    started = time.perf_counter()
    found = program.call.lower(*arguments).compile().memory_analysis()  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    data = arguments.data
    batches = (data.train, data.test, data.personal, arguments.plan, arguments.runs)
    one_client = (arguments.state.clients, data.train, data.personal)
    return Memory(
        frozen=_on_device(data.frozen),
        clients=_on_device(arguments.state.clients),
        server=_on_device((arguments.state.round, arguments.state.server)),
        batches=_on_device(batches),
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        trainable_entries=int(lora.count(jax.eval_shape(model.init, jax.random.key(0)).trainable)),
        per_client=_on_device(one_client) // clients,
        lanes=layout.lanes // layout.devices,
        argument_bytes=found.argument_size_in_bytes,
        seconds=seconds,
    )


def memory_table(config: Config, memory: Memory) -> Table:
    """The table for the terminal."""
    layout = assumed_layout(config)
    title = (
        f"{config.name}: bytes on each of {layout.devices * layout.model_devices} devices ({layout.parallel}, "
        f"{layout.devices} × {layout.model_devices}), {memory.lanes} lane(s) on each group"
    )
    table = Table("what", "bytes", "GiB", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "frozen weights": memory.frozen,
        "client memories": memory.clients,
        "server state": memory.server,
        "batches and other arguments": memory.batches,
        "metrics": memory.outputs,
        "temporaries (CPU compiler, an estimate)": memory.temporaries,
        "total": memory.total,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", f"{size / 2**30:.3f}")
    return table


def _folder(config: Config) -> Path:
    """The model's folder."""
    models_there = models.names(["instructions"])
    if config.model.name not in models_there:
        raise ConfigurationError(
            f"model = {config.model.name!r}: memory is counted for language models only; choose one of "
            f"{', '.join(models_there)}."
        )
    return gguf.smollm2() if config.model.name == "smollm2" else Path(os.path.expanduser(config.model.options["path"]))


def _model(config: Config, base: LlamaConfig) -> Model:
    options, factor = config.model.options, declared(config).rank_factor
    return language_model(
        base,
        rank=factor * options["rank"],
        alpha=factor * options["alpha"],
        dropout=options["dropout"],
        targets=options["targets"],
        rematerialise=options["rematerialise"],
    )


def _arguments(
    config: Config,
    base: LlamaConfig,
    model: Model,
    algorithm: Algorithm,
    program: Program,
    lanes: int,
    clients: int,
    sequences: int,
) -> _Arguments:
    here = partial(_placed, program.everywhere)
    params = jax.eval_shape(model.init, jax.random.key(0))
    memory = jax.eval_shape(algorithm.init_client, params)
    memories = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((clients, *leaf.shape), leaf.dtype), memory)
    round_number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    server = jax.eval_shape(lambda params: algorithm.init_server(params, clients), params)
    state = FederatedState(round_number, server, memories)
    weights = abstract_weights(base, config.model.options["dtype"])
    in_place = program.frozen
    if not isinstance(in_place, dict):
        in_place = jax.tree.map(lambda _: in_place, weights)
    members = [np.arange(client * sequences, (client + 1) * sequences) for client in range(clients)]
    work = Workload(members, config.participation, config.local, config.seed, preparation=algorithm.preparation)
    plan = plan_chunk(
        [work], 0, 1, capacity=config.engine.rounds_per_chunk, lanes=lanes, evaluate_every=1, last_round=config.rounds
    )
    by_lane = partial(_placed, program.by_lane)
    batch, tests = config.evaluation.batch_size, config.text.test_records
    own = min(batch, tests)
    length = max(2, min(config.text.cut_off, base.maximum_positions))  # as in a run, unless a record is longer
    return _Arguments(
        state=here(state),
        data=Data(
            frozen=jax.tree.map(lambda leaf, where: _placed(where, leaf), weights, in_place),
            train=here(_sequences(clients * sequences, length)),
            test=here(_test_set(-(-clients * tests // batch), batch, length)),
            personal=here(PersonalTests(*_test_set(clients, -(-tests // own), own, length))),
        ),
        plan=here(plan)._replace(lanes=by_lane(plan.lanes), preparations=by_lane(plan.preparations)),
        runs=Runs({}, here(jax.eval_shape(lambda: jax.random.key(0)))),
    )


def _sequences(*shape: int) -> Sequences:
    number, flag = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool))
    return Sequences(number, number, number, flag)  # type: ignore[arg-type]


def _test_set(*shape: int) -> TestSet:
    mask: Any = jax.ShapeDtypeStruct(shape[:-1], jnp.bool)
    return TestSet(_sequences(*shape), mask)


def _placed(where: Any, tree: Any) -> Any:
    """Shapes and types of a tree, with their place."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=where), tree)


def _on_device(tree: PyTree) -> int:
    """Bytes that placed shapes take on one device."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        assert leaf.sharding is not None
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
