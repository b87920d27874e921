"""The names that a configuration gives, and the functions that they stand for."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_qp import config as configuration
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config, Part
from fedjax_qp.data import partitions, sources
from fedjax_qp.models import models
from fedjax_qp.registry import ConfigurationError, Registry
from fedjax_qp.settings import plugins
from fedjax_qp.settings.values import takes
from fedjax_qp.tasks import KINDS, Kind

REGISTRIES: dict[str, Registry] = {"data": sources, "partition": partitions, "model": models, "algorithm": algorithms}
"""Of each part of a configuration, what it can name."""


def resolve(config: Config) -> Config:
    """Fills in the options of all parts; unknown or ill-typed ones are errors."""
    plugins.load_installed()
    parts = {}
    for key in REGISTRIES:
        part: Part = getattr(config, key)
        parts[key] = Part(part.name, REGISTRIES[key].resolve(part.name, part.options))
    resolved = dataclasses.replace(config, **parts)
    test = resolved.partition.options["test"]
    if test != "common" and KINDS[sources.examples(resolved.data.name)[0]].clients_have_tests:
        raise ConfigurationError(
            f"partition.test = {test!r}, but clients of instruction data have tests of their own already: choose common, and "
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
    for key in REGISTRIES:
        found[key] = {}
        with contextlib.suppress(ConfigurationError):
            name = values.get(key, {}).get("name", "")
            options = REGISTRIES[key].options(name)
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
    if head in REGISTRIES:
        with contextlib.suppress(ConfigurationError, KeyError):  # found when the trial is checked
            annotation = REGISTRIES[head].options(names[head])[option].annotation
    return takes(annotation, int) and not takes(annotation, float)


def kind_of(config: Config) -> Kind:
    """What the examples of a run mean for it, as far as that is known before they are read.

    Raises:
      ConfigurationError: the model takes none of the kinds of examples that the source gives.
    """
    return KINDS[fitting(config, sources.examples(config.data.name))]


def fitting(config: Config, given: Sequence[str]) -> str:
    """The first of the kinds of examples that the source gives which the model takes.

    Raises:
      ConfigurationError: there is none; the models that do take one are named.
    """
    taken = models.examples(config.model.name)
    for kind in given:
        if kind in taken:
            return kind
    raise ConfigurationError(
        f"model = {config.model.name!r} does not fit data = {config.data.name!r}: it takes {' or '.join(taken)}, not "
        f"{' or '.join(given)}: choose one of {', '.join(models.names(given))}."
    )
