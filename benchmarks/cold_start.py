"""How long from the command to the end of the first round, without and with the programs of an earlier run?

    python benchmarks/cold_start.py [CASE ...] [--split FILE]

Every run is a process of its own, `fedjax-qp run` with few local steps and no evaluation, ended after its first round:
what is measured is the start. The cache folder is a temporary one: an uncounted run that keeps no programs fills it with
prepared data and models; it holds no program at a case's first counted run ("cold"), and has them at those after it ("warm").
ResNet-18 needs CIFAR-10 and FedMut's split (--split). Prints and writes a row for each case, in place of its older one:
seconds to the end of the first round, and the phases that the run itself reports.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measure import write_rows

from fedjax_qp.runs.folder import RunFolder

SHORT_ROUNDS = ["engine.rounds_per_chunk=1", "local.epochs=1", "local.maximum_steps=2"]
SHORT_ROUNDS += ["rounds=1000000", "evaluation.every=1000000"]
CASES = {
    "lenet": ["configs/mnist5k.yaml"],
    "lenet, lanes auto": ["configs/mnist5k.yaml", "engine.lanes=auto"],
    "resnet18": ["configs/cifar10_resnet18_0.1.yaml", "participation.cohort=2"],
    "smollm2 lora": ["configs/alpaca_smollm2.yaml", "algorithm=fedit", "engine.lanes=1", "participation.cohort=1"],
}
CASES["smollm2 lora"] += ["text.test_records=1", "text.train_records=4", "evaluation.batch_size=1"]


def first_round(settings: list[str], cache: str, *, keep_programs: bool = True) -> dict:
    """Starts a run with its own cache folder and waits for its first record."""
    variables = {"FEDJAX_QP_CACHE": cache, **({} if keep_programs else {"JAX_ENABLE_COMPILATION_CACHE": "false"})}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedjax_qp", "run", *settings, *SHORT_ROUNDS, f"folder={folder}", "name=cold"]
        run = RunFolder(Path(folder) / "cold-seed0")
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while not run.records(missing_ok=True):
            if process.poll() is not None:
                assert process.stderr is not None
                raise SystemExit(f"{' '.join(command)} ended without a round:\n{process.stderr.read()}")
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.kill()
        process.communicate()
        return {"first_round_seconds": seconds, "phases": run.startup.read()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--split", help="FedMut's cifar10_100_noniidCase5_beta0.1.json")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs; the cold one is single")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cold_start.jsonl"))
    arguments = parser.parse_args()
    older = (
        [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    )
    rows = [row for row in older if row["case"] not in arguments.cases]
    for case in arguments.cases:
        settings = [*CASES[case]]
        if case == "resnet18":
            settings.append(f"partition.path={arguments.split}")
        with tempfile.TemporaryDirectory() as cache:
            first_round(settings, cache, keep_programs=False)
            cold = first_round(settings, cache)
            warm = [first_round(settings, cache) for _ in range(arguments.repeats)]
            kept = [file.stat().st_size for file in (Path(cache) / "programs").iterdir()]
        seconds = [run["first_round_seconds"] for run in warm]
        rows.append(
            {
                "benchmark": "cold_start",
                "case": case,
                "settings": [setting for setting in CASES[case] if not setting.startswith("configs/")],
                "cold_seconds": cold["first_round_seconds"],
                "warm_seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds)},
                "cold_phases": cold["phases"],
                "warm_phases": warm[seconds.index(sorted(seconds)[len(seconds) // 2])]["phases"],
                "kept_megabytes": sum(kept) / 2**20,
            }
        )
    write_rows(rows, arguments.output)


if __name__ == "__main__":
    main()
