"""Compares finished runs: a method is a set of runs that differ in nothing but the seed.

Numbers are means over seeds with their sample standard deviation. The difference to a baseline is paired, taken seed
by seed: runs of one seed share their partition, their cohorts and their first model, and much of the spread over seeds
comes from these. Settings other than the algorithm in which compared runs differ are part of the result.
"""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.markup import escape
from rich.table import Table

from fedjax_qp import config as configuration
from fedjax_qp import records as recorded
from fedjax_qp.records import ENDED, FAILURE
from fedjax_qp.registry import ConfigurationError, unknown_name

# Where and how a run was computed; its results do not depend on it. `engine.lanes` is even measured anew in each run.
_ARRANGEMENT = ("folder", "engine", "checkpoints", "tracking")
_MISSING = "–"


class Run(NamedTuple):
    """One run folder, read."""

    folder: Path
    config: dict[str, Any]
    records: list[dict]


class Method(NamedTuple):
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]  # by seed


class Spread(NamedTuple):
    """A quantity over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None for a single seed
    seeds: int  # how many have the quantity


class Reached(NamedTuple):
    """Rounds to reach a target accuracy."""

    target: float
    median: float | None  # over all seeds, where one that never got there counts as infinite; None = infinite
    seeds: int  # how many got there


class Difference(NamedTuple):
    """A method minus the baseline, seed by seed."""

    baseline: str
    points: Spread | None  # percentage points; None without a common seed


class Row(NamedTuple):
    """One method in a comparison. Accuracies are shares, 0 to 1; None where nothing was recorded."""

    method: str
    seeds: list[int]
    last: int
    accuracy: Spread | None  # mean of the last `last` evaluations
    final: Spread | None  # the last evaluation
    best: Spread | None
    worst_decile: Spread | None  # 10 % quantile over clients, mean of the last `last` evaluations
    reached: Reached | None  # None without a target
    drift: Spread | None  # mean over rounds of the mutations' mean coefficient
    difference: Difference | None  # of `accuracy`; None without a baseline and for the baseline itself
    unequal: list[str]  # what besides the algorithm differs from the baseline (or the first method)
    unfinished: list[str]  # runs that diverged or did not come to their end


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Reads run folders.

    Raises:
      ConfigurationError: a folder is not a run folder; the message names what is missing.
    """
    runs = []
    for folder in map(Path, folders):
        records, file = recorded.read(folder), folder / "config.yaml"
        if not file.is_file():
            raise ConfigurationError(
                f"{folder} is not a run folder: it has no config.yaml. Give the folder of one run."
            )
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "name" not in config:
            raise ConfigurationError(f"{file} is not the configuration of a run: it has no name.")
        runs.append(Run(folder, config, records))
    if not runs:
        raise ConfigurationError("nothing to compare: give one or more run folders.")
    return runs


