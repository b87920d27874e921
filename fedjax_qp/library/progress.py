"""How far several runs are: a table that a notebook updates in place, a line in a terminal."""

import contextlib
import html
import sys
from collections.abc import Sequence
from typing import Any

import rich.progress
from rich.console import Console

from fedjax_qp.config import Config
from fedjax_qp.runs.record_numbers import headline


class Progress:
    """A context manager that shows runs while they are trained."""

    def __init__(self, configs: Sequence[Config], *, shown: bool = True):
        self._configs = configs
        self._histories: list[list[dict]] = [[] for _ in configs]
        self._shown, self._phase = shown, ""
        self._stack = contextlib.ExitStack()

    def note(self, run: int, history: list[dict]) -> None:
        """Takes a run's records after a chunk; never ends it."""
        self._histories[run] = history
        self._show(self._latest(run))

    def describe(self, phase: str) -> None:
        """Names what takes its time before the first round is there; "" once it is over."""
        self._phase = phase
        self._show(phase or "training")

    def _show(self, description: str) -> None:
        if self._display is not None:
            self._display.update(self)
        if self._bar is not None:
            self._bar.update(self._task, completed=sum(map(len, self._histories)), description=description)

    def __enter__(self) -> "Progress":
        self._display = _notebook_display(self) if self._shown else None
        self._bar = None
        if self._shown and self._display is None:
            columns = rich.progress.Progress.get_default_columns()
            console = Console(stderr=True, force_jupyter=False)
            self._bar = self._stack.enter_context(rich.progress.Progress(*columns, console=console))
            total = sum(config.rounds for config in self._configs)
            self._task = self._bar.add_task(f"{len(self._configs)} runs", total=total)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _latest(self, run: int) -> str:
        """What is known of a run, in a few words."""
        config, history = self._configs[run], self._histories[run]
        found = next((named for line in reversed(history) if (named := headline(line)) is not None), None)
        value = "" if found is None or found[1] is None else f" {found[0]} {found[1]:.4f}"
        return f"{config.name}, seed {config.seed}: round {len(history)} of {config.rounds}{value}"

    def _repr_html_(self) -> str:
        lines = [
            f'<progress value="{len(history)}" max="{config.rounds}"></progress> {html.escape(self._latest(run))}'
            for run, (config, history) in enumerate(zip(self._configs, self._histories, strict=True))
        ]
        return "<br>".join([*lines, *([self._phase] if self._phase else [])])


def _notebook_display(shown: Progress) -> Any:
    """The place of a notebook's output that can be updated; None outside of a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    return display(shown, display_id=True) if hasattr(get_ipython(), "kernel") else None
