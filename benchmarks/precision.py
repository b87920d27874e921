"""Does the precision of the clients' matrix products change the accuracy?

    python benchmarks/precision.py configs/mnist5k.yaml algorithm=fedavg --rounds 20 --seeds 0 1 2

Runs the configuration with every precision and seed, one after another. Prints and writes one row for each precision:
test accuracy after the last round, by seed, and how far it is from float32's with the same seed.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from measure import write_rows

from fedjax_qp import config as configuration
from fedjax_qp.experiment import build
from fedjax_qp.runs.loop import of_one_run, simulate

PRECISIONS = ("float32", "tf32", "bfloat16")


def last_accuracy(config: Path, overrides: list[str]) -> float:
    experiment = build(configuration.load(config, overrides))
    records = [record for chunk in of_one_run(simulate([experiment])) for record in chunk.records]
    return float(records[-1]["test_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/precision.jsonl"))
    arguments = parser.parse_intermixed_args()
    common = [*arguments.overrides, f"rounds={arguments.rounds}", f"evaluation.every={arguments.rounds}"]
    found = {
        precision: [
            last_accuracy(arguments.config, [*common, f"precision={precision}", f"seed={seed}"])
            for seed in arguments.seeds
        ]
        for precision in PRECISIONS
    }
    rows = []
    for precision, accuracies in found.items():
        changes = [own - full for own, full in zip(accuracies, found["float32"], strict=True)]
        rows.append(
            {
                "benchmark": "precision",
                "config": str(arguments.config),
                "overrides": common,
                "precision": precision,
                "seeds": arguments.seeds,
                "accuracy": accuracies,
                "mean": mean(accuracies),
                "deviation": stdev(accuracies) if len(accuracies) > 1 else None,
                "mean_change": mean(changes),
                "largest_change": max(abs(change) for change in changes),
            }
        )
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
