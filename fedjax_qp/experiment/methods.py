"""From settings to an algorithm and its clients' optimizer; some settings may be arrays inside a program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optax
from jaxtyping import Float

from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config, Local
from fedjax_qp.federated import Algorithm, Model
from fedjax_qp.precision import in_precision
from fedjax_qp.registry import is_zero

TRACED = ("learning_rate", "momentum", "weight_decay", "clip_norm")  # settings of `local` that may be arrays


def method(config: Config, model: Model) -> Callable[[Mapping[str, Any]], Algorithm]:
    """The algorithm of a resolved configuration, as a function of settings that differ from it.

    Settings are named as in overrides: those of `TRACED`, for example "local.learning_rate", and the algorithm's options that
    are floats, for example "algorithm.alpha". Their values may be arrays inside a program. Without any it always gives the
    same object, so that one that was put in its place can be told.
    """

    def of_settings(settings: Mapping[str, Any]) -> Algorithm:
        local, options = dataclasses.asdict(config.local), dict(config.algorithm.options)
        for name, value in settings.items():
            part, _, key = name.partition(".")
            (local if part == "local" else options)[key] = value
        algorithm = algorithms[config.algorithm.name](model, local_optimizer(SimpleNamespace(**local)), **options)
        prepare = algorithm.prepare and in_precision(algorithm.prepare, config.precision)
        return algorithm._replace(step=in_precision(algorithm.step, config.precision), prepare=prepare)

    configured = of_settings({})
    return lambda settings: of_settings(settings) if settings else configured


def declared(config: Config) -> Algorithm:
    """The algorithm of a resolved configuration on a model whose functions cannot be called: for what it declares."""
    return method(config, Model(init=_no_model, loss=_no_model, evaluate=_no_model))({})


def _no_model(*arguments: object) -> None:
    raise AssertionError("a model's functions are not called when an algorithm is built")


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
