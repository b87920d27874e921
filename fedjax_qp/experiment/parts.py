"""The names that a configuration gives, and the functions that they stand for."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from fedjax_qp import config as configuration
from fedjax_qp import plugins
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config, Part
from fedjax_qp.data import character_sources, instruction_sources, partitions, sources
from fedjax_qp.models import character_models, language_models, models
from fedjax_qp.registry import ConfigurationError, Registry, unknown_name
from fedjax_qp.settings.values import takes

# The kinds of data, and the models that take each.
FITTING = {sources: models, character_sources: character_models, instruction_sources: language_models}
_REGISTRIES: dict[str, tuple[Registry, ...]] = {
    "data": tuple(FITTING),
    "partition": (partitions,),
    "model": tuple(FITTING.values()),
    "algorithm": (algorithms,),
}


def registries() -> list[Registry]:
    """All that a configuration can name something of."""
    return [registry for kinds in _REGISTRIES.values() for registry in kinds]


def resolve(config: Config) -> Config:
    """Fills in the options of all parts; unknown or ill-typed ones are errors."""
    plugins.load_installed()
    parts = {}
    for key in _REGISTRIES:
        part: Part = getattr(config, key)
        parts[key] = Part(part.name, registry_of(key, part.name).resolve(part.name, part.options))
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
            options = registry_of(key, name).options(name)
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
            annotation = registry_of(head, names[head]).options(names[head])[option].annotation
    return takes(annotation, int) and not takes(annotation, float)


def of_language_model(config: Config) -> bool:
    """Whether the run trains a language model."""
    return registry_of("model", config.model.name) is language_models


def registry_of(key: str, name: str) -> Registry:
    """The registry that has a name."""
    found = [registry for registry in _REGISTRIES[key] if name in registry.names()]
    if not found:
        kind = _REGISTRIES[key][0].kind
        raise unknown_name(kind, name, [name for registry in _REGISTRIES[key] for name in registry.names()])
    return found[0]
