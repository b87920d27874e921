"""From a configuration to the objects of a run. Everything that can be wrong with a run is found here, before any compute."""

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float, PyTree

from fedjax_qp import config as configuration
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config, Local, Part, to_dict
from fedjax_qp.data import character_sources, check_dataset, check_partition, instruction_sources, partitions, sources
from fedjax_qp.engine import Data, Devices, Engine, Runs, make_engine, make_shared_engine
from fedjax_qp.engine.devices import check_devices, check_lanes, settle, share_out_cores
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
from fedjax_qp.federated import Algorithm, FederatedState, Model, init_state, initial_key
from fedjax_qp.models import character_models, language_models, models
from fedjax_qp.precision import in_precision
from fedjax_qp.registry import ConfigurationError, Registry, is_zero, unknown_name
from fedjax_qp.settings.values import takes
from fedjax_qp.streams import Stream, generator
from fedjax_qp.tasks import Task, classification_task, instruction_task


class Experiment(NamedTuple):
    """A run, ready to start."""

    config: Config  # resolved: every option of every part is filled in
    task: Task
    work: Workload
    algorithm: Algorithm

    @property
    def model(self) -> Model:
        return self.task.model


# The kinds of data, and the models that take each.
_FITTING = {sources: models, character_sources: character_models, instruction_sources: language_models}
_REGISTRIES: dict[str, tuple[Registry, ...]] = {
    "data": tuple(_FITTING),
    "partition": (partitions,),
    "model": tuple(_FITTING.values()),
    "algorithm": (algorithms,),
}


def registries() -> list[Registry]:
    """All that a configuration can name something of."""
    return [registry for kinds in _REGISTRIES.values() for registry in kinds]


def resolve(config: Config) -> Config:
    """Fills in the options of all parts; unknown or ill-typed ones are errors."""
    parts = {}
    for key in _REGISTRIES:
        part: Part = getattr(config, key)
        parts[key] = Part(part.name, _registry(key, part.name).resolve(part.name, part.options))
    resolved = dataclasses.replace(config, **parts)
    kind = resolved.partition.options["test"]
    if kind != "common" and resolved.data.name in instruction_sources.names():
        raise ConfigurationError(
            f"partition.test = {kind!r}, but clients of instruction data have tests of their own already: choose common, and "
            "text.test_records for their number."
        )
    return resolved


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a configuration's settings, nested as `config.to_dict` nests them; settings without one are left out.

    Args:
      values: the configuration. Only the names of its parts matter; one that no longer exists has no defaults.
    """
    nothing = Part("")
    found = dataclasses.asdict(Config(name="any", data=nothing, partition=nothing, model=nothing, algorithm=nothing))
    del found["name"], found["seed"]  # what tells runs apart
    for key in _REGISTRIES:
        found[key] = {}
        with contextlib.suppress(ConfigurationError):
            name = values.get(key, {}).get("name", "")
            options = _registry(key, name).options(name)
            found[key] = {option: p.default for option, p in options.items() if p.default is not p.empty}
    return found


def is_whole_number(setting: str, names: Mapping[str, str]) -> bool:
    """Whether a setting's type has whole numbers and no others; False for one that does not exist.

    Args:
      setting: its dotted name.
      names: those of the parts.
    """
    head, _, option = setting.partition(".")
    annotation = configuration.annotation(setting)
    if head in _REGISTRIES:
        with contextlib.suppress(ConfigurationError, KeyError):  # found when the trial is checked
            annotation = _registry(head, names[head]).options(names[head])[option].annotation
    return takes(annotation, int) and not takes(annotation, float)


def of_language_model(config: Config) -> bool:
    """Whether the run trains a language model."""
    return _registry("model", config.model.name) is language_models


def _registry(key: str, name: str) -> Registry:
    """The registry that has a name."""
    found = [registry for registry in _REGISTRIES[key] if name in registry.names()]
    if not found:
        kind = _REGISTRIES[key][0].kind
        raise unknown_name(kind, name, [name for registry in _REGISTRIES[key] for name in registry.names()])
    return found[0]


TRACED = ("learning_rate", "momentum", "weight_decay", "clip_norm")  # settings of `local` that may be arrays


def method(config: Config, model: Model) -> Callable[[Mapping[str, Any]], Algorithm]:
    """The algorithm of a resolved configuration, as a function of settings that differ from it.

    Settings are named as in overrides: those of `TRACED`, for example "local.learning_rate", and the algorithm's options that
    are floats, for example "algorithm.alpha". Their values may be arrays inside a program.
    """

    def of_settings(settings: Mapping[str, Any]) -> Algorithm:
        local, options = dataclasses.asdict(config.local), dict(config.algorithm.options)
        for name, value in settings.items():
            part, _, key = name.partition(".")
            (local if part == "local" else options)[key] = value
        algorithm = algorithms[config.algorithm.name](model, local_optimizer(SimpleNamespace(**local)), **options)
        prepare = algorithm.prepare and in_precision(algorithm.prepare, config.precision)
        return algorithm._replace(step=in_precision(algorithm.step, config.precision), prepare=prepare)

    return of_settings


def local_optimizer(local: Local | SimpleNamespace) -> optax.GradientTransformation:
    """The clients' optimizer.

    With `local.accumulate` = a it moves once in a batches, by their mean gradient; a batch counts the same however many
    examples or tokens it holds. The count starts anew with each round (and each preparation), so the last batches of a
    client's round are lost where its steps are no multiple of a.
    """
    rules = {
        "sgd": lambda: optax.sgd(local.learning_rate, None if is_zero(local.momentum) else local.momentum),
        "adam": lambda: optax.adam(local.learning_rate),
        "adamw": lambda: optax.adamw(local.learning_rate, weight_decay=local.weight_decay),
    }
    steps: list[optax.GradientTransformation] = []
    if local.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(local.clip_norm))
    if not is_zero(local.weight_decay) and local.optimizer != "adamw":
        steps.append(optax.add_decayed_weights(local.weight_decay))
    optimizer = optax.chain(*steps, rules[local.optimizer]())
    if local.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, every_k_schedule=local.accumulate).gradient_transformation()


def build(config: Config, like: Experiment | None = None) -> Experiment:
    """Checks a configuration in full and builds its data, model and algorithm.

    Args:
      like: an experiment whose data and model are taken where the settings that make them are the same.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    share_out_cores()
    config = settle(resolve(config))
    check_devices(config)
    check(config)
    task = _build_task(config, like)
    check_cohort(config, len(task.parts))
    algorithm = method(config, task.model)({})
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
    return Experiment(config, task, work, algorithm)


