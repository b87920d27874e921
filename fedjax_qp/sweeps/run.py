"""A sweep from its file to its results; started again, it goes on where it was.

Ctrl-C or SIGTERM ask the workers to finish their chunks; after anything harder the checkpoints of each run are still there.
The same command continues: runs that have ended are kept, runs under way go on, trials that failed (an error, not a
divergence) are tried once more.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedjax_qp import config as configuration
from fedjax_qp.console.terminal import leave, listening
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.programs import groups, remembered_programs
from fedjax_qp.settings import plugins
from fedjax_qp.sweeps import search
from fedjax_qp.sweeps.results import said, summary, table, write_comparison, write_results
from fedjax_qp.sweeps.schedule import connect, run_tasks, workers_of
from fedjax_qp.sweeps.search import Point
from fedjax_qp.sweeps.space import COMPARISON, Sweep, Variant
from fedjax_qp.sweeps.trials import Store, trial_of
from fedjax_qp.sweeps.worker import Assignment, Task

_SHARE = 0.1  # of the time may go into reading the run folders


class Outcome(NamedTuple):
    """How a sweep ended."""

    folder: Path
    trials: pd.DataFrame  # of the search, see `results.summary`
    interrupted: bool
    failed: bool  # whether some run did, also of the comparison


class Interrupted(Exception):
    """A second signal: stop without waiting for the workers."""


def run_sweep(sweep: Sweep, console: Console | None = None, *, platforms: str | None = None) -> Outcome:
    """Starts a sweep, or continues the one in its folder.

    Args:
      platforms: JAX_PLATFORMS of the embedded workers; default that of this process. This process needs no accelerator.

    Raises:
      ConfigurationError: some trial cannot work, or the folder holds a sweep that this one does not only add to. All of this
        is found before any compute.
    """
    console = console or Console()
    plugins.load(sweep.base.get("plugins", ()))
    plan = search.planned(sweep)
    platforms = os.environ.get("JAX_PLATFORMS", "") if platforms is None else platforms
    with Store(sweep) as store:
        running, notes = _Running(store, console, platforms), []
        store.settle()
        with running:
            running.search(plan)
            notes = running.compare() if sweep.compare is not None else []
        trials = summary(store)
        if not trials.empty:
            console.print(table(sweep, trials, most=20))
        write_results(store)
        if sweep.compare is not None and (compared := write_comparison(store, running.compared, notes)) is not None:
            console.print(compared)
        console.print(f"results: {store.folder}", soft_wrap=True)
        if running.received:
            console.print("continue with the same command")
        failed = any(one.state is TrialState.FAIL for study in store.studies() for one in study.trials)
    return Outcome(store.folder, trials, bool(running.received), failed)


def planned_runs(sweep: Sweep) -> str:
    """Checks all trials and counts the runs.

    Raises:
      ConfigurationError: some trial cannot work.
    """
    search.planned(sweep)
    trials = sum(search.settings_of(sweep, variant) for variant in search.searched_variants(sweep))
    found = f"{trials} trials with {len(sweep.seeds)} seeds each: {trials * len(sweep.seeds)} runs"
    if sweep.compare is None:
        return found
    variants, seeds = len(sweep.variants), len(sweep.compare.seeds)
    return f"{found}; then {variants} variants with {seeds} seeds each: {variants * seeds} runs"


def assignments(store: Store, studies: Sequence[str]) -> list[Assignment]:
    """The runs of some studies, the seeds of a trial side by side."""
    found = []
    for study in studies:
        phase = store.phase(study)
        for frozen in store.study(study).get_trials(deepcopy=False):
            trial = trial_of(study, frozen)
            for seed in phase.seeds:
                where = {"name": trial.name, "folder": str(phase.folder), "seed": seed}
                config = search.configure(store.sweep.base, trial.settings, **where)
                found.append(Assignment(trial, phase, seed, configuration.to_dict(config)))
    return found


def tasks_of(store: Store, runs: Sequence[Assignment], workers: int, everyone: Sequence[Assignment] = ()) -> list[Task]:
    """Divides runs into tasks: those that share a program together, cut into slices where there are several workers.

    A slice ends between two trials if it can, so that the seeds of a trial advance together. Runs that have begun stay with
    those they began with, also with those that have ended: in the same program they come to the same bits.

    Args:
      runs: those that have not ended.
      everyone: all of these studies.
    """
    waiting = {run.folder for run in runs}
    programs = remembered_programs([RunFolder(run.folder) for run in everyone])
    parts = [[everyone[index] for index in members] for members in programs if len(members) > 1]
    parts = [part for part in parts if any(run.folder in waiting for run in part)]
    placed = {run.folder for part in parts for run in part}
    new = [run for run in runs if run.folder not in placed]
    for members in groups([configuration.from_dict(run.config) for run in new]):
        group = [new[index] for index in members]
        parts += _slices(group, store.sweep.runs_per_task or -(-len(group) // workers))
    return [
        Task(
            key=f"task{number:03d}-{part[0].name}",
            folder=str(store.folder),
            attempt=store.attempt,
            runs=tuple(part),
            rule=store.sweep.early_stopping,
        )
        for number, part in enumerate(parts)
    ]


def _slices(group: Sequence[Assignment], most: int) -> Iterator[list[Assignment]]:
    """Slices of at most `most` runs; a trial is divided only where it is larger than that."""
    part: list[Assignment] = []
    for place, run in enumerate(group):
        same = sum(other.trial == run.trial for other in group[place:])  # of this trial, from here on
        first = not part or part[-1].trial != run.trial
        if len(part) == most or (first and part and len(part) + same > most):
            yield part
            part = []
        part.append(run)
    if part:
        yield part


class _Running:
    """A sweep under way. Its cluster starts with the first run; leaving the context closes it."""

    def __init__(self, store: Store, console: Console, platforms: str):
        self.received: list[str] = []  # signals
        self.compared: list[int] = []  # trials of the comparison, in the order of the variants
        self._store, self._console, self._platforms = store, console, platforms
        self._stack, self._client = contextlib.ExitStack(), None
        self._next = 0.0

    def search(self, plan: dict[str, list[Point]]) -> None:
        """Runs every trial, of `tpe` batch by batch."""
        store, variants = self._store, {one.name: one for one in search.searched_variants(self._store.sweep)}
        names = {store.study_name(name): name for name in variants}
        while not self.received:
            before = store.count()
            for study, name in names.items():
                known = store.study(study).get_trials(deepcopy=False)
                points = plan[name] if name in plan else search.proposals(store.sweep, variants[name], known)
                store.add(study, name, points)
            if not self._run(list(names)) and store.count() == before:
                break

    def compare(self) -> list[str]:
        """Runs the best setting of each variant with the other seeds; returns what there is to say of them."""
        store, notes = self._store, []
        variants = {one.name: one for one in store.sweep.every_variant()}
        for variant in variants.values() if not self.received else ():
            parent = variants[variant.like or variant.name]
            settings, number = self._best(parent)
            if settings is None:
                notes.append(f"{variant.name} takes no part: no setting of {parent.name} came to its end.")
                continue
            settings = search.compared(store.sweep, variant, settings)
            name = variant.name if number is None else f"{variant.name}-{number:03d}"
            self.compared += store.add(COMPARISON, variant.name, [Point(settings)], name)
            if number is not None and variant is parent:
                tried = search.settings_of(store.sweep, variant)
                notes.append(f"{name} is the best of {tried} settings: {said(settings, variant.space)}.")
        self._run([COMPARISON])
        return notes

    def _best(self, variant: Variant) -> tuple[dict[str, Any] | None, int | None]:
        """The settings that take part for a variant, None where there are none; and the number of their trial."""
        if not search.is_tuned(self._store.sweep, variant):
            return search.single(self._store.sweep, variant), None
        study = self._store.study(self._store.study_name(variant.name))
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return None, None
        return study.best_trial.user_attrs["settings"], study.best_trial.number

    def _run(self, studies: Sequence[str]) -> bool:
        """Runs what is left of some studies; returns whether there was anything."""
        store, everyone = self._store, assignments(self._store, studies)
        runs = [run for run in everyone if store.waits(run.folder)]
        if not runs or self.received:
            return False
        if self._client is None:
            self._client = self._stack.enter_context(connect(store.sweep, store.folder / "dask.log", self._platforms))
        self._console.print(f"{len(runs)} runs to do; logs and results: {store.folder}", soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            trials = bar.add_task("trials; Ctrl-C saves and stops", total=len({run.trial.name for run in everyone}))
            watch = partial(self._watch, lambda ended: bar.update(trials, completed=ended), studies)
            tasks = tasks_of(store, runs, workers_of(self._client), everyone)
            run_tasks(self._client, tasks, store.sweep.retries, watch, self._failed)
            self._next = 0.0
            watch()
        return True

    def _watch(self, show: Callable[[int], None], studies: Sequence[str]) -> None:
        """What happens every second while tasks run, with many trials less often."""
        if len(self.received) > 1:
            raise Interrupted
        begin = time.monotonic()
        if begin < self._next:
            return
        for _, frozen in self._store.settle():
            told = frozen.user_attrs
            settings = said(told["settings"], frozen.params) or "nothing searched"
            value = "" if frozen.value is None else f", {self._store.sweep.rank.metric} {frozen.value:.4g}"
            line = f"{told['name']} ({settings}) {told['status']}{value}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        show(sum(one.state.is_finished() for study in studies for one in self._store.study(study).trials))
        self._next = time.monotonic() + (time.monotonic() - begin) / _SHARE

    def _failed(self, task: Task, reason: str) -> None:
        self._store.failures |= {run.folder: reason for run in task.runs}

    def __enter__(self) -> "_Running":
        self._stack.enter_context(contextlib.suppress(Interrupted))
        self._stack.enter_context(listening(self._note))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def _note(self, name: str) -> None:
        """Asks the workers to end. A second signal does not wait for them."""
        self.received.append(name)
        if len(self.received) == 1:
            self._store.end_attempt()
            self._console.print(f"{name}: the workers finish their chunks; once more to leave without waiting for them")
        elif len(self.received) > 2:  # the second one closes the cluster, which may take its time
            leave(f"{name}: left at once; the same command continues the sweep")
