"""How close do packed lanes come to their bound, and does `lanes: auto` pick the best number?

    python benchmarks/packing.py configs/cifar10_lenet_0.1.yaml partition.path=…

The bound of a round with L lanes is max(longest client, total/L) steps; a step's time is measured for each L. Prints and
writes one row per L: seconds for the rounds, the bound, their ratio, and the share of lane-steps in use.
"""

import argparse
from pathlib import Path
from statistics import median

from measure import TimedRounds, in_turn, write_rows

from fedjax_qp import config as configuration
from fedjax_qp.experiment import build, with_lanes
from fedjax_qp.lanes import choose_lanes, measure_lanes

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
    timed = {str(lanes): TimedRounds(with_lanes(experiment, lanes), lanes, arguments.rounds) for lanes in LANES}
    seconds = in_turn(timed, arguments.repeats)
    chosen, _ = choose_lanes(experiment)
    best = min(LANES, key=lambda lanes: median(seconds[str(lanes)]))
    rows = []
    for lanes in LANES:
        rounds = timed[str(lanes)]
        step = measure_lanes(experiment, lanes).step_seconds
        bound = max(rounds.longest, rounds.client_steps / lanes) * step
        measured = median(seconds[str(lanes)])
        rows.append(
            {
                "benchmark": "packing",
                "lanes": lanes,
                "seconds": measured,
                "spread": [min(seconds[str(lanes)]), max(seconds[str(lanes)])],
                "to_best": measured / median(seconds[str(best)]),
                "step_milliseconds": 1e3 * step,
                "bound_seconds": bound,
                "ratio_to_bound": measured / bound,
                "steps_to_bound": rounds.steps / max(rounds.longest, rounds.client_steps / lanes),
                "use": rounds.client_steps / (rounds.steps * lanes),
                "compile_seconds": rounds.compile_seconds,
                "auto_picks": chosen,
            }
        )
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
