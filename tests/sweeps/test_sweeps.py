"""Whole sweeps with real training: resumed, stopped early, and killed at their worst moments."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from rich.console import Console
from support.sweeps import opened, sweep_of, write_sweep

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps import run as running
from fedjax_qp.sweeps import schedule
from fedjax_qp.sweeps.run import run_sweep
from fedjax_qp.sweeps.trials import open_storage
from fedjax_qp.sweeps.worker import Task, execute

PATIENCE = 500  # seconds: the machine may be slow, a hanging test must still end


@pytest.fixture
def here(monkeypatch) -> list[Task]:
    """Executes tasks in this process, without Dask; returns those that were executed."""
    executed: list[Task] = []

    def run_tasks(client, tasks, retries, watch, failed) -> None:
        for task in tasks:
            executed.append(task)
            execute(task)
            watch()

    monkeypatch.setattr(running, "connect", lambda *_: contextlib.nullcontext(True))
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
    return {name: (run_folder / name).stat().st_mtime_ns for name in ("records.jsonl", "ended.json", "config.yaml")}


def test_a_sweep_and_what_is_added_to_it(here, tmp_path):
    space = {"local.learning_rate": [0.02, 0.1]}
    first = run_sweep(sweep_of(tmp_path, space=space, seeds=[0, 1], rank={"last": 2}), quiet())
    assert [len(task.runs) for task in here] == [4]  # one program for all
    assert first.trials["status"].tolist() == ["complete"] * 2 and first.trials["rounds"].tolist() == [4, 4]
    before = {folder.name: stamps(folder) for folder in (first.folder / "runs").iterdir()}
    grown = sweep_of(tmp_path, space={"local.learning_rate": [0.02, 0.1, 1e-6]}, seeds=[0, 1], rank={"last": 2})
    second = run_sweep(grown, quiet())
    assert [run.name for run in here[-1].runs] == ["trial-002-seed0", "trial-002-seed1"] and len(here) == 2
    assert before == {name: stamps(first.folder / "runs" / name) for name in before}
    assert second.trials["settings"].iloc[-1] == "learning_rate=1e-06"  # it does not learn
    written = {"results.csv", "summary.csv", "summary.md", "curves.png", "space-small.png"}
    assert {file.name for file in second.folder.iterdir()} >= written
    assert len(pd.read_csv(second.folder / "results.csv")) == 3 * 2 * 4
    study = optuna.load_study(study_name="small", storage=open_storage(second.folder))
    assert [list(trial.intermediate_values) for trial in study.trials] == [[1, 2, 3, 4]] * 3
    assert study.best_trial.user_attrs["name"] == second.trials["trial"][0]
    run_sweep(grown, quiet())
    assert len(here) == 2  # nothing was left to do


@pytest.mark.slow  # ten rounds of twelve runs
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
    found = {row["trial"]: row for row in run_sweep(sweep, quiet()).trials.to_dict("records")}
    assert [found[f"trial-00{number}"]["status"] for number in range(3)] == ["complete", "complete", "stopped"]
    assert 4 <= found["trial-002"]["rounds"] <= 6  # judged at the end of a chunk of two rounds
    assert found["trial-002"]["reason"] == "given up by the median pruner in round 4"
    assert [len(task.runs) for task in here] == [2, 2, 2]


def test_tpe_goes_on_with_the_results_it_has(here, tmp_path):
    settings = {
        "search": "tpe",
        "batch": 2,
        "space": {"local.learning_rate": {"low": 1e-4, "high": 0.5, "log": True}},
        "rank": {"last": 1},
    }
    whole = run_sweep(sweep_of(tmp_path / "whole", {"rounds": 2}, trials=4, **settings), quiet())
    assert [len(task.runs) for task in here] == [2, 2]
    run_sweep(sweep_of(tmp_path / "parts", {"rounds": 2}, trials=2, **settings), quiet())
    parts = run_sweep(sweep_of(tmp_path / "parts", {"rounds": 2}, trials=4, **settings), quiet())
    assert [len(task.runs) for task in here] == [2, 2, 2, 2]
    assert whole.trials.equals(parts.trials) and len(whole.trials) == 4


TUNED = {
    "seeds": [7],
    "variants": [
        {"name": "plain", "settings": {"algorithm": "fedavg"}},
        {"name": "proximal", "settings": {"algorithm": "fedprox"}, "space": {"algorithm.proximal": [10.0, 0.01]}},
        {
            "name": "mutated",
            "settings": {"algorithm": "fedmut"},
            "space": {"algorithm.alpha, local.epochs": [[1, 1], [4, 1]]},
        },
        {"name": "longer", "like": "proximal", "settings": {"local.epochs": 2}},
    ],
    "rank": {"last": 2},
    "compare": {"seeds": [0, 1], "rounds": 3, "last": 2, "baseline": "plain"},
}


def test_settings_are_tuned_on_one_seed_and_compared_on_others(here, tmp_path):
    outcome = run_sweep(sweep_of(tmp_path, {"rounds": 2}, **TUNED), quiet())
    tuning, comparing = (
        [run for task in here for run in task.runs if run.phase.folder.name == name] for name in FOLDERS
    )
    assert {(run.trial.variant, run.seed) for run in tuning} == {("proximal", 7), ("mutated", 7)} and len(tuning) == 4
    trials = {row["trial"]: row for row in outcome.trials.to_dict("records")}
    names = ["plain"]
    for variant in ("proximal", "mutated"):
        names.append(max((f"{variant}-000", f"{variant}-001"), key=lambda name: trials[name]["mean"]))
    names.append(f"longer-{names[1][-3:]}")  # like the best of `proximal`
    assert {run.name for run in comparing} == {f"{name}-seed{seed}" for name in names for seed in (0, 1)}
    of_name = {run.trial.name: run.config for run in comparing}
    assert all(config["rounds"] == 3 for config in of_name.values())
    chosen = trials[names[1]]["algorithm.proximal"]
    assert of_name[names[1]]["algorithm"] == {"name": "fedprox", "weighting": "size", "proximal": chosen}
    assert of_name[names[3]]["algorithm"]["proximal"] == chosen and of_name[names[3]]["local"]["epochs"] == 2

    rows = {row["method"]: row for row in json.loads((outcome.folder / "comparison.json").read_text())}
    means = {
        name: [mean_of_last(outcome.folder / FOLDERS[1] / f"{name}-seed{seed}", 2) for seed in (0, 1)] for name in names
    }
    for name in names:
        assert rows[name]["accuracy"]["mean"] == pytest.approx(statistics.fmean(means[name]))
    differences = [100 * (ours - theirs) for ours, theirs in zip(means[names[1]], means["plain"], strict=True)]
    assert rows[names[1]]["difference"]["points"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert rows[names[1]]["difference"]["points"]["std"] == pytest.approx(statistics.stdev(differences))
    assert f"{names[1]} is the best of 2 settings" in (outcome.folder / "comparison.md").read_text()

    done = len(here)
    run_sweep(sweep_of(tmp_path, {"rounds": 2}, **TUNED), quiet())
    assert len(here) == done  # nothing was left to do
    elsewhere = sweep_of(
        tmp_path,
        {"rounds": 2},
        name="elsewhere",
        variants=str(outcome.folder / "tuned.yaml"),
        compare={"seeds": [7], "rounds": 1},
    )
    run_sweep(elsewhere, quiet())
    assert [(run.trial.name, run.config["rounds"]) for run in here[done].runs][:1] == [("plain", 1)]
    again = {run.trial.variant: run.config["algorithm"] for task in here[done:] for run in task.runs}
    assert again["proximal"] == of_name[names[1]]["algorithm"] and len(again) == 4


FOLDERS = ("runs", "comparison")


def mean_of_last(run_folder: Path, last: int) -> float:
    return statistics.fmean(line["test_accuracy"] for line in RunFolder(run_folder).records()[-last:])


def test_an_interrupted_comparison_goes_on_with_the_same_settings_and_bits(here, tmp_path, monkeypatch):
    settings = {**TUNED, "compare": {"seeds": [0, 1], "rounds": 12}, "variants": TUNED["variants"][:2]}
    whole = run_sweep(sweep_of(tmp_path / "whole", {"rounds": 2}, **settings), quiet())
    sweep = sweep_of(tmp_path / "parts", {"rounds": 2}, **settings)
    run_tasks = running.run_tasks

    def lost(client, tasks, *others) -> None:
        """The cluster goes in the middle of the comparison's first task."""
        records_file = tasks[0].runs[0].folder / "records.jsonl"
        if tasks[0].runs[0].phase.folder.name != "comparison":
            return run_tasks(client, tasks, *others)
        attempt = sweep.sweep_folder / "attempt"
        leaver = threading.Thread(target=lambda: (wait_for(records_file.exists), attempt.write_text("")))
        leaver.start()
        execute(tasks[0])
        leaver.join()
        raise RuntimeError("the cluster has gone")

    monkeypatch.setattr(running, "run_tasks", lost)
    with pytest.raises(RuntimeError, match="the cluster has gone"):
        run_sweep(sweep, quiet())
    monkeypatch.setattr(running, "run_tasks", run_tasks)
    parts = run_sweep(sweep, quiet())
    assert parts.trials.equals(whole.trials)
    files = sorted((whole.folder / "comparison").glob("*/records.jsonl"))
    assert len(files) == 4
    continued = [started_after(sweep.sweep_folder / file.parent.relative_to(whole.folder)) for file in files]
    assert any(rounds - {"0"} for rounds in continued)  # some of them go on from a checkpoint
    for file in files:
        assert file.read_bytes() == (sweep.sweep_folder / file.relative_to(whole.folder)).read_bytes()
    assert (sweep.sweep_folder / "comparison.md").read_text() == (whole.folder / "comparison.md").read_text()


