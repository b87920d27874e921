"""What a worker does: one task is some runs that share a program."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.pruners import BasePruner, MedianPruner, SuccessiveHalvingPruner
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import run_all
from fedjax_qp.settings import plugins
from fedjax_qp.sweeps.space import COMPARISON, EarlyStopping
from fedjax_qp.sweeps.trials import Phase, Trial, curve, open_storage, read_attempt, read_history, run_locks, trial_id

_WAIT = 0.5  # seconds between two looks at a lock that another worker holds


class Assignment(NamedTuple):
    """One run of a task."""

    trial: Trial
    phase: Phase
    seed: int
    config: dict[str, Any]  # resolved, as plain dicts

    @property
    def name(self) -> str:
        return f"{self.trial.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.phase.folder / self.name


class Task(NamedTuple):
    """All that a worker needs; it has the sweep's folder besides, and nothing else."""

    key: str  # names the task and its log
    folder: str  # of the sweep, absolute
    attempt: str
    runs: tuple[Assignment, ...]
    rule: EarlyStopping | None


def execute(task: Task) -> None:
    """Runs what is left of a task; what a run says goes to `logs/`.

    Does nothing for runs that have ended, and continues those that have a checkpoint: so a task may be executed again after
    its worker died, and even while a worker that was given up for dead still holds its locks.
    """
    folder = Path(task.folder)
    (folder / "logs").mkdir(exist_ok=True)
    with (folder / "logs" / f"{task.key}.log").open("a", encoding="utf-8", buffering=1) as log:
        console = Console(file=log, width=120)
        console.print(f"process {os.getpid()} on {socket.gethostname()}: {', '.join(run.name for run in task.runs)}")
        names = [f"{run.phase.folder.name}-{run.name}" for run in task.runs]
        with run_locks(folder, names, lambda: _left_behind(task), lambda: time.sleep(_WAIT)) as held:
            if not held or _left_behind(task) or all(RunFolder(run.folder).ended() for run in task.runs):
                return
            judge = Judge(task)
            configs = [configuration.from_dict(run.config) for run in task.runs]
            plugins.load(configs[0].plugins)  # the same for all: no trial may change them
            run_all(
                configs,
                console,
                stop=judge.verdict,
                beside=sorted(task.runs[0].phase.folder.glob("*/")),
            )


def split(task: Task) -> tuple[Task, Task] | None:
    """Two halves of a task, with no trial in both where it can be; None for a single run."""
    if len(task.runs) < 2:
        return None
    middle = len(task.runs) // 2
    ends = [place for place in range(1, len(task.runs)) if task.runs[place].trial != task.runs[place - 1].trial]
    cut = min(ends, key=lambda place: abs(place - middle)) if ends else middle
    first, second = task.runs[:cut], task.runs[cut:]
    return task._replace(key=f"{task.key}a", runs=first), task._replace(key=f"{task.key}b", runs=second)


class Judge:
    """Reports the values of a task's trials to Optuna, round by round, and decides whether their runs go on."""

    def __init__(self, task: Task):
        self._task = task
        self._storage = open_storage(Path(task.folder))
        self._histories: dict[Path, Sequence[dict]] = {}

    def verdict(self, place: int, history: Sequence[dict]) -> str | None:
        """The reason for which a run ends after its last record, or None.

        A trial is judged once all of its seeds have come to a round, and stops with all of them: a mean over fewer could not
        be compared with anything.
        """
        if _left_behind(self._task):
            return "interrupted"
        run = self._task.runs[place]
        self._histories[run.folder] = history
        identifier = trial_id(self._storage, run.trial)
        rule, round = self._task.rule, history[-1]["round"]
        if self._report(run, identifier) and rule is not None and run.trial.study != COMPARISON:
            study = optuna.load_study(study_name=run.trial.study, storage=self._storage)
            if pruner(rule).prune(study, self._storage.get_trial(identifier)):
                reason = f"given up by the {rule.pruner} pruner in round {round}"
                self._storage.set_trial_user_attr(identifier, "stopped", [round, reason])
        stopped = self._storage.get_trial(identifier).user_attrs.get("stopped")
        # Rounds before that may be computed again after a kill; it ends where it did.
        return stopped[1] if stopped is not None and round >= stopped[0] else None

    def _report(self, run: Assignment, identifier: int) -> bool:
        """Whether there is a round that all seeds have come to and that had not been reported."""
        histories = [self._histories.get(folder) or read_history(folder) for folder in run.phase.run_folders(run.trial)]
        told = self._storage.get_trial(identifier).intermediate_values
        new = {round: value for round, value in curve(histories, run.phase.rank).items() if round not in told}
        for round, value in new.items():
            self._storage.set_trial_intermediate_value(identifier, round, value)
        return bool(new)


def pruner(rule: EarlyStopping) -> BasePruner:
    """Optuna's pruner of a rule."""
    if rule.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=rule.after)
    return MedianPruner(rule.least_trials, n_warmup_steps=rule.after, n_min_trials=rule.least_trials)


def _left_behind(task: Task) -> bool:
    """Whether the sweep that sent this task has ended."""
    return read_attempt(Path(task.folder)) != task.attempt
