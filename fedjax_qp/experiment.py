"""From a configuration to the objects of a run. Everything that can be wrong with a run is found here, before any compute."""

import dataclasses
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Int, PyTree

from fedjax_qp import config as configuration
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config, Local, Part
from fedjax_qp.data import Dataset, check_partition, label_counts, partitions, sources
from fedjax_qp.engine import Engine, cut_test_set, make_engine
from fedjax_qp.federated import Algorithm, Cohort, FederatedState, Model, init_state
from fedjax_qp.models import models
from fedjax_qp.models.classifier import classifier
from fedjax_qp.plan import Workload
from fedjax_qp.registry import ConfigurationError, Registry


class Experiment(NamedTuple):
    """A run, ready to start."""

    config: Config  # resolved: every option of every part is filled in
    dataset: Dataset
    work: Workload
    counts: Int[np.ndarray, "K C"]  # training examples per client and class
    model: Model
    algorithm: Algorithm


_REGISTRIES: dict[str, Registry] = {"data": sources, "partition": partitions, "model": models, "algorithm": algorithms}


def resolve(config: Config) -> Config:
    """Fills in the options of all parts; unknown or ill-typed ones are errors."""
    parts = {}
    for key, registry in _REGISTRIES.items():
        part: Part = getattr(config, key)
        parts[key] = Part(part.name, registry.resolve(part.name, part.options))
    return dataclasses.replace(config, **parts)


def local_optimizer(local: Local) -> optax.GradientTransformation:
    """The clients' optimizer."""
    rules = {
        "sgd": lambda: optax.sgd(local.learning_rate, local.momentum or None),
        "adam": lambda: optax.adam(local.learning_rate),
        "adamw": lambda: optax.adamw(local.learning_rate, weight_decay=local.weight_decay),
    }
    steps: list[optax.GradientTransformation] = []
    if local.clip_norm is not None:
        steps.append(optax.clip_by_global_norm(local.clip_norm))
    if local.weight_decay and local.optimizer != "adamw":
        steps.append(optax.add_decayed_weights(local.weight_decay))
    return optax.chain(*steps, rules[local.optimizer]())


def build(config: Config) -> Experiment:
    """Checks a configuration in full and builds its data, model and algorithm.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    config = resolve(config)
    _check_devices(config)
    algorithm_part, model_part = config.algorithm, config.model
    optimizer = local_optimizer(config.local)
    # Built once without a loss, so that bad hyper-parameters show up before the data is read.
    algorithms[algorithm_part.name](lambda *_: None, optimizer, **algorithm_part.options)
    dataset: Dataset = sources[config.data.name](**config.data.options)
    generator = np.random.default_rng((config.seed, 0))
    parts = partitions[config.partition.name](dataset, generator, **config.partition.options)
    check_partition(parts, dataset)
    if config.participation.cohort > len(parts):
        raise ConfigurationError(
            f"participation.cohort = {config.participation.cohort} is more than the {len(parts)} clients there are: "
            f"choose 1 to {len(parts)}, or more clients in the partition."
        )
    shape = dataset.train.inputs.shape[1:]
    build_net = models[model_part.name](shape, dataset.classes, **model_part.options)
    model = classifier(build_net, mean=dataset.mean, std=dataset.std, classes=dataset.classes)
    algorithm = algorithms[algorithm_part.name](model.loss, optimizer, **algorithm_part.options)
    _check_dispatch(model, algorithm, config.participation.cohort)
    counts = label_counts(parts, np.asarray(dataset.train.labels), dataset.classes)
    work = Workload(parts, config.participation, config.local, config.seed)
    return Experiment(config, dataset, work, counts, model, algorithm)


def start_engine(experiment: Experiment) -> Engine:
    """The engine for an experiment."""
    engine = experiment.config.engine
    return make_engine(
        experiment.algorithm,
        experiment.model,
        frozen=(),
        train=experiment.dataset.train,
        test=cut_test_set(experiment.dataset.test, experiment.config.evaluation.batch_size),
        seed=experiment.config.seed,
        parallel=engine.parallel,
        devices=engine.devices,
    )


def first_state(experiment: Experiment) -> FederatedState:
    """The state before round 0, on the host."""
    key = jax.random.fold_in(jax.random.key(experiment.config.seed), 0)
    params = jax.jit(experiment.model.init)(key)
    return host_copy(init_state(experiment.algorithm, params, len(experiment.work.parts)))


def host_copy(tree: PyTree) -> PyTree:
    """Copies to numpy. A real copy: on CPU the plain transfer is a view of memory that the next chunk overwrites."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def with_lanes(experiment: Experiment, lanes: int) -> Experiment:
    """The same experiment with a fixed number of lanes."""
    engine = dataclasses.replace(experiment.config.engine, lanes=lanes)
    return experiment._replace(config=dataclasses.replace(experiment.config, engine=engine))


def _check_dispatch(model: Model, algorithm: Algorithm, members: int) -> None:
    """Traces the dispatch on shapes alone: limits that depend on the cohort's size show up now, not in round 1."""

    def dispatch(key: jax.Array) -> tuple:
        one = jax.numpy.ones(members)
        return algorithm.dispatch(algorithm.init_server(model.init(key)), Cohort(one, one, one), key)

    jax.eval_shape(dispatch, jax.random.key(0))


def _check_devices(config: Config) -> None:
    engine = config.engine
    available = jax.device_count()
    if engine.devices > available:
        raise ConfigurationError(
            f"engine.devices = {engine.devices}, but {available} {jax.default_backend()} device(s) are visible: choose 1 "
            f"to {available} (host devices: XLA_FLAGS=--xla_force_host_platform_device_count={engine.devices})."
        )
    if engine.parallel == "vmap" and engine.devices > 1:
        raise ConfigurationError(
            f"engine.devices = {engine.devices} with engine.parallel = 'vmap', which uses one device: choose shard_map "
            "or pmap."
        )
    if engine.lanes != "auto" and engine.lanes % engine.devices:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} must be a multiple of engine.devices = {engine.devices}: every device takes "
            "the same number of lanes."
        )
    most = -(-config.participation.cohort // engine.devices) * engine.devices
    if engine.lanes != "auto" and engine.lanes > most:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} is more than the {config.participation.cohort} clients of a round: choose 1 "
            f"to {most}."
        )


def environment() -> dict[str, object]:
    """Versions, device and commit, for the run folder."""
    packages = ("fedjax_qp", "jax", "jaxlib", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy")
    return {
        "packages": {name: version(name) for name in packages},
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
