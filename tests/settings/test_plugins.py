"""Plug-ins: a file beside a configuration is known everywhere, and no other code is ever run."""

import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.runs import write
from support.sweeps import write_sweep

import fedjax_qp as fq
from fedjax_qp import cli, config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.instruments.subject import open_run
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import restore, resume, run
from fedjax_qp.settings import plugins
from fedjax_qp.sweeps import run as running
from fedjax_qp.sweeps import space
from fedjax_qp.sweeps.worker import execute

METHOD = '''
"""Mine."""

from pathlib import Path

import optax

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import averaging

Path(__file__).with_name("executed").touch()


@algorithms.register
def slow_average(model, optimizer, *, step_size: float = 0.5):
    """FedAvg whose server goes only part of the way."""
    return averaging(model, optimizer, optax.sgd(step_size), weighting="uniform")
'''
QUIET = Console(quiet=True)
pytestmark = pytest.mark.usefixtures("own_registries")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where it is kept which plug-ins the user has named."""
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))


def written(folder: Path, **changes) -> Path:
    (folder / "mine.py").write_text(METHOD)
    values = {"plugins": ["mine.py"], "algorithm": {"name": "slow_average", "step_size": 1.0}, "rounds": 2}
    return write(folder, **{**values, **changes})


def forget() -> None:
    """As in a new process."""
    plugins._loaded.clear()
    algorithms._functions.pop("slow_average", None)


def left(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as status:
        cli.main(list(arguments))
    return status.value.code


def test_a_file_beside_the_configuration_is_run_and_copied(tmp_path, monkeypatch, capsys):
    """A whole server step is FedAvg's; half of one is not."""
    monkeypatch.chdir("/")  # paths are the configuration's, not this folder's
    file = written(tmp_path)
    assert left("run", str(file)) == 0
    plain = run(
        config.load(file, ["plugins=[]", "algorithm=fedavg", "algorithm.weighting=uniform", "name=plain"]), QUIET
    )
    mine = tmp_path / "runs" / "small-seed0"
    losses = [[line["test_loss"] for line in RunFolder(folder).records()] for folder in (mine, plain.folder)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert (mine / "plugins" / "mine.py").read_text() == METHOD
    assert left("list", "slow_average", "--plugins", str(tmp_path / "mine.py")) == 0
    assert "goes only part of the way" in capsys.readouterr().out


def test_resume_and_inspect_know_it_and_check_its_content(tmp_path):
    file = written(tmp_path)
    folder = run(_named(file), QUIET).folder
    for use in (lambda: resume(folder, ["rounds=4"], QUIET), lambda: restore(folder), lambda: open_run(folder)):
        forget()
        use()
    (tmp_path / "mine.py").write_text(METHOD + "\n# changed\n")
    forget()
    with pytest.raises(ConfigurationError, match=r"mine.py, which you have not run here yet.*--plugins .*mine.py"):
        resume(folder, ["rounds=6"], QUIET)
    plugins.load([str(tmp_path / "mine.py")])
    with pytest.raises(ConfigurationError, match=r"plug-in mine.py differs from what its plug-ins .* hold now"):
        resume(folder, ["rounds=6"], QUIET)
    forget()
    assert left("resume", str(folder), "--plugins", str(folder / "plugins" / "mine.py"), "rounds=6") == 0
    assert len(RunFolder(folder).records()) == 6


def _named(file: Path, *overrides: str) -> config.Config:
    """What the command line does with a configuration."""
    loaded = config.load(file, list(overrides))
    plugins.load(loaded.plugins)
    return loaded


def test_a_strangers_run_folder_runs_none_of_its_code(tmp_path, monkeypatch):
    """Neither the copy, nor a file that its configuration names, wherever that lies; reports need no code at all."""
    file = written(tmp_path)
    folder = run(_named(file), QUIET).folder
    forget()
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "another user's"))
    (tmp_path / "executed").unlink()
    stranger = folder / "plugins" / "mine.py"
    for name in (tmp_path / "mine.py", stranger, Path("plugins/mine.py"), Path("antigravity")):
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(
            text.replace(str(config.load(folder / "config.yaml").plugins[0]), str(name))
        )
        for use in (lambda: resume(folder, ["rounds=4"], QUIET), lambda: restore(folder), lambda: open_run(folder)):
            with pytest.raises(ConfigurationError, match=r"needs the plug-in .*: if you trust its code, name it"):
                use()
    assert "antigravity" not in sys.modules
    assert left("report", str(folder)) == 0
    assert left("compare", str(folder), "--output", str(tmp_path / "comparison")) == 0
    assert len(fq.load(folder).frame()) == 2
    assert not (tmp_path / "executed").exists() and not (stranger.parent / "executed").exists()
    assert left("resume", str(folder), "--plugins", str(stranger), "rounds=4") == 0


def test_a_missing_file_is_one_line_with_the_remedy(tmp_path):
    file = written(tmp_path)
    folder = run(_named(file), QUIET).folder
    (tmp_path / "mine.py").rename(tmp_path / "moved.py")
    forget()
    with pytest.raises(ConfigurationError, match=r"which is not there.*--plugins mine.py \(the run began with"):
        resume(folder, ["rounds=4"], QUIET)


