"""The five workloads as configurations, and how their exchange folders are made (see `exchange`)."""

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import exchange
import jax
import numpy as np
from jaxtyping import PyTree

from fedjax_qp import config as configuration
from fedjax_qp.data import sources
from fedjax_qp.engine.plan import client_batches, sample_cohort
from fedjax_qp.experiment import Experiment, build, first_state
from fedjax_qp.federated import Params
from fedjax_qp.registry import ConfigurationError

NEVER = 10**6  # rounds between evaluations: nobody evaluates, so that only training is compared


class Benchmark(NamedTuple):
    """One workload."""

    title: str
    rounds: int  # in a block
    trial_rounds: int  # on which the tuned peer chooses its layout
    settings: dict[str, Any]  # of `config.from_dict`


class Sources(NamedTuple):
    """Where data lie that are not in a package."""

    fashion_mnist: str | None
    split: str


def benchmarks(folder: Path, found: Sources) -> dict[str, Benchmark]:
    """All workloads by name.

    Args:
      folder: where the array files of `grey_images` lie.
    """
    cifar10 = {"data": "cifar10", "partition": {"name": "json_file", "path": found.split}}

    def grey(classes: int) -> dict[str, str]:
        return {"name": "arrays", "path": str(folder / f"grey{classes}.npz")}

    return {
        "w1": Benchmark(
            "logistic regression, 784 inputs, 1,000 clients, 10 a round, batch 10, E = 1",
            100,
            20,
            {
                "data": grey(10),
                "partition": {"name": "iid", "clients": 1000},
                "model": {"name": "mlp", "hidden": []},
                "local": {"learning_rate": 0.03, "momentum": 0.0, "epochs": 1, "batch_size": 10},
                "engine": {"rounds_per_chunk": 20},
            },
        ),
        "w2": Benchmark(
            "FEMNIST CNN, 28×28, 62 outputs, 340 clients, 10 a round, batch 20, E = 1",
            5,
            1,
            {
                "data": grey(62),
                "partition": {"name": "iid", "clients": 340},
                "model": "femnist_cnn",
                "local": {"learning_rate": 0.03, "momentum": 0.0, "epochs": 1, "batch_size": 20},
                "engine": {"rounds_per_chunk": 5},
            },
        ),
        "w3": Benchmark(
            "pfl's CIFAR-10 CNN, 1,000 clients × 50 images, 50 a round, batch 10, E = 1",
            3,
            1,
            {
                "data": "cifar10",
                "partition": {"name": "iid", "clients": 1000},
                "model": "simple_cnn",
                "local": {"learning_rate": 0.03, "momentum": 0.0, "epochs": 1, "batch_size": 10},
                "participation": {"cohort": 50},
                "engine": {"rounds_per_chunk": 3, "lanes": 2, "devices": 2},
            },
        ),
        "w4": Benchmark(
            "LeNet, CIFAR-10, FedMut's split β = 0.1, 100 clients, 10 a round, batch 50, E = 5",
            2,
            1,
            {
                **cifar10,
                "model": "lenet",
                "local": {"learning_rate": 0.01, "momentum": 0.9, "epochs": 5, "batch_size": 50},
                "engine": {"rounds_per_chunk": 2},
            },
        ),
        "w5": Benchmark(
            "ResNet-18, the same split, batch 50, at most 3 steps a client",
            1,
            1,
            {
                **cifar10,
                "model": {"name": "resnet18", "normalisation": "batch"},
                "local": {"learning_rate": 0.01, "momentum": 0.9, "epochs": 1, "batch_size": 50, "maximum_steps": 3},
                "engine": {"rounds_per_chunk": 1, "lanes": 2, "devices": 2},
            },
        ),
    }


def configure(name: str, benchmark: Benchmark) -> configuration.Config:
    """A workload's configuration; the last round is beyond the block, so that it is not evaluated either."""
    fixed = {"name": name, "algorithm": "fedavg", "rounds": benchmark.rounds + 1, "evaluation": {"every": NEVER}}
    return configuration.from_dict({**fixed, **benchmark.settings})


