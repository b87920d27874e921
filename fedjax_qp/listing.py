"""What a configuration can name: the parts with their options, and the groups of settings besides."""

import inspect
from collections.abc import Sequence

from rich.table import Table

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.data import character_sources, instruction_sources, partitions, sources
from fedjax_qp.models import character_models, language_models, models
from fedjax_qp.registry import Registry, unknown_name

_KINDS: dict[str, Sequence[Registry]] = {
    "algorithms": (algorithms,),
    "data": (sources, character_sources, instruction_sources),
    "partitions": (partitions,),
    "models": (models, character_models, language_models),
}


def listing(what: str) -> Sequence[Table | str]:
    """Tables of parts, or the explanation of one.

    Args:
      what: "all", a kind of parts such as "algorithms", a part's name, or the name of a group of settings such as "local".

    Raises:
      ConfigurationError: nothing has that name; the nearest ones are named.
    """
    if what in ("all", *_KINDS):
        return [_table(registry) for kind in _KINDS if what in ("all", kind) for registry in _KINDS[kind]]
    groups = config.groups()
    if what in groups:
        return [inspect.getsource(groups[what])]  # the source has defaults, ranges and comments
    registries = [registry for some in _KINDS.values() for registry in some]
    found = [_explanation(registry, what) for registry in registries if what in registry.names()]
    if not found:
        names = [name for registry in registries for name in registry.names()]
        raise unknown_name("part", what, [*_KINDS, *groups, *names])
    return found


def _table(registry: Registry) -> Table:
    table = Table("name", "what", "options", title=registry.kind, title_justify="left")
    for name in registry.names():
        first_line = (registry[name].__doc__ or "").strip().split("\n")[0]
        table.add_row(name, first_line, ", ".join(_options(registry, name)))
    return table


def _explanation(registry: Registry, name: str) -> str:
    """What is written on one entry; an algorithm's file opens with its source and deviations."""
    function = registry[name]
    file = inspect.getdoc(inspect.getmodule(function)) if registry.kind == "algorithm" else None
    options = ", ".join(_options(registry, name)) or "none"
    texts = (f"{registry.kind} {name}", file, inspect.getdoc(function), f"Options: {options}")
    return "\n\n".join(text for text in texts if text)


def _options(registry: Registry, name: str) -> list[str]:
    return [
        key if option.default is option.empty else f"{key}={option.default!r}"
        for key, option in registry.options(name).items()
    ]
