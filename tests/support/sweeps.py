"""Small sweeps, and run folders made without training."""

import json
from pathlib import Path
from typing import Any

import yaml

from fedjax_qp.sweeps import search, space
from fedjax_qp.sweeps.space import Sweep
from fedjax_qp.sweeps.trials import Store, Trial, trial_of
from support.runs import SMALL

BASE = {**SMALL, "algorithm": "fedavg", "rounds": 4}


def write_sweep(folder: Path, base: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A sweep file with its base beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, **(base or {})}))
    file = folder / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"name": "small", "config": "base.yaml", "folder": str(folder / "runs"), **settings})
    )
    return file


def sweep_of(folder: Path, base: dict[str, Any] | None = None, **settings: Any) -> Sweep:
    return space.load(write_sweep(folder, base, **settings))


def points_of(sweep: Sweep) -> list[search.Point]:
    """All points that are known beforehand, in the order of the values in the file."""
    return [point for points in search.planned(sweep).values() for point in points]


OPENED: list[Store] = []  # closed after each test, see conftest


def opened(sweep: Sweep) -> Store:
    """The sweep's folder with the trials that are known beforehand."""
    plan = search.planned(sweep)
    store = Store(sweep)
    OPENED.append(store)
    for variant, points in plan.items():
        store.add(store.study_name(variant), variant, points)
    store.settle()
    return store


def trials_of(store: Store) -> list[Trial]:
    """All trials, study by study."""
    return [trial_of(study.study_name, frozen) for study in store.studies() for frozen in study.trials]


def trial_with(store: Store, *values: Any) -> Trial:
    """The trial whose settings hold these values."""
    [found] = [trial for trial in trials_of(store) if all(value in trial.settings.values() for value in values)]
    return found


def record_run(store: Store, trial: Trial, seed: int, accuracies: list[float], reason: str | None = "finished") -> Path:
    """A run folder with an evaluation in every round; `reason` None: it has not ended."""
    folder = store.phase(trial.study).folder / f"{trial.name}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"round": n, "train_loss": 1.0, "test_accuracy": value} for n, value in enumerate(accuracies, 1)]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if reason is not None:
        (folder / "ended.json").write_text(json.dumps({"reason": reason, "round": len(lines)}))
        (folder / "checkpoints" / str(len(lines))).mkdir(parents=True, exist_ok=True)
    return folder
