"""Presets, the first configuration of one's own, and settings that are built in Python."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from support.runs import REPOSITORY

from fedjax_qp import config
from fedjax_qp.cli import main
from fedjax_qp.config import Config, Local, Mlflow, Tracking, Wandb
from fedjax_qp.experiment import check, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings import presets
from fedjax_qp.sweeps import space

INCLUDED = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
    "force-include"
]


def test_a_preset_is_the_file_of_its_name():
    assert config.load("@mnist5k") == config.load(REPOSITORY / "configs" / "mnist5k.yaml")
    assert config.load("@mnist5k", ["rounds=3"]).rounds == 3


def test_a_sweep_finds_its_base_beside_it():
    assert space.load(Path("@sweep_mnist_5k")).config == str(REPOSITORY / "configs" / "mnist5k.yaml")


def test_an_unknown_preset_is_an_error_that_names_the_nearest():
    with pytest.raises(ConfigurationError, match="unknown preset '@mnist': did you mean @mnist5k"):
        config.load("@mnist")


def test_a_preset_without_its_at_is_meant_where_no_file_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="unknown configuration file 'mnist5k': did you mean @mnist5k"):
        config.load("mnist5k")


@pytest.mark.parametrize("source", INCLUDED)
def test_what_a_wheel_carries_names_no_path_of_ours(source):
    """They run as they stand: no part of theirs reads a file that a user would have to bring."""
    assert INCLUDED[source] == source.replace("configs/", "fedjax_qp/presets/")
    values = config.read_mapping(REPOSITORY / source)
    parts = [values[part] for part in config.PARTS if isinstance(values.get(part), dict)]
    assert not {"path", "files", "test_file", "folder"} & {option for part in parts for option in part}
    if "config" in values:
        assert f"configs/{values['config']}" in INCLUDED
    else:
        check(resolve(config.from_dict(values)))


def test_new_writes_a_configuration_that_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["new", "mine"])
    assert ended.value.code == 0
    made = config.load("mine.yaml")
    check(resolve(made))
    assert (made.name, made.algorithm.name, made.engine.lanes) == ("mine", "fedqp", "auto")
    assert (tmp_path / "mine.yaml").read_text().count("#") > 8
    with pytest.raises(SystemExit):
        main(["new", "mine"])
    assert "mine.yaml is there already" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="a name consists of"):
        presets.write_first("../mine")


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (lambda: Local(learning_rate=-1), {"local": {"learning_rate": -1}}),
        (lambda: Local(lr=0.1), {"local": {"lr": 0.1}}),  # pyright: ignore[reportCallIssue]
        (lambda: Wandb(mode="quick"), {"tracking": {"wandb": {"mode": "quick"}}}),  # pyright: ignore[reportArgumentType]
    ],
)
def test_groups_built_in_python_have_the_errors_of_yaml(build, values):
    parts = dict.fromkeys(config.PARTS, "any")
    with pytest.raises(ConfigurationError) as read:
        config.from_dict({"name": "any", **parts, **values})
    with pytest.raises(ConfigurationError) as built:
        build()
    assert str(built.value) == str(read.value)


def test_groups_built_in_python_are_those_of_yaml():
    values = {"name": "any", **dict.fromkeys(config.PARTS, "any"), "tracking": {"mlflow": {"experiment": "mine"}}}
    read: Config = config.from_dict(values | {"local": {"epochs": 3}})
    assert read.local == Local(epochs=3) == dataclasses.replace(Local(), epochs=3)
    assert read.tracking == Tracking(mlflow=Mlflow(experiment="mine"))
