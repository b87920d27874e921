"""The main job of `make run`: FedAvg, FedMut and FedQP on MNIST-5k in the same engine, then a table and a figure.

One seed, nothing tuned: it shows that and how the methods run, not which one is better.
Runs that are already finished are kept and interrupted ones are continued, so a second call only compares.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.files import keep_programs
from fedjax_qp.reports import compare as comparison
from fedjax_qp.reports import rendering
from fedjax_qp.reports.plots import plot_comparison
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import resume, run

FOLDER = "runs/first-look"
METHODS = {
    "FedAvg": ["algorithm=fedavg", "algorithm.weighting=uniform"],
    "FedMut": ["algorithm=fedmut", "algorithm.alpha=1"],
    "FedQP": ["algorithm=fedqp", "algorithm.alpha=1"],
}


def finished_or_run(file: Path, name: str, folder: str, overrides: list[str], console: Console) -> Path:
    """Runs, continues or keeps one run in `folder`, if the overrides name no other; returns the run's folder."""
    config = configuration.load(file, [f"folder={folder}", *overrides, f"name={name}"])
    if RunFolder(config.run_folder).holds_run():
        resume(config.run_folder, console=console)
    else:
        run(config, console)
    return config.run_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/mnist5k.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="settings to change in all runs, such as rounds=10")
    arguments = parser.parse_args()
    keep_programs()
    console = Console()
    started = time.perf_counter()
    folders = [
        finished_or_run(
            arguments.config, label, FOLDER, [*arguments.overrides, *method, f"seed={arguments.seed}"], console
        )
        for label, method in METHODS.items()
    ]
    runs = comparison.load_runs(folders)
    console.print(rendering.table(comparison.summary(runs, last=10, target=None, baseline="FedAvg")))
    figure = folders[0].parent / "comparison.png"
    plot_comparison(runs, figure)
    console.print(f"figure: {figure}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
