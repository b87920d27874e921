"""Run folders with made-up records."""

import json
from pathlib import Path

import yaml

from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.watch import Watch

SETTINGS = {
    "rounds": 4,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 10},
    "model": {"name": "mlp"},
    "algorithm": {"name": "fedavg", "weighting": "size"},
    "engine": {"lanes": 1},
}


def made_run(
    root: Path, name: str, seed: int, accuracies: list[float], watches: tuple[Watch, ...] = (), **changes
) -> Path:
    """A run folder with an evaluation in every round; the worst decile lies 0.2 below the accuracy."""
    folder = root / f"{name}-seed{seed}-{len(list(root.iterdir()))}"
    folder.mkdir()
    RunFolder(folder).config_file.write_text(yaml.safe_dump({"name": name, "seed": seed, **SETTINGS, **changes}))
    lines = [
        {
            "round": n,
            "train_loss": 1.0,
            "test_accuracy": value,
            "client_accuracy": {"min": value - 0.3, "q10": value - 0.2, "q90": value + 0.1},
        }
        for n, value in enumerate(accuracies, 1)
    ]
    RunFolder(folder).records_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunFolder(folder).save_watches(watches)
    return folder
