"""Every setting and every option with values that no honest user gives: refused in one line, or taken exactly as given."""

import dataclasses
import math
from typing import Any

import pytest
from test_config import SMALL

from fedjax_qp import config
from fedjax_qp.experiment import check, registries, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings import catalogue

HOSTILE: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**30, 1e300, 10**5000, True, None),
    *("", "ten", "x" * 10**5, "Größe\n\0\ud800", [], [[]], {}, {"a": {"b": [1]}}, [math.nan], [-(10**30)]),
)
TRACKED = config.to_dict(config.from_dict({**SMALL, "tracking": {"wandb": {}, "mlflow": {}}}))
SETTINGS = [*config.flat(TRACKED), *config.groups(), "tracking.wandb", "tracking.mlflow"]
OPTIONS = [
    (catalogue.KINDS[entry.registry].part, entry.name, option)
    for entry in catalogue.entries()
    for option in entry.options
]


def answer_to(values: dict[str, Any], changes: dict[str, Any]) -> config.Config | None:
    """The resolved configuration, or None where its values are refused; every refusal is one short line."""
    resolved = None
    try:
        changed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
        config.change(changed, changes.items())
        resolved = resolve(config.from_dict(changed))
        check(resolved)  # may find that parts do not fit each other; values have been taken by then
    except ConfigurationError as error:
        assert len(str(error)) <= 500 and "\n" not in str(error), str(error)[:600]
    return resolved


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


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name.partition(".")[0] not in config.PARTS])
def test_settings(setting):
    for value in HOSTILE:
        resolved = answer_to(SMALL, {setting: value})
        assert resolved is None or same(found_in(resolved, setting), value), value


@pytest.mark.parametrize(("part", "name", "option"), OPTIONS)
def test_options(part, name, option):
    for value in HOSTILE:
        resolved = answer_to(SMALL, {part: name, f"{part}.{option}": value})
        assert resolved is None or same(found_in(resolved, f"{part}.{option}"), value), value


def test_the_tables_have_every_setting_and_option():
    own = {name for name in config.every_name() if name.partition(".")[0] not in config.PARTS}
    own |= {f"tracking.wandb.{field.name}" for field in dataclasses.fields(config.Wandb)}
    own |= {f"tracking.mlflow.{field.name}" for field in dataclasses.fields(config.Mlflow)}
    assert own == {name for name in SETTINGS if name.partition(".")[0] not in config.PARTS}
    registered = {
        (name, option) for registry in registries() for name in registry.names() for option in registry.options(name)
    }
    assert {(name, option) for _, name, option in OPTIONS} == registered
