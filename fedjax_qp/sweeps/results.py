"""What came out of a sweep: one tidy table of every evaluation, and the trials in order.

results.parquet, results.csv   a row for each (trial, seed, round) in which the ranking's metric was recorded: the trial,
                               its settings under their dotted names, and every number of the record
summary.csv, summary.md        a row for each trial, the best first

All of them are written anew whenever the sweep ends or is interrupted.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedjax_qp.console.tables import TextTable
from fedjax_qp.files import write_whole, writing
from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.reports.compare import Spread, spread
from fedjax_qp.reports.rendering import markdown_lines
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps.space import Rank, Sweep
from fedjax_qp.sweeps.stopping import Curves, goodness, metric_names, value_at
from fedjax_qp.sweeps.trials import Ending, Store, Trial

_ORDER = ("complete", "stopped", "running", "waiting", "diverged", "failed")
_MISSING = "–"


class Row(NamedTuple):
    """A trial as it stands."""

    trial: Trial
    label: str  # its variant and its searched settings
    status: str  # one of `_ORDER`: the worst of its seeds, once all have ended
    rounds: tuple[int, ...]  # done, by seed
    value: (
        Spread | None
    )  # over seeds; None where nothing was recorded, a seed diverged or failed, or its value is not finite
    reasons: tuple[str, ...]  # different ones in which its runs ended, other than "finished", or have no value


def summarise(store: Store, curves: Curves) -> list[Row]:
    """Every trial as it stands, the best first: finished ones by their value, then those given up, then the rest."""
    rows = [_row(store, curves, trial) for trial in store.trials]
    sign = store.sweep.rank.sign

    def order(row: Row) -> tuple:
        return _ORDER.index(row.status), -goodness(row.value and row.value.mean, sign), row.trial.number

    return sorted(rows, key=order)


def label(sweep: Sweep, trial: Trial) -> str:
    """A trial's variant and searched settings, omitting what all trials share."""
    variant = next(one for one in sweep.every_variant() if one.name == trial.point.variant)
    settings = {key: value for key, value in trial.point.settings.items() if key in variant.space}
    shown = ", ".join(f"{name}={shortened(settings[key])}" for key, name in short_names(list(settings)).items())
    return " ".join(part for part in (variant.name, shown) if part) or "base"


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Fields by the last part of their names, where that is clear."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def shortened(value: Any) -> str:
    """A setting as a table or figure shows it."""
    if isinstance(value, dict):
        return str(value.get("name", value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_metric(store: Store) -> bool:
    """Finds out that no run records the ranking's metric, as soon as one has ended.

    Returns:
      Whether the metric has been seen.

    Raises:
      ConfigurationError: names the nearest metrics that there are.
    """
    for trial in store.trials:
        for seed in store.sweep.seeds:
            ending = store.ending(trial, seed)
            if ending is not None and ending.status == "complete":
                lines = RunFolder(store.run_folder(trial, seed)).records()
                if not any(record_numbers.value(line, store.sweep.rank.metric) is not None for line in lines):
                    raise unknown_name("metric (rank.metric)", store.sweep.rank.metric, metric_names(lines))
                return True
    return False


def write_results(store: Store, rows: Sequence[Row]) -> list[Path]:
    """Writes the tidy table and the summary; returns their files.

    Raises:
      ConfigurationError: nothing has been recorded yet, or the disk is full.
    """
    frame = tidy(store)
    if frame.empty:
        raise ConfigurationError(
            f"no run in {store.runs_folder} has an evaluation with {store.sweep.rank.metric!r} yet."
        )
    files = [store.folder / name for name in ("results.parquet", "results.csv", "summary.csv", "summary.md")]
    with writing(files[0]):
        frame.to_parquet(files[0], index=False)
    write_whole(files[1], frame.to_csv(index=False))
    write_whole(files[2], _uniform(pd.DataFrame([_summary_entry(row) for row in rows])).to_csv(index=False))
    write_whole(files[3], _markdown(store.sweep, rows))
    return files


def tidy(store: Store) -> pd.DataFrame:
    """One row for each trial, seed and evaluation; see the module docstring."""
    entries = []
    for trial in store.trials:
        fields = trial.point.settings
        for seed in store.sweep.seeds:
            folder, ending = store.run_folder(trial, seed), store.ending(trial, seed)
            for line in RunFolder(folder).records(missing_ok=True):
                if record_numbers.value(line, store.sweep.rank.metric) is not None:
                    head = {"trial": trial.number, "variant": trial.point.variant, **fields, "seed": seed}
                    status = "unfinished" if ending is None else ending.status
                    entries.append(
                        {**head, "status": status, "round": line["round"], **dict(record_numbers.scalars(line))}
                    )
    frame = pd.DataFrame(entries)
    return _uniform(frame)


def table(sweep: Sweep, rows: Sequence[Row], *, most: int | None = None) -> TextTable:
    """The trials for the terminal, at most `most` of them."""
    shown = rows[:most]
    left_out = len(rows) - len(shown)
    notes = [f"… and {left_out} more"] if left_out else []
    return TextTable(_headings(sweep), [_cells(sweep, row) for row in shown], notes=notes, words=(1, 2))


def scale_and_unit(rank: Rank) -> tuple[int, str]:
    """Accuracies are shown in per cent."""
    return (100, " (%)") if "accuracy" in rank.metric else (1, "")


def _row(store: Store, curves: Curves, trial: Trial) -> Row:
    folders = [store.run_folder(trial, seed) for seed in store.sweep.seeds]
    endings = [store.ending(trial, seed) for seed in store.sweep.seeds]
    rounds = tuple(curves.rounds(folder) for folder in folders)
    status = _status(endings, rounds)
    values = [value_at(curves.curve(folder), None, store.sweep.rank.last) for folder in folders]
    reasons = dict.fromkeys(end.reason for end in endings if end is not None and end.reason != "finished")
    value = None if status in ("diverged", "failed") else spread(values)
    if value is not None and not math.isfinite(value.mean):
        value, reasons = None, reasons | {f"{store.sweep.rank.metric} is not finite": None}
    return Row(trial, label(store.sweep, trial), status, rounds, value, tuple(reasons))


def _status(endings: Sequence[Ending | None], rounds: Sequence[int]) -> str:
    statuses = [ending.status for ending in endings if ending is not None]
    if len(statuses) == len(endings):
        return max(statuses, key=_ORDER.index)
    return "running" if any(rounds) or statuses else "waiting"


def _headings(sweep: Sweep) -> list[str]:
    metric = f"{sweep.rank.metric}, last {sweep.rank.last}{scale_and_unit(sweep.rank)[1]}"
    return ["trial", "settings", "status", "rounds", metric]


def _cells(sweep: Sweep, row: Row) -> list[str]:
    few, many = min(row.rounds), max(row.rounds)
    shown = _MISSING if row.value is None else _shown(row.value, sweep.rank)
    return [str(row.trial.number), row.label, row.status, f"{few}" if few == many else f"{few}–{many}", shown]


def _shown(value: Spread, rank: Rank) -> str:
    scale, unit = scale_and_unit(rank)
    digits = ".2f" if unit else ".4g"
    mean = f"{scale * value.mean:{digits}}"
    return mean if value.std is None else f"{mean} ± {scale * value.std:{digits}}"


def _markdown(sweep: Sweep, rows: Sequence[Row]) -> str:
    body = markdown_lines(_headings(sweep), (_cells(sweep, row) for row in rows), words=(1, 2))
    notes = [f"- trial {row.trial.number}: {'; '.join(row.reasons)}" for row in rows if row.reasons]
    seeds = f"Mean ± sample standard deviation over the seeds {', '.join(map(str, sweep.seeds))}."
    return "\n".join([*body, "", seeds, *([""] if notes else []), *notes]) + "\n"


def _summary_entry(row: Row) -> dict[str, Any]:
    value = row.value or Spread(float("nan"), None, 0)
    return {
        "trial": row.trial.number,
        "variant": row.trial.point.variant,
        **row.trial.point.settings,
        "status": row.status,
        "rounds": min(row.rounds),
        "mean": value.mean,
        "std": value.std,
        "seeds": value.seeds,
        "reason": "; ".join(row.reasons),
    }


def _uniform(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of one type each, as Parquet needs them: what is not all numbers or all truth values becomes text."""
    frame = frame.copy()
    for name in frame.columns:
        present = [value for value in frame[name] if not _empty(value)]
        kinds = {
            bool if isinstance(value, bool) else float if isinstance(value, int | float) else str for value in present
        }
        if kinds - {float} and kinds != {bool}:
            frame[name] = [None if _empty(value) else _text(value) for value in frame[name]]
    return frame


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