def methods(runs: Iterable[Run]) -> list[Method]:
    """Groups runs that differ only in the seed, in the order in which they are first given.

    Returns:
      Methods under their runs' name; where several have one name, the settings in which they differ are added.

    Raises:
      ConfigurationError: two runs of one method have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_settings(run, "seed"), sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        members.sort(key=_seed)
        for first, second in itertools.pairwise(members):
            if _seed(first) == _seed(second):
                raise ConfigurationError(
                    f"{first.folder} and {second.folder} are the same run (seed {_seed(first)}): leave one of them out."
                )
    labels = _labels([members[0] for members in groups.values()])
    return [Method(label, members) for label, members in zip(labels, groups.values(), strict=True)]


def summary(
    runs: Iterable[Run], *, last: int = 10, target: float | None = None, baseline: str | None = None
) -> list[Row]:
    """Summarises each method over its seeds.

    Args:
      last: accuracies are means over so many last evaluations (all, where there are fewer).
      target: accuracy (0 to 1) for the rounds to reach it.
      baseline: label of the method that paired differences are taken to.

    Raises:
      ConfigurationError: no method has the baseline's label, or a number is out of range.
    """
    if last < 1:
        raise ConfigurationError(f"last = {last} must be at least 1 evaluation.")
    if target is not None and not 0 < target <= 1:
        raise ConfigurationError(f"target = {target} must be an accuracy between 0 and 1, for example 0.75.")
    found = methods(runs)
    by_label = {method.label: method for method in found}
    if baseline is not None and baseline not in by_label:
        raise unknown_name("baseline", baseline, by_label)
    base = None if baseline is None else by_label[baseline]
    return [_row(method, base, base or found[0], last, target) for method in found]


# --- quantities of one run --------------------------------------------------------------------------------------------


def _evaluations(run: Run) -> list[float]:
    return [record["test_accuracy"] for record in run.records if record.get("test_accuracy") is not None]


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _worst_decile(run: Run, last: int) -> float | None:
    deciles = [record["client_accuracy"]["q10"] for record in run.records if "client_accuracy" in record]
    return _mean([value for value in deciles if value is not None][-last:])


def _drift(run: Run) -> float | None:
    values = [record.get("mutation/drift") for record in run.records]
    return _mean([value for value in values if value is not None])


def _seed(run: Run) -> int:
    return run.config.get("seed", 0)


def _finished(run: Run) -> int:
    return run.records[-1]["round"] if run.records else 0


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(method: Method, base: Method | None, reference: Method, last: int, target: float | None) -> Row:
    def over_seeds(quantity: Callable[[Run], float | None]) -> Spread | None:
        return spread([quantity(run) for run in method.runs])

    def accuracy(run: Run) -> float | None:
        return _mean(_evaluations(run)[-last:])

    return Row(
        method=method.label,
        seeds=[_seed(run) for run in method.runs],
        last=last,
        accuracy=over_seeds(accuracy),
        final=over_seeds(lambda run: _mean(_evaluations(run)[-1:])),
        best=over_seeds(lambda run: max(_evaluations(run), default=None)),
        worst_decile=over_seeds(lambda run: _worst_decile(run, last)),
        reached=None if target is None else _reached(method, target),
        drift=over_seeds(_drift),
        difference=None if base is None or base is method else _difference(method, base, accuracy),
        unequal=_unequal(method, reference),
        unfinished=[f"seed {_seed(run)} {state}" for run in method.runs if (state := unfinished(run)) is not None],
    )


def unfinished(run: Run) -> str | None:
    """Why a run's numbers are not those of a whole run; None where they are."""
    if (run.folder / FAILURE).exists():
        return f"diverged after {_finished(run)} rounds"
    if not (run.folder / ENDED).exists() and _finished(run) < run.config.get("rounds", 0):
        return f"has {_finished(run)} of {run.config['rounds']} rounds"
    return None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of what is there; None where nothing is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    std = statistics.stdev(present) if len(present) > 1 else None
    return Spread(statistics.fmean(present), std, len(present))


def _reached(method: Method, target: float) -> Reached:
    rounds = [recorded.rounds_to_reach(run.records, target) for run in method.runs]
    median = statistics.median([float("inf") if value is None else value for value in rounds])
    return Reached(
        target, None if median == float("inf") else float(median), sum(value is not None for value in rounds)
    )


def _difference(method: Method, base: Method, accuracy: Callable[[Run], float | None]) -> Difference:
    theirs = {_seed(run): accuracy(run) for run in base.runs}
    pairs = [(accuracy(run), theirs.get(_seed(run))) for run in method.runs]
    points = [None if ours is None or other is None else 100 * (ours - other) for ours, other in pairs]
    return Difference(base.label, spread(points))


def _unequal(method: Method, reference: Method) -> list[str]:
    """Settings outside the algorithm in which a method differs from the reference, and unequal numbers of rounds."""
    theirs, ours = (_settings(one.runs[0], "seed", "name", "algorithm") for one in (reference, method))
    found = configuration.differences(theirs, ours)
    rounds, expected = (sorted({_finished(run) for run in one.runs}) for one in (method, reference))
    if rounds != expected or len(rounds) > 1:
        found.append(f"rounds finished: {_listed(expected)} → {_listed(rounds)}")
    return found


def _settings(run: Run, *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in (*_ARRANGEMENT, *left_out)}


