"""A run with everything around it: run folder, records, checkpoints, progress, early stop, orderly end on a signal."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedjax_qp import config as configuration
from fedjax_qp import plugins
from fedjax_qp.config import Config
from fedjax_qp.console.terminal import leave, listening
from fedjax_qp.data import print_table, summary
from fedjax_qp.experiment import Experiment, advice, build, first_state, resolve, with_layout
from fedjax_qp.federated import FederatedState
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import processes, records, watched
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.checkpoint import Checkpoints
from fedjax_qp.runs.folder import OpenRun, begin_folder, lock_run, make_folder, restorable, shared_its_program
from fedjax_qp.runs.loop import NonFiniteLoss, planned_without, simulate_together
from fedjax_qp.runs.provenance import Provenance, provenance
from fedjax_qp.runs.startup import Startup
from fedjax_qp.runs.trackers import check_trackers


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    rounds: int  # finished
    reason: str  # "finished", "target reached", "no progress", "interrupted", "diverged", or what `stop` gave
    error: NonFiniteLoss | None = None  # of one that diverged


def run(config: Config, console: Console | None = None) -> Outcome:
    """Starts a run in a new folder.

    Raises:
      ConfigurationError: the configuration cannot work, or the folder already holds a run.
    """
    console, startup = console or processes.console(), Startup()
    config = resolve(config)  # what is misspelt comes before what is in the way
    folder = config.run_folder
    with processes.in_common():
        _refuse_held(folder, config)
        check_trackers(config)
    with processes.in_common(), console.status("reading the data"):
        experiment = build(config)
        (made_of,) = provenance([experiment])
        make_folder(folder)
    startup.done("data")
    with lock_run(folder):
        with processes.in_common():
            if processes.first():  # while the data were read, another process may have come first
                _refuse_held(folder, config)
        experiment = _with_measured_lanes(experiment, folder, console, startup)
        print_table(summary(experiment.task.counts), console=console)
        for note in experiment.task.notes:
            console.print(note)
        with processes.in_common():
            if processes.first():
                begin_folder(experiment, made_of)
        return _alone(experiment, folder, first_state(experiment), console, startup)


def _refuse_held(folder: Path, config: Config) -> None:
    if not (folder / "config.yaml").exists():
        return
    held = configuration.load(folder / "config.yaml").algorithm.name
    if held != config.algorithm.name:
        raise ConfigurationError(
            f"{folder} already holds a run of another algorithm ({held}): choose another name, for example "
            f"name={config.name}-{config.algorithm.name}, or continue it with `fedjax-qp resume {folder}`."
        )
    raise ConfigurationError(
        f"{folder} already holds a run: continue it with `fedjax-qp resume {folder}`, or choose another name, seed or folder."
    )


def _with_measured_lanes(experiment: Experiment, folder: Path, console: Console, startup: Startup) -> Experiment:
    """Fixes the lanes where they are auto. The run's configuration keeps them, so that it measures but once."""
    if experiment.config.engine.lanes != "auto":
        return experiment
    with console.status("measuring lanes"):
        choice = choose_layout([experiment])
    console.print(str(choice))
    with processes.in_common():
        if processes.first():
            choice.write(folder)
    startup.done("lanes")
    return with_layout(experiment, choice.lanes, choice.devices)


def resume(folder: Path, overrides: list[str] | None = None, console: Console | None = None) -> Outcome:
    """Continues a run from its newest checkpoint, with the configuration in its folder.

    Args:
      overrides: settings to change, for example `rounds=200`. Only settings that leave the past of the run valid may be
        changed; each one is reported.

    Raises:
      ConfigurationError: no run in the folder, or a change that would make the run inconsistent with its past.
    """
    console, startup = console or processes.console(), Startup()
    file = _config_file(folder, "start one with `fedjax-qp run CONFIG`")
    with lock_run(folder):
        with processes.in_common():
            config = configuration.load(file, overrides)
            plugins.load_of_run(folder, config.plugins)
            before = configuration.to_dict(configuration.load(file))
            changed = configuration.differences(before, configuration.to_dict(config))
            _check_changes(changed)
            _check_rounds(config, folder)
            check_trackers(config)
        with processes.in_common(), console.status("reading the data"):
            experiment = build(config)
            (made_of,) = provenance([experiment])
            check_provenance(made_of, folder, console)
        startup.done("data")
        if changed:
            console.print("resuming with a changed configuration: " + "; ".join(changed), markup=False)
        settled = _with_measured_lanes(experiment, folder, console, startup)  # auto after it began in a shared program
        state = newest_state(settled, folder, console)
        elsewhere = shared_its_program(folder) or any(change.startswith(_LAYOUT) for change in changed)
        if elsewhere and 0 < int(state.round) < config.rounds:
            console.print(
                "from here on its numbers equal those of an uninterrupted run up to rounding, not to the last bit"
            )
        with processes.in_common():
            if processes.first() and (changed or settled is not experiment):
                configuration.save(settled.config, file)
        return _alone(settled, folder, state, console, startup)


def _config_file(folder: Path, remedy: str) -> Path:
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(f"{folder} holds no run (no config.yaml): {remedy}.")
    return file


def check_provenance(made_of: Provenance, folder: Path, console: Console) -> None:
    """Refuses to go on with other data or weights than a run began with; notes them where that was not yet done.

    Raises:
      ConfigurationError: something differs.
    """
    if not made_of.check(folder, partial(console.print, markup=False, highlight=False)) and processes.first():
        made_of.write(folder)


