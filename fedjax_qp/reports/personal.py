"""Compares runs in which every client has tests of its own, and what it cost: perplexities of language models, accuracies of
all others.

Two views of a client are never mixed: "aggregated", the model it has after the server's last aggregation, and "tuned", as it
left its own training. A method is compared with the baseline in the same view, seed by seed (Δ: perplexities in per cent,
accuracies in points).
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fedjax_qp.console.tables import TextTable, without_empty
from fedjax_qp.reports.compare import (
    Method,
    Run,
    Spread,
    methods,
    named,
    over_common_rounds,
    series,
    spread,
)
from fedjax_qp.reports.rendering import as_dict, markdown_lines

VIEWS = {"aggregated": "personal", "tuned": "tuned"}  # our word: the key in a record


class PersonalRow(NamedTuple):
    """One method in the last evaluation; None where nothing was recorded, NaN where it is not finite."""

    method: str
    seeds: list[int]
    language: bool  # all below are perplexities, otherwise accuracies (shares, 0 to 1)
    common: Spread | None  # the server's model on the common test set
    perplexity: dict[str, Spread | None]  # by view, mean over clients
    accuracy: dict[str, Spread | None]  # likewise; language models have both
    worst: dict[str, Spread | None]  # by view, of the worst client
    change: dict[str, Spread | None]  # by view, above the baseline, paired by seed: per cent, of accuracies points
    trained_entries: (
        float | None
    )  # of a client's adapters; this and the bytes are means over clients and rounds, then seeds
    upload_bytes: float | None  # of a client and round
    download_bytes: float | None


def has_personal(runs: Iterable[Run]) -> bool:
    """Whether any run tested its clients one by one."""
    return any("personal" in record for run in runs for record in run.records)


def personal_summary(runs: Iterable[Run], *, baseline: str | None = None) -> list[PersonalRow]:
    """Summarises each method over its seeds.

    Raises:
      ConfigurationError: no method is named like the baseline.
    """
    found = methods(over_common_rounds(list(runs)))
    base = None if baseline is None else named(found, baseline)
    language = any("perplexity" in record.get("personal", {}) for method in found for record in _records(method))
    return [_row(method, base, language) for method in found]


def personal_table(rows: Sequence[PersonalRow]) -> TextTable:
    """For the terminal."""
    return TextTable(*personal_grid(rows), title=f"{quantity(rows)}, mean over clients (± over seeds)")


def personal_markdown(rows: Sequence[PersonalRow]) -> str:
    """The same as Markdown."""
    return "\n".join(markdown_lines(*personal_grid(rows))) + "\n"


def personal_json(rows: Iterable[PersonalRow]) -> str:
    """The same with all digits."""
    return json.dumps([as_dict(row) for row in rows], indent=1, allow_nan=False)


def quantity(rows: Sequence[PersonalRow]) -> str:
    """What the rows compare."""
    return "Perplexity" if rows[0].language else "Accuracy on clients' own tests"


def _records(method: Method) -> list[dict]:
    return [record for run in method.runs for record in run.records]


def _row(method: Method, base: Method | None, language: bool) -> PersonalRow:
    headline, worst = ("perplexity", "max") if language else ("accuracy", "min")

    def last(run: Run, name: str) -> float | None:
        found = series(run, name)
        return found[-1] if found else None

    def over_seeds(quantity: Callable[[Run], float | None]) -> Spread | None:
        return spread([quantity(run) for run in method.runs])

    def by_view(name: str) -> dict[str, Spread | None]:
        return {view: over_seeds(lambda run, key=key: last(run, f"{key}/{name}")) for view, key in VIEWS.items()}

    def change(key: str) -> Spread | None:
        if base is None or base is method:
            return None
        name = f"{key}/{headline}/mean"
        theirs = {run.config.get("seed"): last(run, name) for run in base.runs}
        pairs = [(last(run, name), theirs.get(run.config.get("seed"))) for run in method.runs]
        if not language:
            return spread([None if ours is None or other is None else 100 * (ours - other) for ours, other in pairs])
        return spread([None if not ours or not other else 100 * (ours / other - 1) for ours, other in pairs])

    return PersonalRow(
        method=method.label,
        seeds=[run.config.get("seed", 0) for run in method.runs],
        language=language,
        common=over_seeds(_common_perplexity if language else lambda run: last(run, "test_accuracy")),
        perplexity=by_view("perplexity/mean"),
        accuracy=by_view("accuracy/mean"),
        worst=by_view(f"{headline}/{worst}"),
        change={view: change(key) for view, key in VIEWS.items()},
        trained_entries=_mean_over_reports(method, "client/trained_entries"),
        upload_bytes=_mean_over_reports(method, "client/upload_bytes"),
        download_bytes=_mean_over_reports(method, "client/download_bytes"),
    )


def _mean_over_reports(method: Method, name: str) -> float | None:
    """Mean over the seeds of a run's mean over all reports: a round's mean counts as often as clients reported in it."""
    means = []
    for run in method.runs:
        found = [(record[name], record.get("reporting", 1)) for record in run.records if record.get(name) is not None]
        if reports := sum(count for _, count in found):
            means.append(sum(value * count for value, count in found) / reports)
    return statistics.fmean(means) if means else None


def _common_perplexity(run: Run) -> float | None:
    losses = series(run, "test_loss")
    try:
        return math.exp(losses[-1]) if losses else None
    except OverflowError:
        return math.nan


def personal_grid(rows: Sequence[PersonalRow]) -> tuple[list[str], list[list[str]]]:
    """The headings of the table of these rows, and each row's cells; columns in which nothing stands are left out."""
    language = rows[0].language
    unit, difference, scale = ("", " (%)", 1) if language else (" (%)", " (points)", 100)

    def number(value: Spread | None, form: str = ".2f", scale: float = scale) -> str:
        if value is None:
            return "–"
        if not math.isfinite(value.mean):
            return "not finite"
        return format(scale * value.mean, form) + ("" if value.std is None else f" ± {scale * value.std:.2f}")

    def worst(row: PersonalRow) -> str:
        found = [number(value) for value in row.worst.values()]
        return found[0] if found[1] in ("–", found[0]) else " / ".join(found)

    def means(row: PersonalRow) -> dict[str, Spread | None]:
        return row.perplexity if language else row.accuracy

    columns: dict[str, Callable[[PersonalRow], str]] = {
        "method": lambda row: row.method,
        **{f"{view}{unit}": lambda row, view=view: number(means(row)[view]) for view in VIEWS},
        f"worst client{unit}": worst,
        **{f"Δ {view}{difference}": lambda row, view=view: number(row.change[view], "+.1f", 1) for view in VIEWS},
        f"common test{unit}": lambda row: number(row.common),
        "entries": lambda row: "–" if row.trained_entries is None else f"{row.trained_entries:,.0f}",
        "kB up/down": _traffic,
    }
    return without_empty(list(columns), [[cell(row) for cell in columns.values()] for row in rows], "–")


def _traffic(row: PersonalRow) -> str:
    if row.upload_bytes is None or row.download_bytes is None:
        return "–"
    return f"{row.upload_bytes / 1000:.0f}/{row.download_bytes / 1000:.0f}"
