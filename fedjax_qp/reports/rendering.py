"""Comparisons as text: tables for the terminal, Markdown and JSON, with their notes."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from fedjax_qp.console.tables import TextTable, without_empty
from fedjax_qp.reports.compare import Row, Spread

_MISSING, _BROKEN = "–", "not finite"


def table(rows: list[Row]) -> TextTable:
    """A table for the terminal; unequal settings are named below it."""
    return TextTable(*grid(rows), notes=notes(rows))


def to_markdown(rows: list[Row]) -> str:
    """The same table in Markdown."""
    remarks = [f"- {note}" for note in notes(rows)]
    return "\n".join([*markdown_lines(*grid(rows)), *([""] if remarks else []), *remarks]) + "\n"


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> list[str]:
    """The lines of a Markdown table; the columns `words` hold names, the others numbers."""
    rules = [":--" if column in words else "--:" for column in range(len(headings))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (headings, rules, *rows)]
    return ["| " + " | ".join(line) + " |" for line in escaped]


def to_json(rows: list[Row]) -> str:
    """All numbers of the rows, unrounded."""
    return json.dumps([as_dict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_dict(value: Any) -> Any:
    """Named tuples as dicts, also inside of other values; None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple) and (named := getattr(value, "_asdict", None)) is not None:
        return {key: as_dict(item) for key, item in named().items()}
    if isinstance(value, Mapping):
        return {key: as_dict(item) for key, item in value.items()}
    return value


def grid(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings of the table of these rows, and each row's cells; columns in which nothing stands are left out."""
    first = rows[0]
    target = "" if first.reached is None else f"rounds to {100 * first.reached.target:g} %"
    baselines = [row.difference.baseline for row in rows if row.difference is not None]
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.method,
        "seeds": lambda row: str(len(row.seeds)),
        f"perplexity, last {first.last}": lambda row: _shown(row.perplexity),
        f"accuracy, last {first.last} (%)": lambda row: _shown(row.accuracy, scale=100),
        "final (%)": lambda row: _shown(row.final, scale=100),
        "best (%)": lambda row: _shown(row.best, scale=100),
        "worst decile (%)": lambda row: _shown(row.worst_decile, scale=100),
        **{test_heading(name): partial(_shown_test, name) for row in rows for name in row.tests},
        target: _shown_rounds,
        **{label: partial(_shown_watched, label) for row in rows for label in row.watched},
        f"minus {(baselines or [''])[0]} (points)": _shown_difference,
    }
    return without_empty(list(columns), [[cell(row) for cell in columns.values()] for row in rows], _MISSING)


def test_heading(name: str) -> str:
    """What a number of the tests is called in tables and figures."""
    return {"test_r2": "R²", "test_f1": "F1", "test_auc": "AUC", "test_mse": "MSE"}.get(name, name.replace("_", " "))


def _shown_test(name: str, row: Row) -> str:
    found = row.tests.get(name)
    return _shown(found, digits=4 if found is not None and abs(found.mean) < 10 else 2)


def _shown_watched(label: str, row: Row) -> str:
    return _shown(row.watched.get(label))


def _shown_rounds(row: Row) -> str:
    if row.reached is None:
        return _MISSING
    median = _MISSING if row.reached.median is None else f"{row.reached.median:g}"
    return f"{median} ({row.reached.seeds} of {len(row.seeds)})"


def _shown_difference(row: Row) -> str:
    points = None if row.difference is None else row.difference.points
    count = "" if points is None or points.seeds == len(row.seeds) else f" ({points.seeds} seeds)"
    return _shown(points, sign="+") + count


def _shown(spread: Spread | None, *, scale: float = 1, sign: str = "", digits: int = 2) -> str:
    if spread is None:
        return _MISSING
    if not math.isfinite(spread.mean):
        return _BROKEN
    mean = f"{scale * spread.mean:{sign}.{digits}f}"
    return mean if spread.std is None else f"{mean} ± {scale * spread.std:.{digits}f}"


def notes(rows: list[Row]) -> list[str]:
    """Where the comparison is not an equal one, and what else a reader must know."""
    baselines = [row.difference.baseline for row in rows if row.difference is not None]
    reference = (baselines or [row.method for row in rows])[0]
    single = [row.method for row in rows if len(row.seeds) == 1]
    return [
        *(f"Incomplete: {row.method}, {', '.join(row.unfinished)}." for row in rows if row.unfinished),
        *(
            f"Settings differ: {reference} → {row.method} differs in {'; '.join(row.unequal)}."
            for row in rows
            if row.unequal
        ),
        *(f"{row.method}: {remark}" for row in rows for remark in row.remarks),
        *([f"One seed, so no spread: {', '.join(single)}."] if single else []),
    ]
