"""Tables for the terminal that break lines between words only, however narrow it is."""

import textwrap
from collections.abc import Collection, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2  # between two columns


class TextTable:
    """Rows of text under headings.

    Headings, and names in the columns `words`, go on in further lines where the terminal is narrow. Where that is not enough
    every row becomes a block, with a line for each of its columns. Nothing in a cell is taken for markup.
    """

    def __init__(
        self,
        headings: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        notes: Sequence[str] = (),
        words: Collection[int] = (0,),
    ):
        self.headings, self.rows = list(headings), [list(row) for row in rows]
        self._title, self._notes, self._words = title, notes, words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._title:
            yield Text(self._title, style="italic")
        widths = self._widths(options.max_width)
        yield self._blocks(options.max_width) if widths is None else self._table(widths)
        for note in self._notes:
            yield Text(note, style="yellow")

    def _widths(self, available: int) -> list[int] | None:
        """Of the columns; None where they do not fit."""
        columns = [[row[place] for row in self.rows] for place in range(len(self.headings))]
        least, widths = [], []
        for place, (heading, column) in enumerate(zip(self.headings, columns, strict=True)):
            cells = [_longest_word(cell) if place in self._words else cell_len(cell) for cell in column]
            least.append(max([_longest_word(heading), *cells]))
            widths.append(max([least[-1], *map(cell_len, column)]))
        excess = sum(widths) + _GAP * (len(widths) - 1) - available
        for place in self._words:
            saved = min(max(excess, 0), widths[place] - least[place])
            widths[place] -= saved
            excess -= saved
        return None if excess > 0 else widths

    def _table(self, widths: list[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        for place, (heading, width) in enumerate(zip(self.headings, widths, strict=True)):
            justify = "left" if place in self._words else "right"
            table.add_column(_wrapped(heading, width), justify=justify, no_wrap=True, vertical="bottom")
        for row in self.rows:
            table.add_row(*(_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)))
        return table

    def _blocks(self, available: int) -> Text:
        width = max(map(cell_len, self.headings[1:]), default=0)
        lines = []
        for name, *cells in self.rows:
            lines += textwrap.wrap(name, available, break_on_hyphens=False) or [""]
            lines += [f"  {heading:{width}}  {cell}" for heading, cell in zip(self.headings[1:], cells, strict=True)]
        return Text("\n".join(lines))


def without_empty(
    headings: Sequence[str], rows: Sequence[Sequence[str]], missing: str
) -> tuple[list[str], list[list[str]]]:
    """The table without the columns in which nothing stands."""
    kept = [place for place in range(len(headings)) if any(row[place] != missing for row in rows)]
    return [headings[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _wrapped(text: str, width: int) -> Text:
    lines = (
        textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) if cell_len(text) > width else [text]
    )
    return Text("\n".join(lines))
