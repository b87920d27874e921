"""From a resolved configuration to the data, model, method and work of a run."""

from typing import Any, NamedTuple

from fedjax_qp.config import Config
from fedjax_qp.data import check_partition, partitions, sources
from fedjax_qp.engine import Method
from fedjax_qp.engine.devices import cores_as_devices
from fedjax_qp.engine.layout import check_lanes, check_layout
from fedjax_qp.engine.plan import Workload
from fedjax_qp.experiment.checks import (
    check_accumulation,
    check_cohort,
    check_dispatch,
    check_plan,
    check_preparation,
    check_sampling,
    check_state,
)
from fedjax_qp.experiment.methods import declared, method
from fedjax_qp.experiment.parts import fitting, kind_of, resolve
from fedjax_qp.federated import Algorithm, Model
from fedjax_qp.models import models
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.streams import Stream, generator
from fedjax_qp.tasks import KINDS, Task


class Experiment(NamedTuple):
    """A run, ready to start."""

    config: Config  # resolved: every option of every part is filled in
    task: Task
    work: Workload
    algorithm: Algorithm
    method: Method  # the same as a function of settings, for runs that share a program and differ in them

    @property
    def model(self) -> Model:
        return self.task.model


def build(config: Config, like: Experiment | None = None) -> Experiment:
    """Checks a configuration in full and builds its data, model and algorithm.

    Args:
      like: an experiment whose data and model are taken where the settings that make them are the same.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    cores_as_devices()
    config = resolve(config)
    check_layout(config)
    task = _build_task(config, check(config), like)
    check_cohort(config, len(task.parts))
    of_settings = method(config, task.model)
    algorithm = of_settings({})
    check_dispatch(task.model, algorithm, len(task.parts), config.participation.cohort)
    check_state(config, task.model, algorithm, len(task.parts))
    work = Workload(
        task.parts,
        config.participation,
        config.local,
        config.seed,
        task.sizes,
        preparation=algorithm.preparation,
        sampling=algorithm.sampling,
    )
    check_plan(config, work)
    check_sampling(config, task, algorithm)
    check_preparation(work)
    check_accumulation(work)
    if task.personal is not None and config.engine.client_store == "host":
        raise ConfigurationError(
            "engine.client_store = 'host' keeps most clients off the device, but this task tests every client there: "
            f"choose 'device'{'' if task.language is not None else ', or partition.test = common'}."
        )
    return Experiment(config, task, work, algorithm, of_settings)


def _build_task(config: Config, algorithm: Algorithm, like: Experiment | None) -> Task:
    """Reads the data, deals it to the clients, and makes what the engine takes."""
    if like is not None and _task_settings(config, algorithm) == _task_settings(like.config, like.algorithm):
        return like.task
    shared = like if like is not None and like.config.data == config.data else None
    dataset: Any = shared.task.dataset if shared is not None else None
    if dataset is None:
        dataset = sources[config.data.name](**config.data.options)
    given = sources.examples(config.data.name)
    kind = KINDS[fitting(config, [dataset.examples] if dataset.examples else given)]
    if shared is None:
        kind.check(dataset)
    numbers = generator(config.seed, Stream.PARTITION)
    parts = partitions[config.partition.name](
        kind.in_classes(dataset), numbers, **partitions.own(config.partition.options)
    )
    check_partition(parts, dataset)
    task = kind.task(config, dataset, parts, algorithm)
    if kind.tunes_adapters:
        return task
    evaluated = ("model", "evaluation", "precision")
    if shared is not None and all(getattr(shared.config, part) == getattr(config, part) for part in evaluated):
        task = task._replace(model=shared.model, test=shared.task.test)  # a model of its own would compile anew
    return task


def _task_settings(config: Config, algorithm: Algorithm) -> tuple:
    """Everything that a task is made from."""
    parts = (config.data, config.partition, config.model, config.text, config.seed, config.precision)
    return *parts, config.evaluation.batch_size, config.engine.model_devices, algorithm.rank_factor


def check(config: Config) -> Algorithm:
    """Checks a resolved configuration as far as that needs neither data nor devices; `build` does the rest.

    Returns:
      The algorithm, on a model whose functions cannot be called.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    check_lanes(config)
    algorithm = declared(config)
    kind_of(config)  # whether the model fits the data
    if algorithm.tunes_adapters and not kind_of(config).tunes_adapters:
        kinds = [name for name, kind in KINDS.items() if kind.tunes_adapters]
        raise ConfigurationError(
            f"algorithm = {config.algorithm.name!r} tunes the LoRA adapters of a language model, but model = "
            f"{config.model.name!r} has none: choose model = {' or '.join(models.names(kinds))} with instruction data, "
            "or another algorithm such as fedavg."
        )
    if config.evaluation.stop_at_target and config.evaluation.target_accuracy is None:
        raise ConfigurationError(
            "evaluation.stop_at_target = true, but there is no target: set evaluation.target_accuracy, above 0 and at most 1."
        )
    clients = config.partition.options.get("clients")
    if clients is not None:
        check_cohort(config, clients)
    if algorithm.sampling is not None and algorithm.sampling.reads_memories and config.engine.rounds_per_chunk != 1:
        raise ConfigurationError(
            f"engine.rounds_per_chunk = {config.engine.rounds_per_chunk}, but algorithm = {config.algorithm.name!r} draws "
            "each cohort by what the clients of the round before sent: choose 1."
        )
    return algorithm
