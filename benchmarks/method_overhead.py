"""What does a round of each method cost, relative to FedAvg's?

    python benchmarks/method_overhead.py configs/cifar10_lenet_0.1.yaml partition.path=…
    python benchmarks/method_overhead.py configs/cifar10_resnet18_0.1.yaml partition.path=… \
        local.epochs=1 local.maximum_steps=1 local.batch_size=10 --output benchmarks/results/method_overhead_resnet18.jsonl

Same rounds, same lanes, methods in turn; the ratio is taken within each turn.
"""

import argparse
from pathlib import Path
from statistics import median

from measure import TimedRounds, in_turn, paired_ratio, write_rows

from fedjax_qp import config as configuration
from fedjax_qp.experiment import build
from fedjax_qp.runs.autotune import choose_layout

METHODS = {
    "fedavg": ["algorithm=fedavg", "algorithm.weighting=uniform"],
    "fedmut": ["algorithm=fedmut", "algorithm.alpha=1"],
    "fedqp-nearest": ["algorithm=fedqp", "algorithm.alpha=1", "algorithm.form=nearest"],
    "fedqp-box": ["algorithm=fedqp", "algorithm.alpha=1", "algorithm.form=box"],
    "fedqp-joint": ["algorithm=fedqp", "algorithm.alpha=1", "algorithm.form=joint"],
    "fedqp-history": [
        *("algorithm=fedqp", "algorithm.alpha=1", "algorithm.form=references", "algorithm.references=history")
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/method_overhead.jsonl"))
    arguments = parser.parse_intermixed_args()
    timed = {}
    for method in arguments.methods:
        overrides = [*arguments.overrides, *METHODS[method], "engine.rounds_per_chunk=1"]
        experiment = build(configuration.load(arguments.config, overrides))
        timed[method] = TimedRounds(experiment, choose_layout([experiment]).layout, arguments.rounds)
    seconds = in_turn(timed, arguments.repeats)
    rows = [
        {
            "benchmark": "method_overhead",
            "model": experiment.config.model.name,
            "method": method,
            "seconds": median(seconds[method]),
            "ratio_to_fedavg": paired_ratio(seconds, method, "fedavg"),
            "client_steps": timed[method].client_steps,
            "compile_seconds": timed[method].compile_seconds,
        }
        for method in arguments.methods
    ]
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
