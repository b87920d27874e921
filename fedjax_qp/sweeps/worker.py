"""What a worker does: one task is some runs that share a program."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp import plugins
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.together import run_together
from fedjax_qp.sweeps.space import EarlyStopping, Rank
from fedjax_qp.sweeps.stopping import Curves, Judge, Peer
from fedjax_qp.sweeps.trials import COMPLETE, Ending, read_attempt, read_ending, read_stopped, run_locks, write_ending

_WAIT = 0.5  # seconds between two looks at a lock that another worker holds


class Assignment(NamedTuple):
    """One run of a task."""

    trial: str
    seed: int
    config: dict[str, Any]  # resolved, as plain dicts

    @property
    def name(self) -> str:
        return f"{self.trial}-seed{self.seed}"


class Task(NamedTuple):
    """All that a worker needs; it has the sweep's folder besides, and nothing else."""

    key: str  # names the task and its log
    folder: str  # of the sweep, absolute
    attempt: str
    runs: tuple[Assignment, ...]
    rank: Rank
    rule: EarlyStopping | None
    peers: tuple[Peer, ...]  # every trial of the sweep so far
    seeds: tuple[int, ...]


def execute(task: Task) -> None:
    """Runs what is left of a task and marks each run that ends; what a run says goes to `logs/`.

    Does nothing for runs that have ended, and continues those that have a checkpoint: so a task may be executed again after
    its worker died, and even while a worker that was given up for dead still holds its locks.
    """
    folder = Path(task.folder)
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / f"{task.key}.log").open("a", encoding="utf-8", buffering=1) as log:
        console = Console(file=log, width=120)
        console.print(f"process {os.getpid()} on {socket.gethostname()}: {', '.join(run.name for run in task.runs)}")
        names = [run.name for run in task.runs]
        with run_locks(folder, names, lambda: _left_behind(task), lambda: time.sleep(_WAIT)) as held:
            if held and not _left_behind(task):
                _run(task, console)


def split(task: Task) -> tuple[Task, Task] | None:
    """Two halves of a task, with no trial in both where it can be; None for a single run."""
    if len(task.runs) < 2:
        return None
    middle = len(task.runs) // 2
    ends = [place for place in range(1, len(task.runs)) if task.runs[place].trial != task.runs[place - 1].trial]
    cut = min(ends, key=lambda place: abs(place - middle)) if ends else middle
    first, second = task.runs[:cut], task.runs[cut:]
    return task._replace(key=f"{task.key}a", runs=first), task._replace(key=f"{task.key}b", runs=second)


def unfinished(folder: Path, runs: Sequence[Assignment]) -> list[Assignment]:
    """The runs that have not ended; failed ones are tried again."""
    endings = [read_ending(folder / "runs" / run.name) for run in runs]
    return [run for run, end in zip(runs, endings, strict=True) if end is None or end.status == "failed"]


def mark_failed(task: Task, reason: str) -> None:
    """Ends the runs of a task that cannot be executed."""
    folder = Path(task.folder)
    for run in unfinished(folder, task.runs):
        write_ending(folder / "runs" / run.name, Ending("failed", reason, 0))


def _run(task: Task, console: Console) -> None:
    folder = Path(task.folder)
    if len(task.runs) == 1:  # one of several has its place in their program to the end, see `runs.together`
        _end_given_up(folder, task.runs[0])
    runs = unfinished(folder, task.runs)
    if not runs:
        return
    judge = Judge(folder, task.attempt, task.rank, task.rule, task.peers, task.seeds, {run.trial for run in task.runs})
    try:
        configs = [configuration.from_dict(run.config) for run in task.runs]
        plugins.load(configs[0].plugins)  # the same for all: no trial may change them
        outcomes = run_together(
            configs,
            console,
            stop=lambda index, history: judge.verdict(task.runs[index].trial, task.runs[index].seed, history),
            beside=sorted((folder / "runs").glob("*/")),
        )
    except ConfigurationError as error:  # another try would end in the same way
        if len(task.runs) > 1:
            raise
        write_ending(folder / "runs" / runs[0].name, Ending("failed", str(error), 0))
        return
    for run, outcome in zip(task.runs, outcomes, strict=True):
        ending = _ending(folder, run, outcome.reason, outcome.rounds)
        if ending is not None and run in runs:
            write_ending(folder / "runs" / run.name, ending)


def _end_given_up(folder: Path, run: Assignment) -> None:
    """Ends a run of a trial that was given up before its worker died, so that it does not go on for another chunk."""
    if unfinished(folder, [run]) and read_stopped(folder, run.trial) is not None:
        rounds = Curves("").rounds(folder / "runs" / run.name)
        write_ending(folder / "runs" / run.name, _stopped(folder, run, rounds))


def _ending(folder: Path, run: Assignment, reason: str, rounds: int) -> Ending | None:
    if reason == "interrupted":
        return None
    if reason in COMPLETE:
        return Ending("complete", reason, rounds)
    if reason == "diverged":
        return Ending("diverged", reason, rounds)
    return _stopped(folder, run, rounds)


def _stopped(folder: Path, run: Assignment, rounds: int) -> Ending:
    reason, _ = read_stopped(folder, run.trial) or ("given up", 0)
    return Ending("stopped", reason, rounds)


def _left_behind(task: Task) -> bool:
    """Whether the sweep that sent this task has ended."""
    return read_attempt(Path(task.folder)) != task.attempt
