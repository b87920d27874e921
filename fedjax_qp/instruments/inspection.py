"""Inspects runs: every instrument on a checkpoint, its files in the run's folder, and a table of runs side by side."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_qp.files import write_whole
from fedjax_qp.instruments import conflict, curvature, fairness, mutations, sharpness, surface
from fedjax_qp.instruments.settings import NAMES, Settings, What
from fedjax_qp.instruments.subject import InspectedRun, Subject, load, open_run, with_update
from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.runs.folder import RunFolder

_INSTRUMENTS: dict[What, ModuleType] = {
    "surface": surface,
    "sharpness": sharpness,
    "curvature": curvature,
    "conflict": conflict,
    "mutations": mutations,
    "fairness": fairness,
}
_ALONG_UPDATE = {"surface", "sharpness"}  # need g


class Inspected(NamedTuple):
    """What was found at one checkpoint of a run."""

    folder: Path
    label: str
    round: int
    headlines: dict[str, dict[str, float]]  # of each instrument
    files: list[Path]


def inspect_runs(
    folders: Sequence[Path],
    *,
    what: Sequence[str] = (),
    round: int | None = None,
    settings: Settings | None = None,
    console: Console | None = None,
) -> list[Inspected]:
    """Inspects a checkpoint of each run and writes numbers and figures into `inspect` in its folder.

    Args:
      what: instruments; default all that the run's method has.
      round: of the checkpoint; default the newest of each run.

    Raises:
      ConfigurationError: a folder is no run on images, an instrument does not exist or fits none of the runs, or there is no
        checkpoint of that round. Raised before anything is computed.
    """
    settings, console = settings or Settings(), console or Console(quiet=True)
    if not folders:
        raise ConfigurationError("nothing to inspect: give one or more run folders.")
    for name in what:
        if name not in NAMES:
            raise unknown_name("instrument", name, NAMES)
    opened: list[InspectedRun] = []
    for folder in folders:
        opened.append(open_run(folder, opened[-1] if opened else None))
    subjects = [load(run, round, settings) for run in opened]
    chosen = [_chosen(subject, what) for subject in subjects]
    reasons = [reason for subject in subjects if (reason := _no_mutations(subject)) is not None]
    if not any(chosen):
        raise ConfigurationError(
            f"mutations cannot be measured on {subjects[0].run.folder}: {reasons[0]} Leave mutations out of --what."
        )
    if "mutations" in what and reasons:
        say(console, f"mutations are left out where there are none: {' '.join(dict.fromkeys(reasons))}")
    found, done, total = [], 0, sum(map(len, chosen))
    for subject, names in zip(subjects, chosen, strict=True):
        found.append(inspect_checkpoint(subject, names, settings, console, done, total))
        done += len(names)
    return found


def say(console: Console, text: str) -> None:
    """Prints a line; names of runs in it are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def inspect_checkpoint(
    subject: Subject, names: Sequence[What], settings: Settings, console: Console, done: int = 0, total: int = 0
) -> Inspected:
    """Uses these instruments on a checkpoint and writes what they find.

    Args:
      done: of `total` measurements in all, those before these; for the lines that say how far it is.
    """
    RunFolder(subject.run.folder).inspections.mkdir(exist_ok=True)
    config, headlines, files = subject.run.experiment.config, {}, []
    if _ALONG_UPDATE & set(names):
        subject = with_update(subject)
    title = f"{config.name}, seed {config.seed}, {config.algorithm.name}: checkpoint of round {subject.round}"
    for number, name in enumerate(names, done + 1):
        say(console, f"{number} of {max(total, len(names))}: {name}, {subject.run.folder}, round {subject.round}")
        instrument = _INSTRUMENTS[name]
        measure: Callable[[Subject, Settings], dict[str, Any]] = instrument.measure
        result = measure(subject, settings)
        headlines[name] = instrument.headline(result)
        numbers = numbers_file(subject.run.folder, name, subject.round)
        instrument.draw(result, title, numbers.with_suffix(".png"))
        facts = _facts(subject, settings) | {"headline": headlines[name]} | result
        write_whole(numbers, json.dumps(_plain(facts)))
        files += [numbers, numbers.with_suffix(".png")]
    return Inspected(subject.run.folder, f"{config.name}-seed{config.seed}", subject.round, headlines, files)


def numbers_file(folder: Path, name: str, round: int) -> Path:
    """Where the numbers of an instrument at a run's checkpoint are; the figure is beside them."""
    return RunFolder(folder).inspections / f"{name}-round{round}.json"


def _chosen(subject: Subject, what: Sequence[str]) -> list[What]:
    """The instruments to use on a checkpoint, of those asked for: where a method has no mutations, not these."""
    reason = _no_mutations(subject)
    return [name for name in NAMES if name in (what or NAMES) and not (reason and name == "mutations")]


def _no_mutations(subject: Subject) -> str | None:
    if subject.run.fedmut is None:
        return f"{subject.run.experiment.config.algorithm.name!r} mutates nothing (fedmut and fedqp do)."
    return "there is no global update before the first round." if subject.round == 0 else None


def _facts(subject: Subject, settings: Settings) -> dict[str, Any]:
    """What a reader of the numbers must know."""
    config = subject.run.experiment.config
    recorded = next((line for line in subject.run.history if line["round"] == subject.round), {})
    return {
        "run": config.name,
        "seed": config.seed,
        "algorithm": {"name": config.algorithm.name, **config.algorithm.options},
        "round": subject.round,
        "test_accuracy": recorded.get("test_accuracy"),
        "mode": "evaluation: batch-norm statistics are those of the checkpoint",
        "settings": dataclasses.asdict(settings),
    }


def side_by_side(found: Sequence[Inspected]) -> Table:
    """The headlines of all runs, a column each."""
    table = Table("instrument", "quantity", title="inspection", title_justify="left")
    for one in found:
        table.add_column(Text(f"{one.label}\nround {one.round}"), justify="right")
    for instrument, quantity, values in _rows(found):
        table.add_row(instrument, quantity, *("–" if value is None else f"{value:.4g}" for value in values))
    return table


def to_csv(found: Sequence[Inspected], path: Path) -> None:
    """The same as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instrument", "quantity", *(f"{one.label} round {one.round}" for one in found)])
        writer.writerows([instrument, quantity, *values] for instrument, quantity, values in _rows(found))


def _rows(found: Sequence[Inspected]) -> list[tuple[str, str, list[float | None]]]:
    rows = []
    for instrument in NAMES:
        quantities = dict.fromkeys(name for one in found for name in one.headlines.get(instrument, {}))
        for quantity in quantities:
            values = [one.headlines.get(instrument, {}).get(quantity) for one in found]
            rows.append((instrument, quantity, values))
    return rows


def _plain(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
