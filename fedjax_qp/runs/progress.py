"""The progress of runs on the screen."""

import contextlib
from collections.abc import Iterator, Sequence
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

from fedjax_qp.experiment import Experiment
from fedjax_qp.runs.open_run import OpenRun


class _RoundsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–" if not speed else f"{speed:.2f} rounds/s")


class Bar(NamedTuple):
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
def progress(console: Console, experiments: Sequence[Experiment], done: int) -> Iterator[Bar]:
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
        bar = Bar(progress, task, name)
        bar.describe("compiling")
        yield bar
        progress.update(task, description=escape(name))
