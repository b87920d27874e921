"""A run with everything around it: run folder, records, checkpoints, progress, early stop, orderly end on a signal."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedjax_qp import config as configuration
from fedjax_qp import processes, records
from fedjax_qp.checkpoint import Checkpoints
from fedjax_qp.config import Config
from fedjax_qp.data import print_table, summary
from fedjax_qp.experiment import Experiment, advice, build, first_state, with_layout
from fedjax_qp.federated import FederatedState
from fedjax_qp.lanes import choose_layout
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.run_folder import OpenRun, begin_folder, lock_run, make_folder
from fedjax_qp.simulate import NonFiniteLoss, simulate_together
from fedjax_qp.startup import Startup
from fedjax_qp.trackers import check_trackers

DRIFT_LIMIT = 0.9


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
    folder = config.run_folder
    if (folder / "config.yaml").exists():
        raise ConfigurationError(
            f"{folder} already holds a run{_held(folder, config)}: continue it with `fedjax-qp resume {folder}`, or choose "
            "another name, seed or folder."
        )
    check_trackers(config)
    processes.meet("the folder is new")
    experiment = build(config)
    startup.done("data")
    make_folder(folder)
    experiment = _with_measured_lanes(experiment, folder, console, startup)
    print_table(summary(experiment.task.counts), console=console)
    for note in experiment.task.notes:
        console.print(note)
    begin_folder(experiment)
    return _alone(experiment, folder, first_state(experiment), console, startup)


def _with_measured_lanes(experiment: Experiment, folder: Path, console: Console, startup: Startup) -> Experiment:
    """Fixes the lanes where they are auto. The run's configuration keeps them, so that it measures but once."""
    if experiment.config.engine.lanes != "auto":
        return experiment
    choice = choose_layout([experiment])
    console.print(str(choice))
    if processes.first():
        choice.write(folder)
    startup.done("lanes")
    return with_layout(experiment, choice.lanes, choice.devices)


def _held(folder: Path, config: Config) -> str:
    """Of what algorithm a folder's run is, where it is not the one that was to go there."""
    held = configuration.load(folder / "config.yaml").algorithm.name
    return "" if held == config.algorithm.name else f" of another algorithm ({held})"


def resume(folder: Path, overrides: list[str] | None = None, console: Console | None = None) -> Outcome:
    """Continues a run from its newest checkpoint, with the configuration in its folder.

    Args:
      overrides: settings to change, for example `rounds=200`. Only settings that leave the past of the run valid may be
        changed; each one is reported.

    Raises:
      ConfigurationError: no run in the folder, or a change that would make the run inconsistent with its past.
    """
    console, startup = console or processes.console(), Startup()
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(f"{folder} holds no run (no config.yaml): start one with `fedjax-qp run CONFIG`.")
    config = configuration.load(file, overrides)
    changed = configuration.differences(configuration.to_dict(configuration.load(file)), configuration.to_dict(config))
    _check_changes(changed)
    _check_rounds(config, folder)
    check_trackers(config)
    experiment = build(config)
    startup.done("data")
    if changed:
        console.print("resuming with a changed configuration: " + "; ".join(changed))
    if any(change.startswith(_LAYOUT) for change in changed):
        console.print(
            "from here on its numbers equal those of an uninterrupted run up to rounding, not to the last bit"
        )
    with lock_run(folder):
        settled = _with_measured_lanes(experiment, folder, console, startup)  # auto after it began in a shared program
        if processes.first() and (changed or settled is not experiment):
            configuration.save(settled.config, file)
    experiment = settled
    like = first_state(experiment)
    with Checkpoints(folder / "checkpoints", keep=config.checkpoints.keep) as checkpoints:
        state = checkpoints.restore(like)
    if state is None:
        console.print("no checkpoint yet: starting from round 1")
        state = like
    return _alone(experiment, folder, state, console, startup)


