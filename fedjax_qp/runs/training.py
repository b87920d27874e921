"""Trains runs that share a program: the loop over chunks with all that is around it for each run, up to its end."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console

from fedjax_qp.console.terminal import leave, listening
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import Experiment, advice
from fedjax_qp.federated import FederatedState
from fedjax_qp.runs import processes, watched
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.loop import NonFiniteLoss, planned_without, simulate
from fedjax_qp.runs.open_run import OpenRun
from fedjax_qp.runs.progress import Bar, progress
from fedjax_qp.runs.startup import Startup

Stop = Callable[[int, list[dict]], str | None]
"""`(position, records so far) -> reason` to end a run early, or None; asked at the ends of chunks."""


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    rounds: int  # finished
    reason: str  # "finished", "target reached", "no progress", "interrupted", "diverged", or what `stop` gave
    error: NonFiniteLoss | None = None  # of one that diverged


def train(
    experiments: Sequence[Experiment],
    layout: Layout,
    folders: Sequence[RunFolder],
    states: Sequence[FederatedState],
    console: Console,
    startup: Startup,
    stop: Stop = lambda run, history: None,
    ended: Mapping[int, Outcome] = MappingProxyType({}),
) -> list[Outcome]:
    """Runs experiments that share a program from their states to their ends.

    Args:
      folders: theirs, already begun and locked. They need not be where the configurations say: a folder may have been moved.
      startup: runs since the beginning.
      ended: those that ended in an earlier process. They keep their place in the program, so that it is the same.
    """
    done = int(states[0].round)
    # Checkpoints: a kill between two runs' saves then leaves a round of which all have one.
    least = min(len(experiments), 2)
    say = partial(console.print, markup=False, highlight=False)
    for warning in dict.fromkeys(warning for experiment in experiments for warning in advice(experiment)):
        say(f"warning: {warning}")
    gone = {
        run: planned_without(experiments[run], outcome.rounds, outcome.reason == "diverged")
        for run, outcome in ended.items()
    }
    opened: dict[int, OpenRun] = {}
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(_signals(console, opened))  # outermost: a last save is not cut short
        for run, experiment in enumerate(experiments):
            if run not in ended:
                opened[run] = stack.enter_context(OpenRun(experiment.config, folders[run], done, say, least))
        bar = stack.enter_context(progress(console, experiments, done))
        over = {run for run, open_run in opened.items() if open_run.reason is not None}
        gone |= {run: planned_without(experiments[run], done, False) for run in over}
        stopped: set[int] = set()
        started = partial(_started, startup, [run.folder for run in opened.values()], console, bar)
        working = len(over) < len(opened)
        everybody = simulate(experiments, states, layout, stopped, started, gone) if working else ()
        for chunks in everybody:
            asked = "interrupted" if processes.any_of(interrupted()) else None
            present = {run: chunk for run, chunk in enumerate(chunks) if chunk is not None}
            with processes.in_common():
                for run, chunk in present.items():  # all records first: whether one stops may depend on another's
                    opened[run].write(chunk)
                for run in present:  # nobody saves this chunk before all have saved the last
                    opened[run].settle()
            for run, chunk in present.items():
                if opened[run].ends(chunk, partial(stop, run), asked):
                    stopped.add(run)
            _warn_of_watched(console, experiments, opened)
            bar.show(list(opened.values()))
            if asked:
                break
    for open_run in opened.values():
        open_run.say_end(console)
    found = {run: Outcome(r.folder.path, r.done, r.reason or "finished", r.error) for run, r in opened.items()}
    return [ended[run] if run in ended else found[run] for run in range(len(experiments))]


def _started(startup: Startup, folders: Sequence[RunFolder], console: Console, bar: Bar) -> None:
    startup.done("program")
    bar.describe("first rounds")
    console.print(str(startup))
    with processes.in_common():
        for folder in folders if processes.first() else ():
            startup.write(folder)


def _warn_of_watched(console: Console, experiments: Sequence[Experiment], opened: Mapping[int, OpenRun]) -> None:
    """Says of each run once what its method advises where a metric has reached its limit."""
    for run, open_run in opened.items():
        for watch in experiments[run].algorithm.watch:
            if watch.metric not in open_run.warned and (said := watched.warning(watch, open_run.history)) is not None:
                open_run.warned.add(watch.metric)
                console.print(f"warning: {said}", markup=False)


@contextlib.contextmanager
def _signals(console: Console, opened: Mapping[int, OpenRun]) -> Iterator[Callable[[], bool]]:
    """Turns a first signal into a request to stop at the chunk's end; a second one leaves. Yields `requested()`."""
    received: list[str] = []

    def note(name: str) -> None:
        received.append(name)
        if len(received) == 1:
            console.print(f"{name}: finishing this chunk, then saving; once more to leave at once")
            return
        kept = [f"{run.folder} (round {run.done})" for run in opened.values()]
        leave(
            f"{name}: left at once; records and checkpoints are kept, to continue from the last checkpoint: "
            f"{', '.join(kept[:3])}{', …' if len(kept) > 3 else ''}"
        )

    with listening(note):
        yield lambda: bool(received)
