"""A sweep from its file to its results; started again, it goes on where it was.

Ctrl-C or SIGTERM ask the workers to finish their chunks; after anything harder the checkpoints of each run are still there.
The same command continues: runs that have ended are kept, runs under way go on, trials that failed (an error, not a
divergence) are tried once more.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp import plugins
from fedjax_qp.console.terminal import leave, listening
from fedjax_qp.files import writing
from fedjax_qp.runs.together import groups, remembered_programs
from fedjax_qp.sweeps import search
from fedjax_qp.sweeps.figures import plot_curves, plot_space
from fedjax_qp.sweeps.live import LiveTable
from fedjax_qp.sweeps.results import Row, check_metric, summarise, table, tidy, write_results
from fedjax_qp.sweeps.schedule import connect, run_tasks, workers_of
from fedjax_qp.sweeps.search import Point, Told
from fedjax_qp.sweeps.space import Sweep, base_values
from fedjax_qp.sweeps.stopping import Curves, Peer
from fedjax_qp.sweeps.trials import Store, Trial
from fedjax_qp.sweeps.worker import Assignment, Task, unfinished


class Outcome(NamedTuple):
    """How a sweep ended."""

    folder: Path
    rows: list[Row]  # the best first
    interrupted: bool


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
    base = base_values(sweep)
    plugins.load(base.get("plugins", ()))
    points = planned(sweep, base)
    with Store(sweep, base) as store:
        _mark(store.add(points), console)
        curves = Curves(sweep.rank.metric)
        platforms = os.environ.get("JAX_PLATFORMS", "") if platforms is None else platforms
        interrupted = _execute(store, base, curves, console, platforms)
        rows = summarise(store, curves)
        _write(store, rows, curves, console)
        if interrupted:
            console.print("continue with the same command")
    return Outcome(store.folder, rows, interrupted)


def planned(sweep: Sweep, base: dict[str, Any]) -> list[Point]:
    """The trials that are known beforehand, each of them checked: none for Optuna, whose space is checked at its ends.

    Raises:
      ConfigurationError: some trial cannot work.
    """
    if sweep.search == "optuna":
        search.check_space(sweep, base)
        return []
    return search.grid(sweep, base) if sweep.search == "grid" else search.random(sweep, base)


def assignments(store: Store, base: dict[str, Any], trials: Sequence[Trial]) -> list[Assignment]:
    """The runs of some trials, all seeds of a trial side by side."""
    folder = str(store.runs_folder)
    return [
        Assignment(
            trial.name,
            seed,
            configuration.to_dict(
                search.configure(base, trial.point.settings, name=trial.name, folder=folder, seed=seed)
            ),
        )
        for trial in trials
        for seed in store.sweep.seeds
    ]


def tasks_of(store: Store, runs: Sequence[Assignment], workers: int, everyone: Sequence[Assignment] = ()) -> list[Task]:
    """Divides runs into tasks: those that share a program together, cut into slices where there are several workers.

    A slice ends between two trials if it can, so that the seeds of a trial advance together. Runs that have begun stay with
    those they began with, also with those that have ended: in the same program they come to the same bits.

    Args:
      runs: those that have not ended.
      everyone: all of these trials.
    """
    sweep = store.sweep
    parts = _begun_together(store, runs, everyone)
    placed = {run.name for part in parts for run in part}
    new = [run for run in runs if run.name not in placed]
    for members in groups([configuration.from_dict(run.config) for run in new]):
        group = [new[index] for index in members]
        parts += _slices(group, sweep.runs_per_task or -(-len(group) // workers))
    peers = tuple(Peer(trial.name, trial.point.variant) for trial in store.trials)
    return [
        Task(
            key=f"task{number:03d}-{part[0].name}",
            folder=str(store.folder),
            attempt=store.attempt,
            runs=tuple(part),
            rank=sweep.rank,
            rule=sweep.early_stopping,
            peers=peers,
            seeds=sweep.seeds,
        )
        for number, part in enumerate(parts)
    ]


def _begun_together(store: Store, runs: Sequence[Assignment], everyone: Sequence[Assignment]) -> list[list[Assignment]]:
    """The programs of several runs, in their order, of which some have not ended."""
    programs = remembered_programs([store.runs_folder / run.name for run in everyone])
    waiting = {run.name for run in runs}
    parts = [[everyone[index] for index in members] for members in programs if len(members) > 1]
    return [part for part in parts if any(run.name in waiting for run in part)]


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


def _execute(store: Store, base: dict[str, Any], curves: Curves, console: Console, platforms: str) -> bool:
    """Runs what is left; returns whether it was interrupted."""
    sweep = store.sweep
    received: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(console, store.end_attempt, received))
        client = None
        for trials in _batches(store, base, curves):
            everyone = assignments(store, base, trials)
            runs = unfinished(store.folder, everyone)
            if runs and not received:
                if client is None:
                    console.print(f"{len(runs)} runs to do; logs and results: {store.folder}", soft_wrap=True)
                    client = stack.enter_context(connect(sweep, store.folder / "dask.log", platforms))
                with LiveTable(store, curves, console) as shown:
                    watch = _watch(store, shown, received)
                    run_tasks(client, tasks_of(store, runs, workers_of(client), everyone), sweep.retries, watch)
                    watch()
            if received:
                break
    return bool(received)


def _watch(store: Store, shown: LiveTable, received: Sequence[str]) -> Callable[[], None]:
    """What happens every second while tasks run."""

    recorded = False

    def watch() -> None:
        nonlocal recorded
        if len(received) > 1:
            raise Interrupted
        shown.update()
        recorded = recorded or check_metric(store)

    return watch


def _batches(store: Store, base: dict[str, Any], curves: Curves) -> Iterator[list[Trial]]:
    """The trials to run together, one batch after another; only Optuna has several."""
    yield list(store.trials)
    while store.sweep.search == "optuna":
        points = search.proposals(store.sweep, base, _told(store, curves))
        if not points:
            return
        yield store.add(points)


def _told(store: Store, curves: Curves) -> list[Told]:
    by_number = sorted(summarise(store, curves), key=lambda row: row.trial.number)
    return [
        Told(
            row.trial.point,
            None if row.value is None else row.value.mean,
            row.status == "complete",
            min(row.rounds),
        )
        for row in by_number
    ]


def _mark(trials: Sequence[Trial], console: Console) -> None:
    if trials:
        console.print(f"{len(trials)} trials, all of them checked")


def _write(store: Store, rows: Sequence[Row], curves: Curves, console: Console) -> None:
    """Tables and figures of what there is, also in the middle of a sweep."""
    console.print(table(store.sweep, rows, most=20))
    if tidy(store).empty:
        return
    write_results(store, rows)
    with writing(store.folder / "curves.png"):
        plot_curves(store, rows, curves, store.folder / "curves.png")
        plot_space(store.sweep, rows, store.folder / "space.png")
    console.print(f"results: {store.folder}", soft_wrap=True)


@contextlib.contextmanager
def _signals(console: Console, end: Callable[[], None], received: list[str]) -> Iterator[None]:
    """Notes signals in `received` and asks the workers to end. A second one does not wait for them."""

    def note(name: str) -> None:
        received.append(name)
        if len(received) == 1:
            end()
            console.print(f"{name}: the workers finish their chunks; once more to leave without waiting for them")
        elif len(received) > 2:  # the second one closes the cluster, which may take its time
            leave(f"{name}: left at once; the same command continues the sweep")

    with contextlib.suppress(Interrupted), listening(note):
        yield
