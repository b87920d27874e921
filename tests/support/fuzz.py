"""The settings and options there are, and what became of a value."""

from typing import Any

from fedjax_qp import config
from fedjax_qp.settings import catalogue
from support.runs import SMALL

TRACKED = config.to_dict(config.from_dict({**SMALL, "tracking": {"wandb": {}, "mlflow": {}}}))


SETTINGS = [*config.flat(TRACKED), *config.groups(), "tracking.wandb", "tracking.mlflow"]


OPTIONS = [
    (catalogue.KINDS[entry.registry].part, entry.name, option)
    for entry in catalogue.entries()
    for option in entry.options
]


def same(found: Any, given: Any) -> bool:
    """Lists become tuples and groups get their defaults; nothing else changes."""
    if isinstance(found, dict) and isinstance(given, dict):
        return all(same(found[key], value) for key, value in given.items())
    if isinstance(found, tuple | list) and isinstance(given, tuple | list):
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(found, float) and isinstance(given, int):
        return found == float(given)
    return found == given and isinstance(found, bool) == isinstance(given, bool)


def found_in(resolved: config.Config, key: str) -> Any:
    values: Any = config.to_dict(resolved)
    for name in key.split("."):
        values = values[name]
    return values