def grey_images(folder: Path, classes: int, fashion_mnist: str | None) -> str:
    """Writes 60,000 grey images for `classes` outputs; returns their name.

    Fashion-MNIST where it is found, MNIST-5k tiled fifteen times where it is not. More outputs than labels give the shape
    of FEMNIST, which nobody here has.
    """
    try:
        data, name = sources["fashion_mnist"](folder=fashion_mnist), "Fashion-MNIST"
    except ConfigurationError:
        data, name = sources["mnist5k"](), "MNIST-5k, tiled 15 times"
    times = -(-60_000 // len(data.train.labels))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"grey{classes}.npz",
        train_inputs=np.tile(data.train.inputs, (times, 1, 1, 1)),
        train_labels=np.tile(data.train.labels, times),
        test_inputs=data.test.inputs,
        test_labels=data.test.labels,
        class_names=np.array([str(label) for label in range(classes)]),
    )
    return name


def prepare(name: str, folder: Path, found: Sources, *, rounds: int | None, threads: int) -> Path:
    """Makes a workload's exchange folder."""
    images = "CIFAR-10"
    if name in ("w1", "w2"):
        images = grey_images(folder, {"w1": 10, "w2": 62}[name], found.fashion_mnist)
    benchmark = benchmarks(folder, found)[name]
    benchmark = benchmark._replace(rounds=benchmark.rounds if rounds is None else rounds)
    config = configure(name, benchmark)
    experiment = build(config)
    facts = {
        "workload": name,
        "title": benchmark.title,
        "images": images,
        "model": config.model.name,
        "classes": 62 if name == "w2" else 10,
        "rounds": benchmark.rounds,
        "trial_rounds": min(benchmark.rounds, benchmark.trial_rounds),
        "learning_rate": config.local.learning_rate,
        "momentum": config.local.momentum,
        "batch_size": config.local.batch_size,
        "threads": threads,
        "config": configuration.to_dict(config),
    }
    exchange.write(folder / name, _workload(experiment, facts), config.local.batch_size)
    return folder / name


def _workload(experiment: Experiment, facts: dict[str, Any]) -> exchange.Workload:
    train = experiment.task.train
    return exchange.Workload(
        facts,
        np.asarray(train.inputs),
        np.asarray(train.labels),
        experiment.work.parts,
        [_cohort(experiment, round) for round in range(facts["rounds"])],
        torch_arrays(first_params(experiment)),
    )


def _cohort(experiment: Experiment, round: int) -> list[exchange.Work]:
    cohort = sample_cohort(experiment.work, round)
    works = []
    for client, steps in zip(cohort.clients.tolist(), cohort.steps.tolist(), strict=True):
        padded = client_batches(experiment.work, round, client, steps)
        batches = [batch[batch != exchange.PADDING] for batch in padded]
        works.append(exchange.Work(client, len(experiment.work.parts[client]), batches))
    return works


def first_params(experiment: Experiment) -> Params:
    """The model before round 0."""
    return experiment.algorithm.serve(first_state(experiment).server, ())


def torch_arrays(params: Params) -> dict[str, np.ndarray]:
    """A model's arrays under PyTorch's names and in PyTorch's shapes.

    Kernels: HWIO → OIHW, [inputs, outputs] → [outputs, inputs]; the first dense layer behind a convolution also reads its
    inputs in the order channel, row, column instead of row, column, channel.
    """
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "variance": "running_var"}
    arrays, channels = {}, 1
    for path, value in _named({**_merged(params.trainable, params.statistics)}):
        value = np.asarray(value)
        if value.ndim == 4:
            channels, value = value.shape[3], value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            side = round((len(value) / channels) ** 0.5)
            if channels > 1 and side * side * channels == len(value):
                value = value.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(len(value), -1)
            value, channels = value.T, 1
        arrays[".".join([*path[:-1], names.get(path[-1], path[-1])])] = np.ascontiguousarray(value)
    return arrays


def _merged(first: Any, second: Any) -> dict:
    """Nested dicts put together."""
    merged = dict(first)
    for key, value in dict(second or {}).items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and key in merged else value
    return merged


def _named(tree: PyTree) -> list[tuple[list[str], Any]]:
    """Leaves with their paths, in the order of the layers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [([part.key for part in path], leaf) for path, leaf in leaves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--fashion-mnist")
    parser.add_argument("--split", default="splits/fedmut/cifar10_100_noniidCase5_beta0.1.json")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    found = Sources(arguments.fashion_mnist, arguments.split)
    for name in arguments.names:
        prepare(name, arguments.folder, found, rounds=arguments.rounds, threads=os.cpu_count() or 1)


if __name__ == "__main__":
    main()