def test_workers_of_a_sweep_run_it(tmp_path, monkeypatch):
    """In this process, which forgets it before each task."""
    (tmp_path / "mine.py").write_text(METHOD)
    file = write_sweep(
        tmp_path,
        {"plugins": ["mine.py"], "algorithm": "slow_average", "rounds": 2},
        space={"algorithm.step_size": [0.5, 1.0]},
    )

    def run_tasks(client, tasks, retries, watch, failed) -> None:
        for task in tasks:
            forget()
            execute(task)

    monkeypatch.setattr(running, "connect", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(running, "workers_of", lambda client: 1)
    monkeypatch.setattr(running, "run_tasks", run_tasks)
    outcome = running.run_sweep(space.load(file), QUIET)
    assert list(outcome.trials["status"]) == ["complete", "complete"]
    with pytest.raises(ConfigurationError, match="plugins are the same in all trials"):
        space.load(write_sweep(tmp_path, space={"plugins": [["a.py"], ["b.py"]]}))


@pytest.mark.slow  # 25 s: processes of an embedded cluster
def test_workers_in_other_processes_run_it(tmp_path):
    (tmp_path / "mine.py").write_text(METHOD)
    base = {"plugins": ["mine.py"], "algorithm": "slow_average", "rounds": 2}
    file = write_sweep(tmp_path, base, space={"algorithm.step_size": [0.5, 1.0]}, workers=1)
    done = subprocess.run([sys.executable, "-m", "fedjax_qp", "sweep", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_library_takes_plugins(tmp_path):
    (tmp_path / "mine.py").write_text(METHOD)
    runs = fq.run(
        plugins=[tmp_path / "mine.py"],
        data=fq.digits(),
        partition=fq.iid(clients=10),
        model=fq.mlp(hidden=[8]),
        methods={"Slow": {"name": "slow_average", "step_size": 0.5}},
        rounds=1,
        engine=fq.Engine(lanes=2),
        progress=False,
    )
    assert len(runs.frame()) == 1
    assert fq.slow_average(step_size=1.0).options == {"step_size": 1.0}


def test_installed_packages_register_theirs_and_a_broken_one_is_warned_of(tmp_path, monkeypatch, capsys):
    (tmp_path / "installed_method.py").write_text(METHOD)
    (tmp_path / "broken_method.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [importlib.metadata.EntryPoint(name, f"{name}_method", "fedjax_qp") for name in ("broken", "installed")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == "fedjax_qp" else [])
    plugins.load_installed.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"plug-in broken \(broken_method\) fails: ZeroDivisionError: division by zero"
        ):
            plugins.load_installed()
        assert left("list", "slow_average") == 0
    finally:
        plugins.load_installed.cache_clear()
        sys.modules.pop("installed_method", None)
    said = capsys.readouterr()
    assert said.err == "" and "goes only part of the way" in said.out  # it is said once


def test_a_file_that_has_changed_replaces_what_it_registered(tmp_path):
    file = tmp_path / "mine.py"
    for default in ("0.5", "0.25"):
        file.write_text(METHOD.replace("0.5", default))
        plugins.load([str(file)])
        assert algorithms.options("slow_average")["step_size"].default == float(default)


def test_a_notebooks_cell_may_run_twice_but_takes_nobody_elses_name():
    for _ in range(2):
        exec(METHOD.replace("Path(__file__)", "#"), {"__name__": "__main__"})
    with pytest.raises(
        ConfigurationError, match="'slow_average' is registered already, by __main__: give yours another"
    ):
        exec(METHOD.replace("Path(__file__)", "#"), {"__name__": "elsewhere"})
    with pytest.raises(ConfigurationError, match="'fedavg' is registered already, by fedjax_qp.algorithms.averaging"):
        exec(METHOD.replace("Path(__file__)", "#").replace("slow_average", "fedavg"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file .*mine.py"),
        ("x = 1\n1 / 0\n", r"mine.py fails: ZeroDivisionError: division by zero \(line 2\)"),
        ("def f(:\n", r"mine.py fails: SyntaxError: .* \(line 1\)"),
        (METHOD.replace("slow_average", "fedavg"), "mine.py fails: algorithm 'fedavg' is registered already"),
        ("import no_such_package\n", "mine.py fails: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_what_fails_is_one_line(tmp_path, capsys, text, message):
    file = written(tmp_path)
    (tmp_path / "mine.py").unlink() if text is None else (tmp_path / "mine.py").write_text(text)
    assert left("run", str(file)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(ConfigurationError, match=message):
        plugins.load([str(tmp_path / "mine.py")])


def test_names_that_cannot_be(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("")
    with pytest.raises(ConfigurationError, match="have the same file name, under which a run keeps a copy"):
        plugins.load([str(tmp_path / folder / "mine.py") for folder in ("a", "b")])
    with pytest.raises(ConfigurationError, match=r"there is no module no\.such: install its package"):
        plugins.load(["no.such"])
    with pytest.raises(ConfigurationError, match="plugins = 'mine.py' must be a list"):
        config.from_dict({**config.to_dict(config.load(written(tmp_path))), "plugins": "mine.py"})
