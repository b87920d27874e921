"""The folder of one run while it is written: configuration, records, checkpoints, and when to stop."""

import contextlib
import json
import numbers
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp import plugins
from fedjax_qp.config import Config, Evaluation
from fedjax_qp.data import plot_partition
from fedjax_qp.experiment import Experiment
from fedjax_qp.files import lock_folder, read_mark, remove_partial, write_json, writing
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports.plots import plot_run
from fedjax_qp.runs import processes, records, watched
from fedjax_qp.runs.checkpoint import Checkpoints
from fedjax_qp.runs.environment import environment
from fedjax_qp.runs.loop import Chunk, NonFiniteLoss
from fedjax_qp.runs.provenance import Provenance
from fedjax_qp.runs.records import ENDED, FAILURE, Recorder
from fedjax_qp.runs.trackers import Trackers

SHARED = "together.json"  # in the folder of a run that shares its program: how
# One line per chunk: its last round, and the seconds since the previous chunk or the start.
TIMES = "times.jsonl"


def make_folder(folder: Path) -> None:
    """Creates a run's folder, as does every process.

    Raises:
      ConfigurationError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"the run folder {folder} cannot be written ({error.strerror}): choose another one with folder=PATH."
        ) from None


def begin_folder(experiment: Experiment, made_of: Provenance) -> None:
    """Writes what is known before the first round; for the first process."""
    folder, task = experiment.config.run_folder, experiment.task
    with writing(folder / "partition.png"):
        plot_partition(task.counts, folder / "partition.png", class_names=task.class_names)
    write_json(folder / "environment.json", environment())
    plugins.keep(folder, experiment.config.plugins)
    made_of.write(folder)
    watched.write(folder, experiment.algorithm.watch)
    configuration.save(experiment.config, folder / "config.yaml")  # last: its presence marks a run


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a run; of several that share the run the first one does.

    Raises:
      ConfigurationError: another process continues the run.
    """
    with contextlib.ExitStack() as held:
        with processes.in_common():
            if processes.first():
                held.enter_context(lock_folder(folder, "run.lock", "continues the run"))
                remove_partial(folder)
        yield


def restorable(folder: Path, checkpoints: Checkpoints) -> list[int]:
    """The rounds of a run's checkpoints that it can go on from, the newest first; none where it begins with round 1.

    Records are on the disk before a checkpoint is saved, so those of every checkpoint's rounds must be there.

    Raises:
      ConfigurationError: the run has checkpoints, but its records do not reach to any of them; or the other way about.
    """
    lines = records.read(folder) if (folder / records.FILE).exists() else []
    stored = checkpoints.rounds()[::-1]
    covered = [
        round for round in stored if records.gap([line for line in lines if line["round"] <= round], round) is None
    ]
    if stored and not covered:
        lost = records.gap([line for line in lines if line["round"] <= stored[0]], stored[0])
        raise ConfigurationError(
            f"{folder / records.FILE} is not complete ({lost}): restore the file from a backup, or delete {folder} to "
            "compute every round again."
        )
    # The first checkpoint may still be under way when the second is due, and no later; the last one comes after the mark of
    # the run's end, which therefore says nothing of it. What counts are the settings that the records were made with.
    made_with = configuration.load(folder / "config.yaml")
    unsaved = 2 * made_with.checkpoints.every_chunks * made_with.engine.rounds_per_chunk
    if not stored and lines and lines[-1]["round"] > unsaved:
        raise ConfigurationError(
            f"{folder} has records of {lines[-1]['round']} rounds, but no checkpoint: restore {folder / 'checkpoints'} "
            "from a backup, or delete the run's folder to compute every round again."
        )
    return covered


def shared_its_program(folder: Path) -> bool:
    """Whether a run was last computed in one program with others."""
    runs = (read_mark(folder / SHARED) or {}).get("runs")
    return type(runs) is int and runs > 1


def read_ended(folder: Path) -> tuple[str, int] | None:
    """Why a run goes no further and after which round; None while it does, and where its last state was never saved."""
    found = read_mark(folder / ENDED) or {}
    reason, round = found.get("reason"), found.get("round")
    if not isinstance(reason, str) or type(round) is not int:
        return None
    return (reason, round) if reason == "diverged" or (folder / "checkpoints" / str(round)).is_dir() else None


