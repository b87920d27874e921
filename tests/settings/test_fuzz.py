"""Every setting and every option with values that no honest user gives: refused in one line, or taken exactly as given."""

import dataclasses
import math
from typing import Any

import pytest
from support.fuzz import OPTIONS, SETTINGS, found_in, same
from support.runs import SMALL

from fedjax_qp import config
from fedjax_qp.experiment import REGISTRIES, check, resolve
from fedjax_qp.registry import ConfigurationError

HOSTILE: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**30, 1e300, 10**5000, True, None),
    *("", "ten", "x" * 10**5, "Größe\n\0\ud800", [], [[]], {}, {"a": {"b": [1]}}, [math.nan], [-(10**30)]),
)


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
    own.remove("plugins")  # code to run: see test_plugins
    own |= {f"tracking.wandb.{field.name}" for field in dataclasses.fields(config.Wandb)}
    own |= {f"tracking.mlflow.{field.name}" for field in dataclasses.fields(config.Mlflow)}
    assert own == {name for name in SETTINGS if name.partition(".")[0] not in config.PARTS}
    registered = {
        (name, option)
        for registry in REGISTRIES.values()
        for name in registry.names()
        for option in registry.options(name)
    }
    assert {(name, option) for _, name, option in OPTIONS} == registered
