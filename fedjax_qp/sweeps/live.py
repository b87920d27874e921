"""The table on the screen while a sweep runs. It reads the run folders, so it works wherever the workers are."""

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedjax_qp.sweeps.results import Row, summarise, table
from fedjax_qp.sweeps.stopping import Curves
from fedjax_qp.sweeps.trials import Store

_MOST_ROWS = 20
_SHARE = 0.1  # of the time may go into reading the folders
_SHOWN_FIRST = {"running": 0, "complete": 1, "stopped": 2}


class LiveTable:
    """Shows how the trials stand; where the output is no terminal, one line for each trial that ends."""

    def __init__(self, store: Store, curves: Curves, console: Console):
        self._store, self._curves, self._console = store, curves, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._begin = time.monotonic()
        self._next = 0.0
        self._named = {row.trial.number for row in summarise(store, curves) if _ended(row)}

    def update(self) -> None:
        """Reads the folders, unless it did so a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return
        rows = summarise(self._store, self._curves)
        for row in rows:
            if _ended(row) and row.trial.number not in self._named:
                self._named.add(row.trial.number)
                self._say_ended(row, len(rows))
        if self._live is not None:
            self._live.update(self._picture(rows), refresh=True)
        took = time.monotonic() - now
        self._next = now + took / _SHARE  # many trials are looked at less often

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _say_ended(self, row: Row, trials: int) -> None:
        if self._live is None:
            value = "" if row.value is None else f", {self._store.sweep.rank.metric} {row.value.mean:.4g}"
            self._console.print(
                f"{len(self._named)} of {trials} trials: {row.trial.number} ({row.label}) {row.status}{value}",
                highlight=False,
                soft_wrap=True,
            )

    def _picture(self, rows: list[Row]) -> Group:
        first = sorted(rows, key=lambda row: _SHOWN_FIRST.get(row.status, 3))
        ended = sum(_ended(row) for row in rows)
        running = sum(row.status == "running" for row in rows)
        minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
        line = (
            f"{ended} of {len(rows)} trials ended, {running} running, {minutes}:{seconds:02d}; Ctrl-C saves and stops"
        )
        return Group(table(self._store.sweep, first, most=_MOST_ROWS), Text(line))


def _ended(row: Row) -> bool:
    return row.status not in ("running", "waiting")
