"""Whole sweeps with real training: resumed, stopped early, and killed at their worst moments."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from support.sweeps import opened, record_run, sweep_of, write_sweep

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps import run as running
from fedjax_qp.sweeps import schedule
from fedjax_qp.sweeps.run import run_sweep
from fedjax_qp.sweeps.trials import read_ending, stop_trial
from fedjax_qp.sweeps.worker import Task, execute

PATIENCE = 500  # seconds: the machine may be slow, a hanging test must still end


@pytest.fixture
def here(monkeypatch) -> list[Task]:
    """Executes tasks in this process, without Dask; returns those that were executed."""
    executed: list[Task] = []

    def run_tasks(client, tasks, retries, watch) -> None:
        for task in tasks:
            executed.append(task)
            execute(task)
            watch()

    monkeypatch.setattr(running, "connect", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(running, "workers_of", lambda client: 1)
    monkeypatch.setattr(running, "run_tasks", run_tasks)
    return executed


def quiet() -> Console:
    return Console(quiet=True)


def rounds(folder: Path) -> list[int]:
    return [line["round"] for line in RunFolder(folder).records()]


def started_after(run_folder: Path) -> set[str]:
    """The rounds that were already finished each time the run was begun or continued."""
    return {file.name.rpartition(".after")[2] for file in RunFolder(run_folder).tensorboard.iterdir()}


def stamps(run_folder: Path) -> dict[str, int]:
    return {name: (run_folder / name).stat().st_mtime_ns for name in ("records.jsonl", "outcome.json", "config.yaml")}


def test_a_sweep_and_what_is_added_to_it(here, tmp_path):
    space = {"local.learning_rate": [0.02, 0.1]}
    first = run_sweep(sweep_of(tmp_path, space=space, seeds=[0, 1], rank={"last": 2}), quiet())
    assert [len(task.runs) for task in here] == [4]  # one program for all
    assert all(row.status == "complete" and row.rounds == (4, 4) for row in first.rows)
    before = {folder.name: stamps(folder) for folder in (first.folder / "runs").iterdir()}
    grown = sweep_of(tmp_path, space={"local.learning_rate": [0.02, 0.1, 1e-6]}, seeds=[0, 1], rank={"last": 2})
    second = run_sweep(grown, quiet())
    assert [run.name for run in here[-1].runs] == ["trial002-seed0", "trial002-seed1"] and len(here) == 2
    assert before == {name: stamps(first.folder / "runs" / name) for name in before}
    assert second.rows[-1].label == "learning_rate=1e-06"  # it does not learn
    assert {file.name for file in second.folder.iterdir()} >= {
        "results.parquet",
        "results.csv",
        "summary.md",
        "curves.png",
    }
    assert len(pd.read_parquet(second.folder / "results.parquet")) == 3 * 2 * 4
    run_sweep(grown, quiet())
    assert len(here) == 2  # nothing was left to do


@pytest.mark.slow
def test_hopeless_trials_are_stopped_with_all_seeds(here, tmp_path):
    sweep = sweep_of(
        tmp_path,
        {"rounds": 10},
        space={"local.learning_rate": [0.05, 0.1, 1e-7]},
        seeds=[0, 1],
        rank={"last": 1},
        early_stopping={"after": 4, "least_trials": 2},
        runs_per_task=2,
    )
    outcome = run_sweep(sweep, quiet())
    by_number = {row.trial.number: row for row in outcome.rows}
    assert [by_number[number].status for number in range(3)] == ["complete", "complete", "stopped"]
    assert all(4 <= done <= 6 for done in by_number[2].rounds)  # judged at the end of a chunk of two rounds
    assert "is worse than the median" in by_number[2].reasons[0]
    assert [len(task.runs) for task in here] == [2, 2, 2]


def test_optuna_goes_on_with_the_results_it_has(here, tmp_path):
    settings = {
        "search": "optuna",
        "batch": 2,
        "space": {"local.learning_rate": {"low": 1e-4, "high": 0.5, "log": True}},
        "rank": {"last": 1},
    }
    whole = run_sweep(sweep_of(tmp_path / "whole", {"rounds": 2}, trials=4, **settings), quiet())
    assert [len(task.runs) for task in here] == [2, 2]
    run_sweep(sweep_of(tmp_path / "parts", {"rounds": 2}, trials=2, **settings), quiet())
    parts = run_sweep(sweep_of(tmp_path / "parts", {"rounds": 2}, trials=4, **settings), quiet())
    assert [len(task.runs) for task in here] == [2, 2, 2, 2]
    tried = [(outcome.folder / "trials.jsonl").read_text() for outcome in (whole, parts)]
    assert tried[0] == tried[1] and tried[0].count("\n") == 4


def test_a_run_that_diverges_ends_alone(here, tmp_path):
    sweep = sweep_of(tmp_path, space={"local.learning_rate": [0.05, 1e30]}, rank={"last": 1})
    outcome = run_sweep(sweep, quiet())
    assert [(row.status, row.rounds) for row in outcome.rows] == [("complete", (4,)), ("diverged", (0,))]
    assert run_sweep(sweep, quiet()).rows == outcome.rows and len(here) == 1  # it is not tried again


def test_given_up_before_its_worker_died(tmp_path):
    """A run of a trial that was already given up gets its outcome without another round."""
    sweep = sweep_of(tmp_path, early_stopping={})
    store = opened(sweep)
    folder = record_run(store, store.trials[0], 0, [0.1, 0.1], None)
    stop_trial(store.folder, "trial000", "hopeless")
    [task] = running.tasks_of(store, running.assignments(store, running.base_values(sweep), store.trials), 1)
    execute(task)
    ending = read_ending(folder)
    assert ending is not None and (ending.status, ending.reason, ending.rounds) == ("stopped", "hopeless", 2)


def test_slices_keep_the_seeds_of_a_trial_together(tmp_path):
    store = opened(sweep_of(tmp_path, space={"local.learning_rate": [0.1, 0.2, 0.3]}, seeds=[0, 1]))
    runs = running.assignments(store, running.base_values(store.sweep), store.trials)
    sizes = {workers: [len(task.runs) for task in running.tasks_of(store, runs, workers)] for workers in (1, 2, 3, 6)}
    assert sizes == {1: [6], 2: [2, 2, 2], 3: [2, 2, 2], 6: [1] * 6}


def test_workers_leave_the_end_of_the_terminal_to_the_sweep(monkeypatch):
    names = ("SIGINT", "SIGHUP")
    before = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in names}
    try:
        schedule.Setup([{}]).setup(SimpleNamespace(name="0"))  # pyright: ignore[reportArgumentType]
        assert [signal.getsignal(getattr(signal, name)) for name in names] == [signal.SIG_IGN] * 2
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_gpus_that_are_hidden_count_for_nothing(monkeypatch):
    for visible, expected in (("-1", ()), ("", ()), ("2,-1,3", ("2",)), ("0,1", ("0", "1"))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert schedule.machine("").gpus == expected


def test_shares_of_a_machine():
    cpu, gpus = schedule.Machine(16, ()), schedule.Machine(16, ("4", "5"))
    assert [schedule.default_workers(one) for one in (cpu, gpus, schedule.Machine(1, ()))] == [8, 2, 1]
    assert schedule.worker_environments(cpu, 4) == [{"PJRT_NPROC": "4"}] * 4
    shared = schedule.worker_environments(gpus, 4)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shared] == ["4", "5", "4", "5"]
    assert {one["XLA_PYTHON_CLIENT_MEM_FRACTION"] for one in shared} == {"0.375"}


def test_no_cluster_at_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "_CONNECT_SECONDS", 0.2)
    with pytest.raises(ConfigurationError, match="tcp://127.0.0.1:1.*does not answer"):
        run_sweep(sweep_of(tmp_path, cluster="tcp://127.0.0.1:1"), quiet())


# --- killed -----------------------------------------------------------------------------------------------------------

LONG = {"rounds": 60}
KILLED = {"space": {"local.learning_rate": [0.02, 0.05]}, "runs_per_task": 1, "workers": 1, "rank": {"last": 1}}
FIRST, SECOND = "trial000-seed0", "trial001-seed0"


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to the moment of the kill"
        assert process is None or process.poll() is None, "the sweep ended too early"
        time.sleep(0.01)


def in_the_middle_of_the_second_run(folder: Path) -> bool:
    """It has finished some rounds, and its first checkpoint is complete."""
    run = folder / "runs" / SECOND
    saved = [file for file in run.glob("checkpoints/*") if file.name.isdigit()]
    return bool(saved) and 4 <= RunFolder(run).records_file.read_bytes().count(b"\n") < LONG["rounds"] - 10


def worker_of(folder: Path, run: str) -> int:
    """The process that executes a run, from the task's log."""
    [log] = (folder / "logs").glob(f"*{run}.log")
    return int(log.read_text().partition("process ")[2].split()[0])