def _build_task(config: Config, like: Experiment | None) -> Task:
    """Reads the data, deals it to the clients, and makes what the engine takes."""
    if like is not None and _task_settings(config) == _task_settings(like.config):
        return like.task
    kind = _registry("data", config.data.name)
    fitting = _FITTING[kind]
    shared = like if like is not None and like.config.data == config.data else None
    dataset: Any = shared.task.dataset if shared is not None else None
    if dataset is None:
        dataset = kind[config.data.name](**config.data.options)
        if kind is not instruction_sources:
            check_dataset(dataset)
    numbers = generator(config.seed, Stream.PARTITION)
    parts = partitions[config.partition.name](dataset, numbers, **partitions.own(config.partition.options))
    check_partition(parts, dataset)
    if fitting is language_models:
        task = instruction_task(config, dataset, parts, expansion=config.algorithm.options.get("expansion", 1))
        return task._replace(dataset=dataset)
    task = classification_task(config, dataset, parts, fitting)
    evaluated = ("model", "evaluation", "precision")
    if shared is not None and all(getattr(shared.config, part) == getattr(config, part) for part in evaluated):
        task = task._replace(model=shared.model, test=shared.task.test)  # a model of its own would compile anew
    return task


def _task_settings(config: Config) -> tuple:
    """Everything that a task is made from."""
    expansion = config.algorithm.options.get("expansion", 1)
    parts = (config.data, config.partition, config.model, config.text, config.seed, config.precision)
    return *parts, config.evaluation.batch_size, config.engine.model_devices, expansion