def restore(folder: Path) -> tuple[Experiment, FederatedState]:
    """Reads a run and its newest checkpoint.

    Raises:
      ConfigurationError: no run in the folder, or no checkpoint yet.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(f"{folder} holds no run (no config.yaml): give the folder of one run.")
    experiment = build(configuration.load(file))
    with Checkpoints(folder / "checkpoints", keep=experiment.config.checkpoints.keep) as checkpoints:
        state = checkpoints.restore(first_state(experiment))
    if state is None:
        raise ConfigurationError(f"{folder} has no checkpoint yet: let it run, or `fedjax-qp resume {folder}`.")
    return experiment, state


# Settings that do not touch what has already been computed.
_LAYOUT = ("engine.lanes:", "engine.devices:", "engine.model_devices:", "engine.parallel:")  # another order of the sums
_STORES = ("engine.client_store", "engine.data_store", "engine.memory_gigabytes")
_MAY_CHANGE = ("rounds", "evaluation.", "checkpoints.", "tracking.", *_STORES, *_LAYOUT)


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
) -> list[Outcome]:
    """Runs experiments that share a program from their states to their ends.

    Args:
      folders: theirs, already begun. They need not be where the configurations say: a folder may have been moved.
      startup: runs since the beginning.
      stop: `(position, records so far) -> reason` to end a run early, or None; asked at the ends of chunks.
    """
    done = int(states[0].round)
    say = partial(console.print, markup=False, highlight=False)
    for warning in dict.fromkeys(warning for experiment in experiments for warning in advice(experiment)):
        say(f"warning: {warning}")
    with contextlib.ExitStack() as stack:
        pairs = zip(experiments, folders, strict=True)
        opened = [stack.enter_context(OpenRun(experiment.config, folder, done, say)) for experiment, folder in pairs]
        interrupted = stack.enter_context(_signals(console))
        progress, task = _progress(stack, console, experiments, done)
        stopped = {run for run, open_run in enumerate(opened) if open_run.reason is not None}
        started = partial(_report_startup, startup, folders, console)
        everybody = simulate_together(experiments, states, stopped, started) if len(stopped) < len(opened) else ()
        for number, chunks in enumerate(everybody, 1):
            asked = "interrupted" if processes.any_of(interrupted()) else None
            present = {run: chunk for run, chunk in enumerate(chunks) if chunk is not None}
            for run, chunk in present.items():  # all records first: whether one stops may depend on those of another
                opened[run].write(chunk)
            for run, chunk in present.items():
                if opened[run].ends(chunk, number, partial(stop, run), asked):
                    stopped.add(run)
            _warn_of_drift(console, opened)
            progress.update(task, completed=max(open_run.done for open_run in opened), accuracy=_best(opened))
            if asked:
                break
    for open_run in opened:
        open_run.say_end(console)
    return [Outcome(r.folder, r.done, r.reason or "finished", r.error) for r in opened]


def _report_startup(startup: Startup, folders: Sequence[Path], console: Console) -> None:
    startup.done("program")
    console.print(str(startup))
    if not processes.first():
        return
    for folder in folders:
        startup.write(folder)


def _warn_of_drift(console: Console, opened: Sequence[OpenRun]) -> None:
    """The mean mutation is a server momentum: at 1 and beyond it grows from round to round. Said once for each run."""
    for run in opened:
        worst = max(run.history, key=lambda line: line.get("mutation/drift_largest") or 0, default={})
        drift = worst.get("mutation/drift_largest") or 0
        if drift >= DRIFT_LIMIT and not run.warned:
            run.warned = True
            console.print(
                f"warning: the mutations' mean coefficient is {drift:.2f} in round {worst['round']}; from {DRIFT_LIMIT} on "
                "the run may diverge. Lower algorithm.alpha; FedQP's forms nearest and box also have algorithm.max_drift, "
                "form joint has algorithm.drift."
            )


def _best(opened: Sequence[OpenRun]) -> float:
    """The best of the runs' latest accuracies."""
    latest = [run.last_accuracy for run in opened]
    return max((accuracy for accuracy in latest if accuracy is not None), default=float("nan"))


@contextlib.contextmanager
def _signals(console: Console) -> Iterator:
    """Turns SIGINT and SIGTERM into a request to stop at the chunk's end; yields `requested()`."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        console.print(f"{signal.Signals(number).name}: finishing this chunk, then saving")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: somebody else owns the signals
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _RoundsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–" if not speed else f"{speed:.2f} rounds/s")


def _progress(stack: contextlib.ExitStack, console: Console, experiments: Sequence[Experiment], done: int) -> tuple:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RoundsPerSecond(),
        TimeRemainingColumn(),
        TextColumn("accuracy {task.fields[accuracy]:.4f}"),
    )
    progress = stack.enter_context(Progress(*columns, console=console))
    config = experiments[0].config
    name = f"{config.name} (seed {config.seed})" if len(experiments) == 1 else f"{len(experiments)} runs together"
    return progress, progress.add_task(name, total=config.rounds, completed=done, accuracy=float("nan"))