def assert_nothing_lost(folder: Path, finished_before: dict[str, int]) -> None:
    assert stamps(folder / "runs" / FIRST) == finished_before
    for name in (FIRST, SECOND):
        assert rounds(folder / "runs" / name) == list(range(1, LONG["rounds"] + 1))
        ending = json.loads((folder / "runs" / name / "outcome.json").read_text())
        assert ending == {"status": "complete", "reason": "finished", "rounds": LONG["rounds"]}
    assert started_after(folder / "runs" / FIRST) == {"0"}
    [continued] = started_after(folder / "runs" / SECOND) - {"0"}
    assert 2 <= int(continued) < LONG["rounds"]  # from a checkpoint, not from the beginning


@pytest.mark.filterwarnings("default")  # Dask's own
@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path):
    sweep, killed = sweep_of(tmp_path, LONG, **KILLED), []
    folder = sweep.sweep_folder

    def kill() -> None:
        wait_for(lambda: in_the_middle_of_the_second_run(folder))
        killed.append(stamps(folder / "runs" / FIRST))
        os.kill(worker_of(folder, SECOND), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = run_sweep(sweep, quiet())
    killer.join()
    assert [row.status for row in outcome.rows] == ["complete", "complete"]
    assert_nothing_lost(folder, killed[0])


def test_a_killed_sweep_loses_nothing(here, tmp_path):
    file = write_sweep(tmp_path, LONG, **KILLED)
    sweep = sweep_of(tmp_path, LONG, **KILLED)
    folder = sweep.sweep_folder
    process = subprocess.Popen([sys.executable, "-m", "fedjax_qp", "sweep", str(file)], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: in_the_middle_of_the_second_run(folder), process)
    finally:
        process.kill()
        process.wait()
    before = stamps(folder / "runs" / FIRST)
    outcome = run_sweep(sweep, quiet())  # waits for the lock of the worker that was left behind, if it still lives
    assert [run.name for task in here for run in task.runs] == [SECOND]
    assert [row.status for row in outcome.rows] == ["complete", "complete"]
    assert_nothing_lost(folder, before)


def test_a_signal_ends_a_sweep_in_order(tmp_path, here, monkeypatch):
    sweep = sweep_of(tmp_path, LONG, **KILLED)

    def interrupted_task(task: Task) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        execute(task)

    monkeypatch.setattr(running, "run_tasks", lambda client, tasks, retries, watch: [interrupted_task(tasks[0])])
    outcome = run_sweep(sweep, quiet())
    assert outcome.interrupted
    assert [row.status for row in outcome.rows] == ["waiting", "waiting"]  # the task saw it before its first round
