"""Flatness of several methods' models over seeds: at equal rounds, and at equal accuracy.

Question: are the models of one method flatter than those of another, beyond what more or less training does to any model?

    python benchmarks/flatness.py runs/cifar-*-seed* --output benchmarks/results/flatness_cifar10
    python benchmarks/flatness.py runs/cifar-*-seed* --round 60 --accuracy 0.30 0.35 --output …

Runs that differ only in the seed are one method. At equal rounds: the checkpoint of `--round` (default: the newest that all
runs have). At equal accuracy: of each run the first checkpoint whose recorded test accuracy reaches the level; a seed that
never gets there counts in no mean, and the table says how many did. So the runs must keep their checkpoints, at short
distances and with an evaluation at each: run them with

    checkpoints.keep=1000 engine.rounds_per_chunk=2 evaluation.every=2

Every model is measured on the same training examples, in evaluation mode. The numbers and figures of each checkpoint stay in
its run's folder (RUN/inspect) and are not measured again.
"""

import argparse
import csv
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from fedjax_qp.instruments.inspection import inspect_checkpoint, numbers_file
from fedjax_qp.instruments.settings import Settings, What
from fedjax_qp.instruments.subject import InspectedRun, load, open_run
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports import compare as comparison

WHAT: tuple[What, ...] = ("sharpness", "curvature", "conflict", "fairness")
COLUMNS = {  # what the table shows, of all that the CSV file holds
    ("curvature", "largest Hessian eigenvalue"): "λ_max",
    ("curvature", "Hessian trace"): "trace",
    ("sharpness", "rise, random, ρ = 0.5"): "random, ρ 0.5",
    ("sharpness", "rise, filter, ρ = 0.2"): "filter, 0.2",
    ("sharpness", "rise, adversarial, ρ = 0.05"): "SAM, ρ 0.05",
    ("sharpness", "rise, ascent, ρ = 0.1"): "ascent, ρ 0.1",
    ("sharpness", "rise, mutation, ρ = 0.5"): "along ±g_l, ρ 0.5",
    ("conflict", "pairs in conflict, trained − start model"): "conflict share",
}


class Place(NamedTuple):
    """A checkpoint of one run, and why it was chosen."""

    mode: str  # "round 60", "accuracy 0.35"
    method: str
    seed: int
    run: InspectedRun
    round: int


def open_all(methods: Iterable[comparison.Method]) -> list[tuple[str, int, InspectedRun]]:
    """Method, seed and opened run of every folder; runs on the same data share it, and the instruments' programs."""
    opened: list[tuple[str, int, InspectedRun]] = []
    for method in methods:
        for run in method.runs:
            like = opened[-1][2] if opened else None
            opened.append((method.label, int(run.config.get("seed", 0)), open_run(run.folder, like)))
    return opened


def places(opened: list[tuple[str, int, InspectedRun]], round: int | None, levels: Iterable[float]) -> list[Place]:
    """The checkpoints to measure.

    Raises:
      ConfigurationError: the runs have no common round, or a run lacks the given one.
    """
    common = set.intersection(*(set(run.kept) for _, _, run in opened))
    if round is None and not common:
        raise ConfigurationError(
            "the runs have no checkpoint of a common round: give the same rounds_per_chunk and keep."
        )
    round = max(common) if round is None else round
    found = [Place(f"round {round}", method, seed, run, round) for method, seed, run in opened]
    for level in levels:
        for method, seed, run in opened:
            reached = first_reaching(run, level)
            if reached is not None:
                found.append(Place(f"accuracy {level:g}", method, seed, run, reached))
    return found


def first_reaching(run: InspectedRun, level: float) -> int | None:
    """The first round with a checkpoint whose test accuracy is at least `level`."""
    accuracy = {line["round"]: line.get("test_accuracy") for line in run.history}
    return next((round for round in run.kept if (accuracy.get(round) or 0) >= level), None)


def measured(place: Place, settings: Settings, console: Console) -> dict[str, dict[str, Any]]:
    """The numbers of a checkpoint: those in its folder where they were made with the same settings."""
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    files = {name: numbers_file(place.run.folder, name, place.round) for name in WHAT}
    known = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    missing: list[What] = [name for name in WHAT if known.get(name, {}).get("settings") != wanted]
    if missing:
        inspect_checkpoint(load(place.run, place.round, settings), missing, settings, console)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def rows_of(place: Place, numbers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a quantity."""
    common = {
        "mode": place.mode,
        "method": place.method,
        "seed": place.seed,
        "round": place.round,
        "accuracy": numbers["sharpness"]["test_accuracy"],
    }
    return [
        common | {"instrument": name, "quantity": quantity, "value": value}
        for name, result in numbers.items()
        for quantity, value in result["headline"].items()
    ]


def markdown(rows: list[dict[str, Any]], seeds: dict[str, int]) -> str:
    """A table for each mode: mean ± sample standard deviation over the seeds that got there."""
    text = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        text += [f"**At equal {mode.split()[0]}: {mode}**", ""]
        text += ["| method | seeds | round | accuracy (%) | " + " | ".join(COLUMNS.values()) + " |"]
        text += ["| :-- | --: " + "| --: " * (2 + len(COLUMNS)) + "|"]
        for method, count in seeds.items():
            mine = [row for row in rows if (row["mode"], row["method"]) == (mode, method)]
            text.append(f"| {method} | " + " | ".join(_cells(mine, count)) + " |")
        text.append("")
    return "\n".join(text)


def _cells(rows: list[dict[str, Any]], count: int) -> list[str]:
    first = list({row["seed"]: row for row in rows}.values())
    cells = [f"{len(first)} of {count}", _spread([row["round"] for row in first])]
    cells.append(_spread([100 * row["accuracy"] for row in first if row["accuracy"] is not None]))
    for instrument, quantity in COLUMNS:
        values = [row["value"] for row in rows if (row["instrument"], row["quantity"]) == (instrument, quantity)]
        cells.append(_spread([value for value in values if value is not None]))
    return cells


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--round", type=int)
    parser.add_argument("--accuracy", type=float, nargs="*", default=[], help="levels, 0 to 1")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True, help="path without ending")
    arguments = parser.parse_args()
    console, settings = Console(), Settings(examples=arguments.examples, replays=1)
    methods = comparison.methods(comparison.load_runs(arguments.runs))
    console.print(f"opening {len(arguments.runs)} runs; each checkpoint then takes a minute or so on two cores")
    opened = open_all(methods)
    rows = []
    for place in places(opened, arguments.round, arguments.accuracy):
        rows += rows_of(place, measured(place, settings, console))
    text = markdown(rows, {method.label: len(method.runs) for method in methods})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.with_name(f"{arguments.output.name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    arguments.output.with_name(f"{arguments.output.name}.md").write_text(text)
    console.print(text, soft_wrap=True)


if __name__ == "__main__":
    main()
