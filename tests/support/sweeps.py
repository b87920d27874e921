"""Small sweeps, and run folders made without training."""

import json
from pathlib import Path
from typing import Any

import yaml

from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps import space
from fedjax_qp.sweeps.run import planned
from fedjax_qp.sweeps.space import Sweep, base_values
from fedjax_qp.sweeps.trials import Ending, Store, Trial, write_ending
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


OPENED: list[Store] = []  # closed after each test, see conftest


def opened(sweep: Sweep) -> Store:
    """The sweep's folder with the trials that are known beforehand."""
    base = base_values(sweep)
    store = Store(sweep, base)
    OPENED.append(store)
    store.add(planned(sweep, base))
    return store


def record_run(store: Store, trial: Trial, seed: int, accuracies: list[float], status: str | None = "complete") -> Path:
    """A run folder with an evaluation in every round; `status` None: it has not ended."""
    folder = store.run_folder(trial, seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"round": n, "train_loss": 1.0, "test_accuracy": value} for n, value in enumerate(accuracies, 1)]
    RunFolder(folder).records_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status is not None:
        reason = "finished" if status == "complete" else f"it {status}"
        write_ending(folder, Ending(status, reason, len(accuracies)))
    return folder