def test_a_variant_whose_settings_all_diverge_takes_no_part(here, tmp_path):
    wild = {"name": "wild", "space": {"local.learning_rate": [1e30, 1e31]}}
    settings = {**TUNED, "variants": [{"name": "plain"}, wild], "compare": {"seeds": [0], "baseline": "wild"}}
    outcome = run_sweep(sweep_of(tmp_path, {"rounds": 2}, **settings), quiet())
    assert outcome.trials["status"].tolist() == ["diverged"] * 2
    text = (outcome.folder / "comparison.md").read_text()
    assert "wild takes no part: no setting of wild came to its end." in text and "| plain | 1 |" in text


def test_a_run_that_diverges_ends_alone(here, tmp_path):
    sweep = sweep_of(tmp_path, space={"local.learning_rate": [0.05, 1e30]}, rank={"last": 1})
    outcome = run_sweep(sweep, quiet())
    assert outcome.trials["status"].tolist() == ["complete", "diverged"] and outcome.trials["rounds"].tolist() == [4, 0]
    assert run_sweep(sweep, quiet()).trials.equals(outcome.trials) and len(here) == 1  # it is not tried again


def test_slices_keep_the_seeds_of_a_trial_together(tmp_path):
    store = opened(sweep_of(tmp_path, space={"local.learning_rate": [0.1, 0.2, 0.3]}, seeds=[0, 1]))
    runs = running.assignments(store, ["small"])
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
FIRST, SECOND = "trial-000-seed0", "trial-001-seed0"


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
        assert RunFolder(folder / "runs" / name).ended() == ("finished", LONG["rounds"])
    study = optuna.load_study(study_name="small", storage=open_storage(folder))
    assert all(list(trial.intermediate_values) == rounds(folder / "runs" / FIRST) for trial in study.trials)
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
    assert outcome.trials["status"].tolist() == ["complete", "complete"]
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
    assert outcome.trials["status"].tolist() == ["complete", "complete"]
    assert_nothing_lost(folder, before)


def test_a_signal_ends_a_sweep_in_order(tmp_path, here, monkeypatch):
    sweep = sweep_of(tmp_path, LONG, **KILLED)

    def interrupted_task(task: Task) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        execute(task)

    monkeypatch.setattr(running, "run_tasks", lambda client, tasks, *_: [interrupted_task(tasks[0])])
    outcome = run_sweep(sweep, quiet())
    assert outcome.interrupted
    assert outcome.trials["status"].tolist() == ["waiting", "waiting"]  # the task saw it before its first round
