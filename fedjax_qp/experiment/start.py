"""From an experiment to its engine and first state."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from fedjax_qp.engine import Data, Devices, Engine, Runs, make_engine, make_shared_engine
from fedjax_qp.engine.devices import settle
from fedjax_qp.experiment.assembly import Experiment
from fedjax_qp.experiment.methods import differing_settings, method
from fedjax_qp.federated import FederatedState, init_state, initial_key


def start_engine(experiment: Experiment) -> Engine:
    """The engine for an experiment."""
    engine = experiment.config.engine
    return make_engine(
        experiment.algorithm,
        experiment.model,
        frozen=experiment.task.frozen,
        train=experiment.task.train,
        test=experiment.task.test,
        personal=experiment.task.personal,
        seed=experiment.config.seed,
        parallel=engine.parallel,
        devices=engine.lane_devices,
        model_devices=engine.model_devices,
        frozen_axes=experiment.task.frozen_axes,
        data_store=engine.data_store,
    )


def start_shared_engine(experiments: Sequence[Experiment]) -> Engine:
    """One engine for several experiments that differ in nothing but what `runs.together.groups` allows, or for one alone."""
    if len(experiments) == 1:
        return start_engine(experiments[0])
    first, engine = experiments[0], experiments[0].config.engine
    task = first.task
    return make_shared_engine(
        method(first.config, first.model),
        first.model,
        Data(task.frozen, task.train, task.test, task.personal),
        Devices(engine.parallel, engine.lane_devices, engine.model_devices, task.frozen_axes, engine.data_store),
        Runs(
            differing_settings([experiment.config for experiment in experiments]),
            jax.numpy.stack([jax.random.key(experiment.config.seed) for experiment in experiments]),
        ),
    )


def join_states(states: Sequence[FederatedState]) -> FederatedState:
    """The state that such an engine takes: with a leading axis of runs, which a run alone does not have."""
    return states[0] if len(states) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def first_state(experiment: Experiment) -> FederatedState:
    """The state before round 0, on the host."""
    params = jax.jit(experiment.model.init)(initial_key(jax.random.key(experiment.config.seed)))
    return host_copy(init_state(experiment.algorithm, params, len(experiment.work.parts)))


def host_copy(tree: PyTree) -> PyTree:
    """Copies to numpy. A real copy: on CPU the plain transfer is a view of memory that the next chunk overwrites."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def with_layout(experiment: Experiment, lanes: int, devices: int) -> Experiment:
    """The same experiment with fixed numbers of lanes and devices."""
    config = experiment.config
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, lanes=lanes, devices=devices))
    return experiment._replace(config=settle(config))
