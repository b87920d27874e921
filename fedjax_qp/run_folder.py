"""The folder of one run while it is written: configuration, records, checkpoints, and when to stop."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp import processes, records
from fedjax_qp.checkpoint import Checkpoints
from fedjax_qp.config import Config, Evaluation
from fedjax_qp.data import plot_partition
from fedjax_qp.experiment import Experiment, environment
from fedjax_qp.locks import lock_folder
from fedjax_qp.plots import plot_run
from fedjax_qp.records import ENDED, FAILURE, Recorder
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.simulate import Chunk, NonFiniteLoss
from fedjax_qp.trackers import Trackers

TIMES = (
    "times.jsonl"  # a line a chunk: its last round, and seconds since the one before it, or since the process began it
)


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


def begin_folder(experiment: Experiment) -> None:
    """Writes what is known before the first round."""
    if not processes.first():
        return
    folder, task = experiment.config.run_folder, experiment.task
    plot_partition(task.counts, folder / "partition.png", class_names=task.class_names)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2))
    configuration.save(experiment.config, folder / "config.yaml")  # last: its presence marks a run


def lock_run(folder: Path) -> contextlib.ExitStack:
    """Keeps other processes from writing to a run until it is closed; of several that share the run the first one does.

    Raises:
      ConfigurationError: another process continues the run.
    """
    held = contextlib.ExitStack()
    if processes.first():
        held.enter_context(lock_folder(folder, "run.lock", "continues the run"))
    return held


class OpenRun:
    """A run under way. A context manager: leaving it waits for the last checkpoint and draws the run's figure.

    Of several processes the first one writes; the others follow, to come to the same decisions.
    """

    def __init__(self, config: Config, folder: Path, done: int, report: Callable[[str], None] = print):
        """Args:
        done: rounds that the state to go on from has finished.
        report: takes what the user must know of a tracker.
        """
        self.config, self.folder, self.done = config, folder, done
        self._writes = processes.first()
        self._lock = lock_run(folder)
        self.history = [line for line in records.read(self.folder) if line["round"] <= done] if done else []
        processes.meet("the records are read")  # before the first process cuts them off
        self._recorder = Recorder(self.folder, resume_round=done or None) if self._writes else None
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.config.checkpoints.keep)
        finished = "finished" if done >= config.rounds else None
        self.reason = stop_reason(self.history, self.config.evaluation) or finished  # an ended run stays ended
        if self._writes and self.reason is None:
            for mark in (FAILURE, ENDED):
                (self.folder / mark).unlink(missing_ok=True)
        self.error: NonFiniteLoss | None = None
        self.warned = False
        self._trackers = Trackers(config, folder, self.history, report) if self._writes else None
        self._since, self._first = time.monotonic(), True

    def write(self, chunk: Chunk | NonFiniteLoss) -> None:
        """Writes a chunk's records, or the mark of a run that diverged."""
        if isinstance(chunk, NonFiniteLoss):
            if self._writes:  # left behind so that a sweep can tell it from an interruption
                (self.folder / FAILURE).write_text(json.dumps({"reason": "non-finite loss", "message": str(chunk)}))
            self.reason, self.error = "diverged", chunk
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
        with (self.folder / TIMES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._since, self._first = now, False

    def ends(
        self,
        chunk: Chunk | NonFiniteLoss,
        number: int,
        stop: Callable[[list[dict]], str | None],
        asked: str | None,
    ) -> bool:
        """Whether the run ends after a chunk that is written; saves a checkpoint where one is due or it does.

        Args:
          number: of the chunk, from 1.
          stop: gives a reason to end the run early, or None.
          asked: the same from outside.
        """
        if isinstance(chunk, NonFiniteLoss):
            return True
        self.reason = stop_reason(self.history, self.config.evaluation)
        if self.reason is None:  # where all rounds are done there is nothing left to stop
            self.reason = "finished" if self.done == self.config.rounds else asked or stop(self.history)
        if self.reason or number % self.config.checkpoints.every_chunks == 0:
            self._checkpoints.save(chunk.state, accuracy=chunk.records[-1].get("test_accuracy"))
        return self.reason is not None

    @property
    def last_accuracy(self) -> float | None:
        return next((line["test_accuracy"] for line in reversed(self.history) if "test_accuracy" in line), None)

    def say_end(self, console: Console) -> None:
        """Prints how it went and what to do next."""
        accuracies = [(line["test_accuracy"], line["round"]) for line in self.history if "test_accuracy" in line]
        if accuracies:
            best, last = max(accuracies), accuracies[-1]
            console.print(
                f"{self.reason or 'finished'} after round {self.done}: accuracy {last[0]:.4f}, best {best[0]:.4f} in round "
                f"{best[1]}"
            )
        if (broken := records.nonfinite_tests(self.history)) is not None:
            console.print(f"warning: {broken}", markup=False, highlight=False)
        target = self.config.evaluation.target_accuracy
        if target is not None:
            reached = records.rounds_to_reach(self.history, target)
            console.print(f"rounds to reach {target:.4f}: {'not reached' if reached is None else reached}")
        if self.reason == "interrupted":
            console.print(f"continue with: fedjax-qp resume {self.folder}")
        console.print(f"records, checkpoints and figures: {self.folder}")

    def __enter__(self) -> "OpenRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpoints.close()
        if self._recorder is None or self._trackers is None:
            return
        self._recorder.close()
        self._trackers.close(self.reason if error is None else None)
        if self.reason not in (None, "interrupted"):
            (self.folder / ENDED).write_text(json.dumps({"reason": self.reason, "round": self.done}))
        if error is None and self.history:
            plot_run(self.history, self.folder / "run.png")
        self._lock.close()


def stop_reason(history: list[dict], settings: Evaluation) -> str | None:
    """Why a run with these records goes no further, by its own settings; None while it does."""
    target = settings.target_accuracy
    if settings.stop_at_target and target is not None and records.rounds_to_reach(history, target) is not None:
        return "target reached"
    accuracies = [line["test_accuracy"] for line in history if "test_accuracy" in line]
    if settings.patience is not None and len(accuracies) > settings.patience:
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        if len(accuracies) - 1 - best >= settings.patience:
            return "no progress"
    return None
