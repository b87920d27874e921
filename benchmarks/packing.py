"""How close do packed lanes come to their bound, and does `lanes: auto` pick the best number?

    python benchmarks/packing.py configs/cifar10_lenet_0.1.yaml partition.path=…

The bound of a round with L lanes is max(longest client, total/L) steps. Rounds of all L are timed in turn, each between two
measurements of its step, and the ratio to the bound is taken within each turn. Prints and writes one row per L: seconds for
the rounds, their ratio to the bound, and the share of lane-steps in use.
"""

import argparse
import time
from pathlib import Path
from statistics import median

from measure import TimedRounds, write_rows

from fedjax_qp import config as configuration
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import build
from fedjax_qp.runs.autotune import LaneTimer, sampled_steps

LANES = (1, 2, 3, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/packing.jsonl"))
    arguments = parser.parse_intermixed_args()
    overrides = [*arguments.overrides, "engine.rounds_per_chunk=1"]
    experiment = build(configuration.load(arguments.config, overrides))
    rounds = {lanes: TimedRounds(experiment, Layout(lanes), arguments.rounds) for lanes in LANES}
    timers = {lanes: LaneTimer([experiment], Layout(lanes)) for lanes in LANES}
    cohorts = sampled_steps([experiment])
    chosen = min(LANES, key=lambda lanes: timers[lanes].trial(cohorts).round_seconds)  # what `choose_layout` goes by
    seconds: dict[int, list[float]] = {lanes: [] for lanes in LANES}
    steps: dict[int, list[float]] = {lanes: [] for lanes in LANES}
    for _ in range(arguments.repeats):  # in turn, so that a slow minute hits all alike
        for lanes in LANES:
            before = timers[lanes]()
            started = time.perf_counter()
            rounds[lanes]()
            seconds[lanes].append(time.perf_counter() - started)
            steps[lanes].append((before + timers[lanes]()) / 2)
    best = min(LANES, key=lambda lanes: median(seconds[lanes]))
    rows = []
    for lanes in LANES:
        timed = rounds[lanes]
        bound = max(timed.longest, timed.client_steps / lanes)
        ratios = [round / (bound * step) for round, step in zip(seconds[lanes], steps[lanes], strict=True)]
        rows.append(
            {
                "benchmark": "packing",
                "lanes": lanes,
                "seconds": median(seconds[lanes]),
                "spread": [min(seconds[lanes]), max(seconds[lanes])],
                "to_best": median(seconds[lanes]) / median(seconds[best]),
                "step_milliseconds": 1e3 * median(steps[lanes]),
                "ratio_to_bound": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
                "steps_to_bound": timed.steps / bound,
                "use": timed.client_steps / (timed.steps * lanes),
                "compile_seconds": timed.compile_seconds,
                "auto_picks": chosen,
            }
        )
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
