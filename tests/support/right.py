"""What of hostile settings that were taken must show in the experiment, computed anew from the configuration."""

from typing import Any

import jax
import numpy as np
import yaml

from fedjax_qp import config
from fedjax_qp.engine.plan import client_steps, sample_cohort
from fedjax_qp.experiment import Experiment, resolve
from fedjax_qp.settings import strict
from support.fuzz import found_in, same

RECORDS = (6, 9, 7, 8)  # of each client


def check_taken(resolved: config.Config, changes: dict[str, Any]) -> None:
    """The settings are those that were given, and stay so when they are saved."""
    for key, value in changes.items():
        if not (key in config.PARTS and isinstance(value, str)):
            assert taken(found_in(resolved, key), value), f"{key} is {found_in(resolved, key)!r:.80}"
    text = yaml.safe_dump(config.to_dict(resolved), sort_keys=False)
    assert resolve(config.from_dict(strict.load_yaml(text, "saved"))) == resolved, (
        "another configuration when read again"
    )


def taken(found: Any, value: Any) -> bool:
    """A number may also be written as text, as YAML does with 1e-3."""
    if isinstance(value, str) and isinstance(found, int | float) and not isinstance(found, bool):
        return float(value) == found
    return same(found, value)


def check_use(experiment: Experiment) -> None:
    """What of the settings shows in the experiment, computed anew from the configuration."""
    settings, task, work = experiment.config, experiment.task, experiment.work
    assert (work.local, work.participation, work.seed) == (settings.local, settings.participation, settings.seed)
    assert np.float32(settings.local.momentum) < 1 and np.float32(settings.local.learning_rate) > 0
    for name in ("beta1", "beta2", "margin"):
        assert np.float32(settings.algorithm.options.get(name, 0)) < 1, f"{name} is 1 in float32"
    assert np.float32(settings.model.options.get("dropout", 0)) < 1, "dropout is 1 in float32"
    cohort = (
        sample_cohort(work._replace(memories=None), settings.rounds - 1) if not reads_memories(experiment) else None
    )
    if cohort is not None:
        expected = [client_steps(len(work.parts[client]), settings.local) for client in cohort.clients]
        assert len(cohort.clients) == settings.participation.cohort
        assert (cohort.steps >= 0).all() and (cohort.steps <= expected).all()
        if not (settings.participation.dropout or settings.participation.stragglers):
            assert cohort.steps.tolist() == expected
    assert task.test.mask.shape[1] <= settings.evaluation.batch_size
    options = settings.partition.options
    if "clients" in options:
        assert len(task.parts) == options["clients"]
    if task.language is None and options["test"] != "own":
        assert min(map(len, task.parts)) >= options.get("minimum", 1)
    (check_language if task.language is not None else check_images)(experiment)


def reads_memories(experiment: Experiment) -> bool:
    sampling = experiment.algorithm.sampling
    return sampling is not None and sampling.reads_memories


def check_images(experiment: Experiment) -> None:
    settings, task = experiment.config, experiment.task
    if settings.model.name == "mlp":
        shapes = [
            leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(experiment.model.init, jax.random.key(0)).trainable)
        ]
        sizes = [np.prod(task.train.inputs.shape[1:]), *settings.model.options["hidden"], task.counts.shape[1]]
        assert sorted(shape for shape in shapes if len(shape) == 2) == sorted(zip(sizes, sizes[1:], strict=False))
    if settings.partition.options["test"] == "own":
        share = settings.partition.options["test_share"]
        for size, mask in zip(task.sizes, task.personal.mask, strict=True):
            total = size + mask.sum()
            assert mask.sum() == min(max(round(share * total), 1), total - 1)


def check_language(experiment: Experiment) -> None:
    settings, task, text = experiment.config, experiment.task, experiment.config.text
    model, expansion = settings.model.options, settings.algorithm.options.get("expansion", 1)
    assert (task.language.rank, task.language.alpha) == (expansion * model["rank"], expansion * model["alpha"])
    assert task.language.targets == model["targets"]
    assert str(task.frozen["embed"].dtype) == model["dtype"]
    assert task.train.tokens.shape[1] <= text.cut_off
    ours = str(settings.data.options.get("files")).endswith("client_*.jsonl")
    if ours and settings.partition.name == "natural" and text.longer == "cut":
        limit = settings.data.options["limit"]
        sizes = [size if limit is None else min(size, limit) for size in RECORDS]
        kept = [size - text.test_records for size in sizes if size >= settings.partition.options["minimum"]]
        assert task.sizes == [min(size, text.train_records or size) for size in kept]
    if settings.algorithm.name == "perfit":
        preparation = experiment.algorithm.preparation
        assert preparation is None or preparation.every == settings.algorithm.options["search_every"]
