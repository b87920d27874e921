"""What do runs that share a program save, and are they the runs that they would be alone?

    python benchmarks/sweep_together.py                  # 16 settings × 3 seeds on MNIST-5k
    python benchmarks/sweep_together.py rounds=20 --alone 4      # alone only 4 of the settings, each with its three seeds

FedQP with four learning rates and four α, three seeds each: 48 runs, first in one program (`runs.run.run_all`, what
`fedjax-qp sweep` does with them on one worker), then one after another (`run.run`, each in the same process, so that imports
and reading count for nobody). Both begin with an empty cache of programs and fill it. The lanes of the shared program are
measured in its time; those of the runs alone are measured once beforehand, for nothing. Writes one row: wall seconds and
compiled programs of both, and for each round the worst relative difference between the losses of a run and of the same run
alone.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from measure import write_rows
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.experiment import build
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.programs import groups
from fedjax_qp.runs.run import run, run_all

RATES, ALPHAS, SEEDS = (0.003, 0.01, 0.02, 0.03), (0.25, 0.5, 1.0, 2.0), (0, 1, 2)
SETTINGS = [
    "model=mlp",
    "rounds=10",
    "algorithm={name: fedqp, form: nearest}",
    "engine={lanes: auto, rounds_per_chunk: 5}",
]
COMPILED = "/jax/core/compile/backend_compile_duration"


def configs(folder: Path, overrides: Sequence[str]) -> list[Config]:
    """Every combination of learning rate, α and seed."""
    return [
        configuration.load(
            Path("configs/mnist5k.yaml"),
            [
                *SETTINGS,
                *overrides,
                f"folder={folder}",
                f"name=rate{rate}-alpha{alpha}",
                f"local.learning_rate={rate}",
                f"algorithm.alpha={alpha}",
                f"seed={seed}",
            ],
        )
        for rate, alpha, seed in itertools.product(RATES, ALPHAS, SEEDS)
    ]


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds of a piece of work, and how many programs XLA compiled in it."""
    compiled: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    jax.monitoring.unregister_event_duration_listener(note)
    return {"seconds": seconds, "programs": len(compiled), "compile_seconds": sum(compiled)}


def differences(first: Config, second: Config) -> list[float]:
    """For each round the larger relative difference between the losses in two runs' records.

    Sums in another order differ in the last bit, and training makes more of it from round to round: in the first rounds the
    runs must agree to rounding, later ones say how unsteady the training is.
    """
    pairs = zip(RunFolder(first.run_folder).records(), RunFolder(second.run_folder).records(), strict=True)
    return [max(abs(a[name] - b[name]) / abs(b[name]) for name in ("train_loss", "test_loss")) for a, b in pairs]


def alone_ones(settings: int) -> list[int]:
    """Positions of the runs to run alone: so many settings with all their seeds, which alone too share compiled programs."""
    count = len(RATES) * len(ALPHAS)
    return [len(SEEDS) * (index * count // settings) + seed for index in range(settings) for seed in range(len(SEEDS))]


def empty_cache(folder: Path) -> None:
    """Programs compiled from now on are kept in this folder, as the command line keeps them in the user's."""
    compilation_cache.reset_cache()
    jax.clear_caches()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def with_measured_lanes(runs: Sequence[Config]) -> list[Config]:
    """The configurations with the layout that is best for one of them alone."""
    choice = choose_layout([build(runs[0])])
    print(choice)
    lanes, devices, *_ = choice.layout
    return [replace(config, engine=replace(config.engine, lanes=lanes, devices=devices)) for config in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--alone", type=int, help="run only so many settings alone, evenly chosen; default: all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sweep_together.jsonl"))
    arguments = parser.parse_intermixed_args()
    quiet = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        shared = configs(Path(folder) / "together", arguments.overrides)
        single = configs(Path(folder) / "alone", arguments.overrides)
        chosen = alone_ones(arguments.alone or len(RATES) * len(ALPHAS))
        empty_cache(Path(folder) / "cache-together")
        together = measured(lambda: run_all(shared, quiet))
        single = with_measured_lanes(single)
        empty_cache(Path(folder) / "cache-alone")
        alone = measured(lambda: [run(single[index], quiet) for index in chosen])
        of_runs = [differences(shared[index], single[index]) for index in chosen]
    row = {
        "benchmark": "sweep_together",
        "runs": len(shared),
        "groups": len(groups(shared)),
        "rounds": shared[0].rounds,
        "together": together,
        "runs_alone": len(chosen),
        "alone": alone,
        "ratio": alone["seconds"] / len(chosen) * len(shared) / together["seconds"],
        "worst_difference_by_round": [max(of_round) for of_round in zip(*of_runs, strict=True)],
    }
    write_rows([row], arguments.output)


if __name__ == "__main__":
    main()
