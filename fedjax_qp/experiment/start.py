"""From experiments to their engine and first states."""

from collections.abc import Sequence

import jax

from fedjax_qp.engine import Data, Engine, Layout, Method, Runs, host_copy, make_engine
from fedjax_qp.experiment.assembly import Experiment
from fedjax_qp.experiment.methods import differing_settings
from fedjax_qp.federated import FederatedState, init_state, initial_key
from fedjax_qp.registry import ConfigurationError


def start_engine(experiments: Sequence[Experiment], layout: Layout) -> Engine:
    """One engine for experiments that differ in nothing but what `runs.programs.groups` allows.

    Raises:
      ConfigurationError: an algorithm was put in the place of the configured one, but the experiments differ in its settings.
    """
    first = experiments[0]
    task = first.task
    settings = differing_settings([experiment.config for experiment in experiments])
    return make_engine(
        _method(experiments, list(settings)),
        first.model,
        Data(task.frozen, task.train, task.test, task.personal),
        layout,
        Runs(settings, jax.numpy.stack([jax.random.key(experiment.config.seed) for experiment in experiments])),
        frozen_axes=task.frozen_axes,
        examples_on_host=first.config.engine.data_store == "host",
    )


def _method(experiments: Sequence[Experiment], differing: list[str]) -> Method:
    """The method of all experiments; an algorithm that was put in the place of the configured one is taken as it is."""
    first = experiments[0]
    if all(experiment.algorithm is experiment.method({}) for experiment in experiments):
        return first.method
    if differing or any(experiment.algorithm is not first.algorithm for experiment in experiments):
        raise ConfigurationError(
            f"algorithms were replaced in experiments that differ in {', '.join(differing) or 'their algorithms'}: replace "
            "`method`, a function of the settings, in all of them alike, or run them one by one."
        )
    return lambda settings: first.algorithm


def first_state(experiment: Experiment) -> FederatedState:
    """The state before round 0, on the host."""
    params = jax.jit(experiment.model.init)(initial_key(jax.random.key(experiment.config.seed)))
    return host_copy(init_state(experiment.algorithm, params, len(experiment.work.parts)))
