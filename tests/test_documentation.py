"""README and the documentation: short enough, up to date, and their code works."""

import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
import pytest
import tyro
import yaml
from support.federations import small_algorithm

import fedjax_qp
from fedjax_qp import cli, config
from fedjax_qp.console.arguments import understood
from fedjax_qp.console.listing import listing
from fedjax_qp.contract.federations import run_rounds, small_engine, small_model, worst_difference
from fedjax_qp.experiment import resolve
from fedjax_qp.settings.catalogue import KINDS, entries

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# Less work; and a number of lanes, since measuring them takes longer than that.
FEWER = {"rounds=20,": "rounds=2, engine=fq.Engine(lanes=2),", "seeds=[0, 1, 2]": "seeds=[0, 1]"}


class Block(NamedTuple):
    """A block of code on a page."""

    language: str
    text: str


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["language"] in languages:
            yield Block(found["language"], found["text"])


def pages_with(*languages: str) -> pytest.MarkDecorator:
    pages = [page for page in PAGES if any(blocks(page, *languages))]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@pages_with("python")
def test_python_runs(page, own_registries, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks(page, "python"):
        text = block.text
        for long, short in FEWER.items():
            text = text.replace(long, short)
        code = compile(text, str(page), "exec")
        if "runs/mine" not in text:
            exec(code, names)


def test_readmes_method_with_whole_steps_is_fedavg(own_registries):
    (text,) = (block.text for block in blocks(README, "python") if "half_step" in block.text)
    names: dict = {}
    exec(text, names)
    half = names["half_step"](small_model(), optax.sgd(0.05, 0.9), step_size=1.0)
    state, _ = run_rounds(half, small_engine(half), lanes=3)
    whole = small_algorithm("fedavg-uniform")
    expected, _ = run_rounds(whole, small_engine(whole), lanes=3)
    assert worst_difference(expected.server.params, state.server.params) <= 1e-6


def command_lines(page: Path) -> Iterator[str]:
    for block in blocks(page, "bash"):
        yield from (line for line in block.text.splitlines() if line.startswith("fedjax-qp "))


@pages_with("bash")
def test_commands_are_understood(page, monkeypatch):
    """The command line's own parser takes every line, and configurations and settings in it are valid."""
    seen = []
    commands = {name: recording(name, command, seen) for name, command in cli.COMMANDS.items()}
    for line in command_lines(page):
        arguments = shlex.split(line, comments=True)[1:]
        if arguments == ["--version"]:
            continue
        tyro.extras.subcommand_cli_from_dict(commands, args=understood(arguments, cli.COMMANDS))
        check_settings(*seen.pop())


def recording(name, command, seen):
    """A command of the same signature that only notes what it was called with."""

    def noted(**values):
        seen.append((name, values))
        return 0

    noted.__signature__ = inspect.signature(command)
    noted.__annotations__ = command.__annotations__
    noted.__doc__ = command.__doc__
    return noted


def check_settings(name: str, values: dict) -> None:
    file = values.get("config")
    if name in ("run", "memory") and file is not None and (ROOT / file).is_file():
        config.load(ROOT / file, list(values["overrides"]))
    if name == "list" and not values["plugins"]:
        assert listing(values["what"])


@pages_with("yaml")
def test_yaml_is_a_configuration(page, own_registries, tmp_path):
    for block in blocks(page, "python"):
        if ".register\n" in block.text:  # parts that the page adds
            exec(block.text, {"np": np})
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block.text)
        if "config" in values:
            check_sweep(values, tmp_path)
            continue
        loaded = config.from_dict(values)
        assert resolve(loaded).name == values["name"]


def check_sweep(values: dict, folder: Path) -> None:
    """The command line checks every trial."""
    shutil.copy(ROOT / "configs" / values["config"], folder)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values))
    assert cli.sweep(folder / "sweep.yaml", check=True) == 0


def test_readme_is_one_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(re.sub(r"<[^>]*>|[|`*]|:?--:?", " ", text).split()) <= 900


def test_readme_lists_what_there_is():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        inside = importlib.import_module("inside")
    finally:
        sys.path.pop(0)
    text = README.read_text(encoding="utf-8")
    assert inside.with_table(text) == text, "run `python docs/inside.py`"
    listed = set(re.findall(r"`(\w+)`", inside.table()))
    assert listed == {entry.name for entry in entries() if entry.registry in KINDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    made = {"parts.md", "settings.md"}  # by docs/hooks.py
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        of_site = target.relative_to(ROOT / "docs") if target.is_relative_to(ROOT / "docs") else None
        elsewhere = of_site is not None and (
            (ROOT / of_site).exists() or (ROOT / "notebooks" / f"{target.stem}.py").exists()
        )
        assert target.exists() or target.name in made or elsewhere, link


def test_numbers_of_readme_are_those_of_the_measurements():
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\d\d\.\d\d ± \d+\.\d\d", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert found
    assert [number for number in found if number not in measured] == []


ROOMS = [one.name for one in pkgutil.walk_packages(fedjax_qp.__path__, "fedjax_qp.") if one.ispkg]


@pytest.mark.parametrize("name", ["fedjax_qp", *ROOMS])
def test_public_names_are_documented(name):
    """What a room exports has a docstring, so that the reference shows it."""
    room = importlib.import_module(name)
    assert inspect.getdoc(room)
    undocumented = [
        public
        for public in getattr(room, "__all__", ())
        if (inspect.isroutine(getattr(room, public)) or inspect.isclass(getattr(room, public)))
        and not inspect.getdoc(getattr(room, public))
    ]
    assert undocumented == []
