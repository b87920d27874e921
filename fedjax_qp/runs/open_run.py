"""A run under way: what it writes into its folder, and when it stops."""

import contextlib
import numbers
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console

from fedjax_qp.config import Config, Evaluation
from fedjax_qp.data import plot_partition
from fedjax_qp.experiment import Experiment
from fedjax_qp.files import writing
from fedjax_qp.reports.plots import plot_run
from fedjax_qp.runs import processes, record_numbers
from fedjax_qp.runs.environment import environment
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.loop import Chunk, NonFiniteLoss
from fedjax_qp.runs.provenance import Provenance
from fedjax_qp.runs.times import Time
from fedjax_qp.runs.trackers import Trackers
from fedjax_qp.settings import plugins


def begin_folder(experiment: Experiment, made_of: Provenance) -> None:
    """Writes what is known before the first round; for the first process."""
    folder, task = RunFolder(experiment.config.run_folder), experiment.task
    with writing(folder.partition_figure):
        plot_partition(task.counts, folder.partition_figure, class_names=task.class_names)
    folder.environment.write(environment())
    plugins.keep(folder.plugins, experiment.config.plugins)
    made_of.write(folder)
    folder.save_watches(experiment.algorithm.watch)
    folder.save_config(experiment.config)  # last: its presence marks a run


@contextlib.contextmanager
def lock_run(folder: RunFolder) -> Iterator[None]:
    """Keeps other processes from writing to a run; of several that share the run the first one does.

    Raises:
      ConfigurationError: another process continues the run.
    """
    with contextlib.ExitStack() as held:
        with processes.in_common():
            if processes.first():
                held.enter_context(folder.lock())
        yield


class OpenRun:
    """A run under way. A context manager: leaving it waits for the last checkpoint and draws the run's figure.

    Of several processes the first one writes; the others follow, to come to the same decisions.
    """

    def __init__(
        self, config: Config, folder: RunFolder, done: int, report: Callable[[str], None] = print, least: int = 1
    ):
        """Opens a folder that the caller has locked.

        Args:
          done: rounds that the state to go on from has finished.
          report: takes what the user must know of a tracker.
          least: checkpoints that are kept even where the configuration wants fewer.
        """
        self.config, self.folder, self.done = config, folder, done
        self._writes = processes.first()
        with processes.in_common():  # before the first process cuts the records off
            self.history = [line for line in self.folder.records() if line["round"] <= done] if done else []
        finished = "finished" if done >= config.rounds else None
        self.reason = stop_reason(self.history, self.config.evaluation) or finished  # an ended run stays ended
        with processes.in_common():
            self._recorder = self.folder.recorder(done or None) if self._writes else None
            self._checkpoints = self.folder.checkpoints(keep=max(least, config.checkpoints.keep))
            if self.reason is not None:
                self._mark_end()
            elif self._writes:
                self.folder.clear_marks()
        self.error: NonFiniteLoss | None = None
        self.warned: set[str] = set()  # metrics
        self._trackers = Trackers(config, folder.path, self.history, report) if self._writes else None
        self._since, self._first = time.monotonic(), True

    def write(self, chunk: Chunk | NonFiniteLoss) -> None:
        """Writes a chunk's records, or the mark of a run that diverged."""
        if isinstance(chunk, NonFiniteLoss):
            self.reason, self.error = "diverged", chunk
            if self._writes:
                self.folder.mark_failure(str(chunk))
            self._mark_end()
            return
        self.history += chunk.records
        self.done = int(chunk.state.round)
        if self._recorder is not None and self._trackers is not None:
            self._recorder.write(chunk.records)
            self._note_time(len(chunk.records))
            self._trackers.write(chunk.records)

    def _note_time(self, rounds: int) -> None:
        now = time.monotonic()
        self.folder.times.append(Time(self.done, rounds, round(now - self._since, 3), self._first))
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
        if self._writes and self.reason is not None and self.reason != "interrupted":
            self.folder.mark_end(self.reason, self.done)

    @property
    def headline(self) -> tuple[str, float] | None:
        """The latest number that the run is judged by, with its name."""
        return next(reversed([(name, value) for _, name, value in self._headlines()]), None)

    def _headlines(self) -> list[tuple[int, str, float]]:
        """Of each evaluation that gave a finite number its round, the number's name, and the number."""
        found = [
            (line["round"], *named) for line in self.history if (named := record_numbers.headline(line)) is not None
        ]
        return [(round, name, value) for round, name, value in found if isinstance(value, numbers.Real)]

    def say_end(self, console: Console) -> None:
        """Prints how it went and what to do next."""
        said = f"{self.reason or 'finished'} after round {self.done}"
        if found := self._headlines():
            _, name, last = found[-1]
            best = (min if name == "perplexity" else max)(found, key=lambda one: one[2])
            said += f": {name} {last:.4f}, best {best[2]:.4f} in round {best[0]}"
        console.print(said, highlight=False, markup=False)
        if (broken := record_numbers.nonfinite_tests(self.history)) is not None:
            console.print(f"warning: {broken}", markup=False, highlight=False)
        target = self.config.evaluation.target_accuracy
        if target is not None:
            reached = record_numbers.rounds_to_reach(self.history, target)
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
            with writing(self.folder.figure):
                title = f"{self.config.name}, seed {self.config.seed}, {self.config.algorithm.name}"
                plot_run(self.history, self.folder.figure, title=title, watched=self.folder.watches())


def stop_reason(history: list[dict], settings: Evaluation) -> str | None:
    """Why a run with these records goes no further, by its own settings; None while it does."""
    target = settings.target_accuracy
    if settings.stop_at_target and target is not None and record_numbers.rounds_to_reach(history, target) is not None:
        return "target reached"
    accuracies = [line["test_accuracy"] for line in history if line.get("test_accuracy") is not None]
    if settings.patience is not None and len(accuracies) > settings.patience:
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        if len(accuracies) - 1 - best >= settings.patience:
            return "no progress"
    return None