def check(config: Config) -> Algorithm:
    """Checks a resolved configuration as far as that needs neither data nor devices; `build` does the rest.

    Returns:
      The algorithm, on a model whose functions cannot be called.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    check_lanes(config)
    algorithm = method(config, Model(init=_no_model, loss=_no_model, evaluate=_no_model))({})
    fitting = _FITTING[_registry("data", config.data.name)]
    if _registry("model", config.model.name) is not fitting:
        raise ConfigurationError(
            f"model = {config.model.name!r} does not fit data = {config.data.name!r}: choose one of "
            f"{', '.join(fitting.names())}."
        )
    if algorithm.tunes_adapters and fitting is not language_models:
        raise ConfigurationError(
            f"algorithm = {config.algorithm.name!r} tunes the LoRA adapters of a language model, but model = "
            f"{config.model.name!r} has none: choose model = {' or '.join(language_models.names())} with instruction data, "
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


def advice(experiment: Experiment) -> list[str]:
    """What a user should know of settings that work but hardly are what was meant."""
    config, local, algorithm = experiment.config, experiment.config.local, experiment.algorithm
    found = []
    if algorithm.plain_sgd and local.optimizer == "sgd" and local.momentum > 0:
        found.append(
            f"local.momentum = {local.momentum:g}, but algorithm = {config.algorithm.name!r} is made for plain SGD and may "
            "diverge: set local.momentum=0."
        )
    usual = defaults(to_dict(config))
    if local.optimizer != "sgd" and local.momentum != usual["local"]["momentum"]:
        found.append(f"local.momentum = {local.momentum:g} has no effect: optimizer {local.optimizer} has none.")
    if (
        config.participation.straggler_work != usual["participation"]["straggler_work"]
        and not config.participation.stragglers
    ):
        found.append(
            f"participation.straggler_work = {config.participation.straggler_work:g} has no effect without "
            "participation.stragglers."
        )
    if experiment.task.language is None:
        found += [
            f"text.{name} = {value} has no effect: data = {config.data.name!r} has no instructions."
            for name, value in dataclasses.asdict(config.text).items()
            if value != usual["text"][name]
        ]
    if experiment.task.personal is None and _serves_clients(experiment):
        found.append(
            f"algorithm = {config.algorithm.name!r} makes a model for each client, but only the server's is tested: set "
            "partition.test=matched (or own), and the records hold personal accuracies."
        )
    share = config.partition.options["test_share"]
    if config.partition.options["test"] != "own" and share != usual["partition"]["test_share"]:
        found.append(f"partition.test_share = {share:g} has no effect without partition.test=own.")
    for option in algorithm.unused:
        if (value := config.algorithm.options[option]) != usual["algorithm"][option]:
            found.append(
                f"algorithm.{option} = {value} has no effect beside the other options of {config.algorithm.name}."
            )
    return found


def _serves_clients(experiment: Experiment) -> bool:
    """Whether the model that a client is evaluated with depends on the client."""

    def served(key: jax.Array) -> Any:
        params, clients = experiment.model.init(key), len(experiment.task.parts)
        server, memory = experiment.algorithm.init_server(params, clients), experiment.algorithm.init_client(params)
        memories = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * 2), memory)
        return jax.vmap(experiment.algorithm.serve, in_axes=(None, 0), out_axes=None, axis_size=2)(server, memories)

    try:
        jax.eval_shape(served, jax.random.key(0))
    except ValueError:  # the model has an axis of clients
        return True
    return False


def _no_model(*arguments: object) -> None:
    raise AssertionError("a model's functions are not called when an algorithm is built")


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
    """One engine for several experiments that differ in nothing but what `together.groups` allows, or for one alone."""
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


def traced_settings(config: Config) -> dict[str, float]:
    """The settings of a resolved configuration that may be arrays in a program; see `method`."""
    local = {f"local.{name}": getattr(config.local, name) for name in TRACED}
    options = {f"algorithm.{name}": value for name, value in config.algorithm.options.items()}
    return {name: value for name, value in (local | options).items() if isinstance(value, float)}


def differing_settings(configs: Sequence[Config]) -> dict[str, Float[np.ndarray, "X"]]:
    """Of the settings that may be arrays, those that are not the same in all configurations, with their values [X]."""
    settings = [traced_settings(config) for config in configs]
    columns = {name: np.array([row[name] for row in settings], np.float32) for name in settings[0]}
    return {name: values for name, values in columns.items() if len(set(values.tolist())) > 1}


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


def environment() -> dict[str, object]:
    """Versions, device and commit, for the run folder."""
    packages = ("fedjax_qp", "jax", "jaxlib", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy")
    optional = [name for name in ("transformers", "tokenizers") if find_spec(name) is not None]
    return {
        "packages": {name: version(name) for name in (*packages, *optional)},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, marked when it has local changes."""
    here = Path(configuration.__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
