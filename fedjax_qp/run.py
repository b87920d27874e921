"""A run with everything around it: run folder, records, checkpoints, progress, early stop, orderly end on a signal."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fedjax_qp import config as configuration
from fedjax_qp import records
from fedjax_qp.checkpoint import Checkpoints
from fedjax_qp.config import Config, Evaluation
from fedjax_qp.data import plot_partition, print_table, summary
from fedjax_qp.experiment import Experiment, build, environment, first_state, with_lanes
from fedjax_qp.federated import FederatedState
from fedjax_qp.lanes import LaneTrial, choose_lanes
from fedjax_qp.plots import plot_run
from fedjax_qp.records import Recorder
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.simulate import Chunk, NonFiniteLoss, simulate

FAILURE = "failure.json"  # in the folder of a run that diverged
DRIFT_LIMIT = 0.9


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    rounds: int  # finished
    reason: str  # "finished", "target reached", "no progress", "interrupted"


def run(config: Config, console: Console | None = None) -> Outcome:
    """Starts a run in a new folder.

    Raises:
      ConfigurationError: the configuration cannot work, or the folder already holds a run.
    """
    console = console or Console()
    folder = config.run_folder
    if (folder / "config.yaml").exists():
        raise ConfigurationError(
            f"{folder} already holds a run: continue it with `fedjax-qp resume {folder}`, or choose another name, seed or "
            "folder."
        )
    experiment = build(config)
    _make_folder(folder)
    if experiment.config.engine.lanes == "auto":
        lanes, trials = choose_lanes(experiment)
        _say_lanes(console, lanes, trials)
        experiment = with_lanes(experiment, lanes)
    task = experiment.task
    print_table(summary(task.counts), console=console)
    for note in task.notes:
        console.print(note)
    plot_partition(task.counts, folder / "partition.png", class_names=task.class_names)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2))
    configuration.save(experiment.config, folder / "config.yaml")  # last: its presence marks a run
    return _continue(experiment, folder, first_state(experiment), console)


def resume(folder: Path, overrides: list[str] | None = None, console: Console | None = None) -> Outcome:
    """Continues a run from its newest checkpoint, with the configuration in its folder.

    Args:
      overrides: settings to change, for example `rounds=200`. Only settings that leave the past of the run valid may be
        changed; each one is reported.

    Raises:
      ConfigurationError: no run in the folder, or a change that would make the run inconsistent with its past.
    """
    console = console or Console()
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(f"{folder} holds no run (no config.yaml): start one with `fedjax-qp run CONFIG`.")
    config = configuration.load(file, overrides)
    changed = configuration.differences(configuration.to_dict(configuration.load(file)), configuration.to_dict(config))
    _check_changes(changed)
    experiment = build(config)
    if changed:
        console.print("resuming with a changed configuration: " + "; ".join(changed))
        configuration.save(experiment.config, file)
    like = first_state(experiment)
    with Checkpoints(folder / "checkpoints", keep=config.checkpoints.keep) as checkpoints:
        state = checkpoints.restore(like)
    if state is None:
        console.print("no checkpoint yet: starting from round 1")
        state = like
    return _continue(experiment, folder, state, console)


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
_MAY_CHANGE = ("rounds", "evaluation.", "checkpoints.", "engine.client_store")


def _check_changes(changed: list[str]) -> None:
    refused = [change for change in changed if not change.startswith(_MAY_CHANGE)]
    if refused:
        raise ConfigurationError(
            f"resuming cannot change {'; '.join(refused)}: the rounds already run would not belong to the same run. "
            f"Allowed: {', '.join(name.rstrip('.') for name in _MAY_CHANGE)}. Start a new run for the rest."
        )


def _continue(experiment: Experiment, folder: Path, state: FederatedState, console: Console) -> Outcome:
    config = experiment.config
    done = int(state.round)
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(Recorder(folder, resume_round=done if done else None))
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", keep=config.checkpoints.keep))
        interrupted = stack.enter_context(_signals(console))
        progress, task = _progress(stack, console, config, done)
        warned = False
        history = [line for line in records.read(folder) if line["round"] <= done] if done else []
        stopped_before = _stop_reason(history, config.evaluation)  # an early-stopped run stays stopped
        reason = stopped_before or "finished"
        chunks = iter(()) if stopped_before else _noting_failure(simulate(experiment, state), folder)
        for index, chunk in enumerate(chunks):
            recorder.write(chunk.records)
            history += chunk.records
            warned = warned or _warn_of_drift(console, chunk.records)
            done = int(chunk.state.round)
            stop = _stop_reason(history, config.evaluation) or ("interrupted" if interrupted() else None)
            if stop or done == config.rounds or (index + 1) % config.checkpoints.every_chunks == 0:
                checkpoints.save(chunk.state, accuracy=chunk.records[-1].get("test_accuracy"))
            progress.update(task, completed=done, accuracy=_last_accuracy(chunk) or float("nan"))
            if stop:
                reason = stop
                break
        checkpoints.wait()
    plot_run(history, folder / "run.png")
    _say_end(console, config, folder, history, done, reason)
    return Outcome(folder, done, reason)


def _noting_failure(chunks: Iterator[Chunk], folder: Path) -> Iterator[Chunk]:
    """Leaves a file behind when training diverges, so that a sweep can tell it from an interruption."""
    (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield from chunks
    except NonFiniteLoss as error:
        (folder / FAILURE).write_text(json.dumps({"reason": "non-finite loss", "message": str(error)}))
        raise


def _stop_reason(history: list[dict], settings: Evaluation) -> str | None:
    target = settings.target_accuracy
    if settings.stop_at_target and target is not None and records.rounds_to_reach(history, target) is not None:
        return "target reached"
    accuracies = [line["test_accuracy"] for line in history if "test_accuracy" in line]
    if settings.patience is not None and len(accuracies) > settings.patience:
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        if len(accuracies) - 1 - best >= settings.patience:
            return "no progress"
    return None


def _warn_of_drift(console: Console, lines: list[dict]) -> bool:
    """The mean mutation is a server momentum: at 1 and beyond it grows from round to round."""
    worst = max(lines, key=lambda line: line.get("mutation/drift_largest") or 0)
    drift = worst.get("mutation/drift_largest") or 0
    if drift >= DRIFT_LIMIT:
        console.print(
            f"warning: the mutations' mean coefficient is {drift:.2f} in round {worst['round']}; from {DRIFT_LIMIT} on the "
            "run may diverge. Lower algorithm.alpha, or set algorithm.max_drift."
        )
    return drift >= DRIFT_LIMIT


def _last_accuracy(chunk: Chunk) -> float | None:
    return next((line["test_accuracy"] for line in reversed(chunk.records) if "test_accuracy" in line), None)


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


def _progress(stack: contextlib.ExitStack, console: Console, config: Config, done: int) -> tuple:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RoundsPerSecond(),
        TimeRemainingColumn(),
        TextColumn("accuracy {task.fields[accuracy]:.4f}"),
    )
    progress = stack.enter_context(Progress(*columns, console=console))
    name = f"{config.name} (seed {config.seed})"
    return progress, progress.add_task(name, total=config.rounds, completed=done, accuracy=float("nan"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"the run folder {folder} cannot be written ({error.strerror}): choose another one with folder=PATH."
        ) from None


def _say_lanes(console: Console, lanes: int, trials: list[LaneTrial]) -> None:
    listed = ", ".join(f"{trial.lanes}: {trial.round_seconds:.2f} s at {trial.use:.0%} use" for trial in trials)
    console.print(f"lanes: {lanes} (predicted round {listed})")


def _say_end(console: Console, config: Config, folder: Path, history: list[dict], done: int, reason: str) -> None:
    accuracies = [(line["test_accuracy"], line["round"]) for line in history if "test_accuracy" in line]
    if accuracies:
        best, last = max(accuracies), accuracies[-1]
        console.print(f"{reason} after round {done}: accuracy {last[0]:.4f}, best {best[0]:.4f} in round {best[1]}")
    target = config.evaluation.target_accuracy
    if target is not None:
        reached = records.rounds_to_reach(history, target)
        console.print(f"rounds to reach {target:.4f}: {'not reached' if reached is None else reached}")
    if reason == "interrupted":
        console.print(f"continue with: fedjax-qp resume {folder}")
    console.print(f"records, checkpoints and figures: {folder}")