def newest_state(experiment: Experiment, folder: Path, console: Console) -> FederatedState:
    """The state that a run goes on from; what has to be computed again is said."""
    like = first_state(experiment)
    with Checkpoints(folder / "checkpoints", keep=experiment.config.checkpoints.keep) as checkpoints:
        with processes.in_common():
            covered = restorable(folder, checkpoints)
            state = checkpoints.restore(like, covered)
            back = bool(covered) and covered[0] != checkpoints.rounds()[-1]
        with processes.in_common():
            if back and processes.first():
                checkpoints.discard_after(int(covered[0]))
    if state is None:
        recorded = len(records.read(folder)) if (folder / records.FILE).exists() else 0
        again = f"; the {recorded} recorded rounds are computed again" if recorded else ""
        console.print(f"no checkpoint yet: starting from round 1{again}")
        return like
    if back:
        console.print(f"{records.FILE} is not complete: going back to round {covered[0]}, up to which it is")
    return state


def restore(folder: Path) -> tuple[Experiment, FederatedState]:
    """Reads a run and its newest checkpoint.

    Raises:
      ConfigurationError: no run in the folder, no checkpoint yet, or its data or weights are no longer the same.
    """
    config = configuration.load(_config_file(folder, "give the folder of one run"))
    plugins.load_of_run(folder, config.plugins)
    experiment = build(config)
    (made_of,) = provenance([experiment])
    made_of.check(folder, warnings.warn)
    with Checkpoints(folder / "checkpoints", keep=experiment.config.checkpoints.keep) as checkpoints:
        state = checkpoints.restore(first_state(experiment))
    if state is None:
        raise ConfigurationError(f"{folder} has no checkpoint yet: let it run, or `fedjax-qp resume {folder}`.")
    return experiment, state


# Settings that do not touch what has already been computed.
_LAYOUT = ("engine.lanes:", "engine.devices:", "engine.model_devices:", "engine.parallel:")  # another order of the sums
_STORES = ("engine.client_store", "engine.data_store", "engine.memory_gigabytes")
_MAY_CHANGE = ("rounds", "plugins:", "evaluation.", "checkpoints.", "tracking.", *_STORES, *_LAYOUT)


def _alone(experiment: Experiment, folder: Path, state: FederatedState, console: Console, startup: Startup) -> Outcome:
    (outcome,) = continue_runs([experiment], [folder], [state], console, startup)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def _check_changes(changed: list[str]) -> None:
    refused = [change for change in changed if not change.startswith(_MAY_CHANGE)]
    if refused:
        raise ConfigurationError(
            f"resuming cannot change {'; '.join(refused)}: the rounds already run would not belong to the same run. "
            f"Allowed: {', '.join(name.rstrip('.:') for name in _MAY_CHANGE)}. Start a new run for the rest."
        )


def _check_rounds(config: Config, folder: Path) -> None:
    lines = records.read(folder) if (folder / records.FILE).exists() else []
    if lines and config.rounds < lines[-1]["round"]:
        raise ConfigurationError(
            f"rounds = {config.rounds} is less than the {lines[-1]['round']} that are in {folder}: choose at least those."
        )


def continue_runs(
    experiments: Sequence[Experiment],
    folders: Sequence[Path],
    states: Sequence[FederatedState],
    console: Console,
    startup: Startup,
    stop: Callable[[int, list[dict]], str | None] = lambda run, history: None,
    ended: Mapping[int, Outcome] = MappingProxyType({}),
) -> list[Outcome]:
    """Runs experiments that share a program from their states to their ends.

    Args:
      folders: theirs, already begun and locked. They need not be where the configurations say: a folder may have been moved.
      startup: runs since the beginning.
      stop: `(position, records so far) -> reason` to end a run early, or None; asked at the ends of chunks.
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
        bar = stack.enter_context(_progress(console, experiments, done))
        over = {run for run, open_run in opened.items() if open_run.reason is not None}
        gone |= {run: planned_without(experiments[run], done, False) for run in over}
        stopped: set[int] = set()
        started = partial(_started, startup, [run.folder for run in opened.values()], console, bar)
        working = len(over) < len(opened)
        everybody = simulate_together(experiments, states, stopped, started, gone) if working else ()
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
    found = {run: Outcome(r.folder, r.done, r.reason or "finished", r.error) for run, r in opened.items()}
    return [ended[run] if run in ended else found[run] for run in range(len(experiments))]


def _started(startup: Startup, folders: Sequence[Path], console: Console, bar: "_Bar") -> None:
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


class _RoundsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–" if not speed else f"{speed:.2f} rounds/s")


class _Bar(NamedTuple):
    """The progress of runs on the screen."""

    progress: Progress
    task: TaskID
    name: str

    def describe(self, phase: str) -> None:
        """Names what takes its time before the first round is there."""
        self.progress.update(self.task, description=f"{escape(self.name)}: {phase}")

    def show(self, opened: Sequence[OpenRun]) -> None:
        """Shows how far the furthest is, and the best of their latest numbers."""
        latest = [found for run in opened if (found := run.headline) is not None]
        name = latest[0][0] if latest else ""
        values = [value for label, value in latest if label == name]
        shown = f"{name} {(min if name == 'perplexity' else max)(values):.4f}" if values else ""
        done = max(run.done for run in opened)
        self.progress.update(self.task, completed=done, headline=shown, description=escape(self.name))


@contextlib.contextmanager
def _progress(console: Console, experiments: Sequence[Experiment], done: int) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RoundsPerSecond(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[headline]}"),
    )
    config = experiments[0].config
    name = f"{config.name} (seed {config.seed})" if len(experiments) == 1 else f"{len(experiments)} runs together"
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(escape(name), total=config.rounds, completed=done, headline="")
        bar = _Bar(progress, task, name)
        bar.describe("compiling")
        yield bar
        progress.update(task, description=escape(name))