class OpenRun:
    """A run under way. A context manager: leaving it waits for the last checkpoint and draws the run's figure.

    Of several processes the first one writes; the others follow, to come to the same decisions.
    """

    def __init__(self, config: Config, folder: Path, done: int, report: Callable[[str], None] = print, least: int = 1):
        """Opens a folder that the caller has locked.

        Args:
          done: rounds that the state to go on from has finished.
          report: takes what the user must know of a tracker.
          least: checkpoints that are kept even where the configuration wants fewer.
        """
        self.config, self.folder, self.done = config, folder, done
        self._writes = processes.first()
        with processes.in_common():  # before the first process cuts the records off
            self.history = [line for line in records.read(self.folder) if line["round"] <= done] if done else []
        finished = "finished" if done >= config.rounds else None
        self.reason = stop_reason(self.history, self.config.evaluation) or finished  # an ended run stays ended
        with processes.in_common():
            self._recorder = Recorder(self.folder, resume_round=done or None) if self._writes else None
            self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=max(least, config.checkpoints.keep))
            if self.reason is not None:
                self._mark_end()
            elif self._writes:
                for mark in (FAILURE, ENDED):
                    (self.folder / mark).unlink(missing_ok=True)
        self.error: NonFiniteLoss | None = None
        self.warned: set[str] = set()  # metrics
        self._trackers = Trackers(config, folder, self.history, report) if self._writes else None
        self._since, self._first = time.monotonic(), True

    def write(self, chunk: Chunk | NonFiniteLoss) -> None:
        """Writes a chunk's records, or the mark of a run that diverged."""
        if isinstance(chunk, NonFiniteLoss):
            self.reason, self.error = "diverged", chunk
            if self._writes:  # left behind so that a sweep can tell it from an interruption
                write_json(self.folder / FAILURE, {"reason": "non-finite loss", "message": str(chunk)})
            self._mark_end()
            return
        self.history += chunk.records
        self.done = int(chunk.state.round)
        if self._recorder is not None and self._trackers is not None:
            self._recorder.write(chunk.records)
            self._note_time(len(chunk.records))
            self._trackers.write(chunk.records)

    def _note_time(self, rounds: int) -> None:
        """Apart from the records, which are the same bytes whenever they are computed."""
        now = time.monotonic()
        line = {"round": self.done, "rounds": rounds, "seconds": round(now - self._since, 3), "first": self._first}
        with writing(self.folder / TIMES), (self.folder / TIMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._since, self._first = now, False

    def settle(self) -> None:
        """Returns when the last checkpoint is on the disk."""
        self._checkpoints.wait()

    def ends(self, chunk: Chunk | NonFiniteLoss, stop: Callable[[list[dict]], str | None], asked: str | None) -> bool:
        """Whether the run ends after a chunk that is written; saves a checkpoint where one is due or it does.

        Args:
          stop: gives a reason to end the run early, or None.
          asked: the same from outside.
        """
        if isinstance(chunk, NonFiniteLoss):
            return True
        self.reason = stop_reason(self.history, self.config.evaluation)
        if self.reason is None:  # where all rounds are done there is nothing left to stop
            self.reason = "finished" if self.done == self.config.rounds else asked or stop(self.history)
        # The mark comes first and counts for nothing without its checkpoint: so after a kill a run either has ended, with all
        # that it leaves, or computes its last chunk again.
        if self.reason is not None:
            with processes.in_common():
                self._mark_end()
        number = -(-self.done // self.config.engine.rounds_per_chunk)  # of the chunk, wherever this process began
        if self.reason or number % self.config.checkpoints.every_chunks == 0:
            self._checkpoints.save(chunk.state, accuracy=chunk.records[-1].get("test_accuracy"))
        return self.reason is not None

    def _mark_end(self) -> None:
        if self._writes and self.reason not in (None, "interrupted"):
            write_json(self.folder / ENDED, {"reason": self.reason, "round": self.done})

    @property
    def headline(self) -> tuple[str, float] | None:
        """The latest number that the run is judged by, with its name."""
        return next(reversed([(name, value) for _, name, value in self._headlines()]), None)

    def _headlines(self) -> list[tuple[int, str, float]]:
        """Of each evaluation that gave a finite number its round, the number's name, and the number."""
        found = [(line["round"], *named) for line in self.history if (named := records.headline(line)) is not None]
        return [(round, name, value) for round, name, value in found if isinstance(value, numbers.Real)]

    def say_end(self, console: Console) -> None:
        """Prints how it went and what to do next."""
        said = f"{self.reason or 'finished'} after round {self.done}"
        if found := self._headlines():
            _, name, last = found[-1]
            best = (min if name == "perplexity" else max)(found, key=lambda one: one[2])
            said += f": {name} {last:.4f}, best {best[2]:.4f} in round {best[0]}"
        console.print(said, highlight=False, markup=False)
        if (broken := records.nonfinite_tests(self.history)) is not None:
            console.print(f"warning: {broken}", markup=False, highlight=False)
        target = self.config.evaluation.target_accuracy
        if target is not None:
            reached = records.rounds_to_reach(self.history, target)
            console.print(f"rounds to reach {target:.4f}: {'not reached' if reached is None else reached}")
        if self.reason == "interrupted":
            console.print(f"continue with: fedjax-qp resume {self.folder}", markup=False)
        console.print(f"records, checkpoints and figures: {self.folder}", markup=False)

    def __enter__(self) -> "OpenRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._checkpoints.close()
        finally:
            if self._recorder is not None and self._trackers is not None:
                self._recorder.close()
                self._trackers.close(self.reason if error is None else None)
        if self._writes and error is None and self.history:
            with writing(self.folder / "run.png"):
                title = f"{self.config.name}, seed {self.config.seed}, {self.config.algorithm.name}"
                plot_run(self.history, self.folder / "run.png", title=title, watched=watched.read(self.folder))


def stop_reason(history: list[dict], settings: Evaluation) -> str | None:
    """Why a run with these records goes no further, by its own settings; None while it does."""
    target = settings.target_accuracy
    if settings.stop_at_target and target is not None and records.rounds_to_reach(history, target) is not None:
        return "target reached"
    accuracies = [line["test_accuracy"] for line in history if line.get("test_accuracy") is not None]
    if settings.patience is not None and len(accuracies) > settings.patience:
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        if len(accuracies) - 1 - best >= settings.patience:
            return "no progress"
    return None