def _labels(runs: list[Run]) -> list[str]:
    """One label per method: its name, with the settings that tell it from other methods of that name."""
    labels = []
    for run in runs:
        name, own = run.config["name"], configuration.flat(_settings(run, "seed"))
        namesakes = [configuration.flat(_settings(other, "seed")) for other in runs if other.config["name"] == name]
        keys = _distinguishing(namesakes)
        detail = ", ".join(f"{key}={own.get(key, _MISSING)}" for key in keys)
        labels.append(f"{name} ({detail})" if keys else name)
    return labels


def _distinguishing(several: list[dict[str, Any]]) -> list[str]:
    """The settings in which they differ; where it suffices, only those that all of them have."""
    differing = [
        key for key in sorted(set().union(*several)) if any(one.get(key) != several[0].get(key) for one in several)
    ]
    common = [key for key in differing if all(key in one for one in several)]
    values = {json.dumps([one[key] for key in common], default=str) for one in several}
    return common if len(values) == len(several) else differing


# --- output -----------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """A table for the terminal; unequal settings are named below it."""
    result = Table(caption="\n".join(notes(rows)) or None, caption_justify="left", caption_style="yellow")
    for index, heading in enumerate(headings(rows)):
        result.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*map(escape, cells(row, rows)))
    return result


def to_markdown(rows: list[Row]) -> str:
    """The same table in Markdown."""
    remarks = [f"- {note}" for note in notes(rows)]
    lines = markdown_lines(headings(rows), [cells(row, rows) for row in rows])
    return "\n".join([*lines, *([""] if remarks else []), *remarks]) + "\n"


def markdown_lines(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> list[str]:
    """The lines of a Markdown table; the columns `words` hold names, the others numbers."""
    rules = [":--" if column in words else "--:" for column in range(len(headings))]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (headings, rules, *rows)]
    return ["| " + " | ".join(line) + " |" for line in escaped]


def to_json(rows: list[Row]) -> str:
    """All numbers of the rows, unrounded."""
    return json.dumps([as_dict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_dict(value: Any) -> Any:
    """Named tuples as dicts, also inside of other values."""
    if hasattr(value, "_asdict"):
        return {key: as_dict(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {key: as_dict(item) for key, item in value.items()}
    return value


def headings(rows: list[Row]) -> list[str]:
    """The columns of the table of these rows."""
    found = ["method", "seeds", f"accuracy, last {rows[0].last} (%)", "final (%)", "best (%)", "worst decile (%)"]
    if rows[0].reached is not None:
        found.append(f"rounds to {100 * rows[0].reached.target:g} %")
    if _any(rows, "drift"):
        found.append("drift")
    baselines = [row.difference.baseline for row in rows if row.difference is not None]
    return found + [f"minus {name} (points)" for name in baselines[:1]]


def cells(row: Row, rows: list[Row]) -> list[str]:
    """One row's text under these columns."""
    shares = (row.accuracy, row.final, row.best, row.worst_decile)
    found = [row.method, str(len(row.seeds)), *(_shown(share, scale=100) for share in shares)]
    if row.reached is not None:
        median = _MISSING if row.reached.median is None else f"{row.reached.median:g}"
        found.append(f"{median} ({row.reached.seeds} of {len(row.seeds)})")
    if _any(rows, "drift"):
        found.append(_shown(row.drift))
    if _any(rows, "difference"):
        points = None if row.difference is None else row.difference.points
        count = "" if points is None or points.seeds == len(row.seeds) else f" ({points.seeds} seeds)"
        found.append(_shown(points, sign="+") + count)
    return found


def _any(rows: list[Row], field: str) -> bool:
    return any(getattr(row, field) is not None for row in rows)


def _shown(spread: Spread | None, *, scale: float = 1, sign: str = "") -> str:
    if spread is None:
        return _MISSING
    mean = f"{scale * spread.mean:{sign}.2f}"
    return mean if spread.std is None else f"{mean} ± {scale * spread.std:.2f}"


def notes(rows: list[Row]) -> list[str]:
    """Where the comparison is not an equal one."""
    baselines = [row.difference.baseline for row in rows if row.difference is not None]
    reference = (baselines or [row.method for row in rows])[0]
    return [
        *(f"Not whole: {row.method}, {', '.join(row.unfinished)}." for row in rows if row.unfinished),
        *(
            f"Not an equal comparison: {reference} → {row.method} differs in {'; '.join(row.unequal)}."
            for row in rows
            if row.unequal
        ),
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
