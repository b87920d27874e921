"""Compares runs in which every client has tests of its own: perplexity by client, and what it cost.

Two views of a client are never mixed: "aggregated", the model it has after the server's last aggregation, and "tuned", as it
left its own training. A method is compared with the baseline in the same view, seed by seed (Δ, in percent).
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from fedjax_qp.compare import Method, Run, Spread, as_dict, markdown_lines, methods, spread
from fedjax_qp.registry import unknown_name

VIEWS = {"aggregated": "personal", "tuned": "tuned"}  # our word: the key in a record


class PersonalRow(NamedTuple):
    """One method; perplexities are means over clients in the last evaluation, None where nothing was recorded."""

    method: str
    seeds: list[int]
    common: Spread | None  # the server's model on the common test set
    perplexity: dict[str, Spread | None]  # by view
    worst: dict[str, Spread | None]  # by view, of the worst client
    change: dict[str, Spread | None]  # by view, percent above the baseline, paired by seed
    trained_entries: float | None  # of a client's adapters
    upload_bytes: float | None  # of a client and round, mean over all
    download_bytes: float | None


def has_personal(runs: Iterable[Run]) -> bool:
    """Whether any run tested its clients one by one."""
    return any("personal" in record for run in runs for record in run.records)


def personal_summary(runs: Iterable[Run], *, baseline: str | None = None) -> list[PersonalRow]:
    """Summarises each method over its seeds.

    Raises:
      ConfigurationError: no method has the baseline's label.
    """
    found = methods(runs)
    by_label = {method.label: method for method in found}
    if baseline is not None and baseline not in by_label:
        raise unknown_name("baseline", baseline, by_label)
    base = None if baseline is None else by_label[baseline]
    return [_row(method, base) for method in found]


def personal_table(rows: Iterable[PersonalRow]) -> Table:
    """For the terminal."""
    title = "Perplexity, mean over clients (± over seeds)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in COLUMNS:  # in a narrow terminal words are broken, and no figure is left out
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, personal_cells(row)))
    return table


def personal_markdown(rows: Iterable[PersonalRow]) -> str:
    """The same as Markdown."""
    return "\n".join(markdown_lines(COLUMNS, map(personal_cells, rows))) + "\n"


def personal_json(rows: Iterable[PersonalRow]) -> str:
    """The same with all digits."""
    return json.dumps([as_dict(row) for row in rows], indent=1)


COLUMNS = (
    "method",
    "aggregated",
    "tuned",
    "worst client",
    "Δ aggregated",
    "Δ tuned",
    "common test",
    "entries",
    "kB up/down",
)


def _row(method: Method, base: Method | None) -> PersonalRow:
    def last(run: Run, key: str, name: str) -> float | None:
        found = [record[key]["perplexity"][name] for record in run.records if key in record]
        return found[-1] if found else None

    def over_seeds(quantity: Callable[[Run], float | None]) -> Spread | None:
        return spread([quantity(run) for run in method.runs])

    def change(key: str) -> Spread | None:
        if base is None or base is method:
            return None
        theirs = {run.config.get("seed"): last(run, key, "mean") for run in base.runs}
        pairs = [(last(run, key, "mean"), theirs.get(run.config.get("seed"))) for run in method.runs]
        return spread([None if not ours or not other else 100 * (ours / other - 1) for ours, other in pairs])

    def mean_of(name: str) -> float | None:
        values = [record[name] for run in method.runs for record in run.records if record.get(name) is not None]
        return sum(values) / len(values) if values else None

    return PersonalRow(
        method=method.label,
        seeds=[run.config.get("seed", 0) for run in method.runs],
        common=over_seeds(_common),
        perplexity={view: over_seeds(lambda run, key=key: last(run, key, "mean")) for view, key in VIEWS.items()},
        worst={view: over_seeds(lambda run, key=key: last(run, key, "max")) for view, key in VIEWS.items()},
        change={view: change(key) for view, key in VIEWS.items()},
        trained_entries=mean_of("client/trained_entries"),
        upload_bytes=mean_of("client/upload_bytes"),
        download_bytes=mean_of("client/download_bytes"),
    )


def _common(run: Run) -> float | None:
    losses = [record["test_loss"] for record in run.records if record.get("test_loss") is not None]
    try:
        return math.exp(losses[-1]) if losses else None
    except OverflowError:  # not a number that JSON has
        return None


def personal_cells(row: PersonalRow) -> list[str]:
    """One row's text under these columns."""

    def number(value: Spread | None, form: str) -> str:
        if value is None:
            return "–"
        return format(value.mean, form) + ("" if value.std is None else f" ± {value.std:.2f}")

    traffic = "–"
    if row.upload_bytes is not None and row.download_bytes is not None:
        traffic = f"{row.upload_bytes / 1000:.0f}/{row.download_bytes / 1000:.0f}"
    return [
        row.method,
        *(number(row.perplexity[view], ".2f") for view in VIEWS),
        " / ".join(number(row.worst[view], ".2f") for view in VIEWS),
        *(number(row.change[view], "+.1f") + ("" if row.change[view] is None else " %") for view in VIEWS),
        number(row.common, ".2f"),
        "–" if row.trained_entries is None else f"{row.trained_entries:,.0f}",
        traffic,
    ]
