"""Accuracy of methods over seeds, in the background and resumable: runs what is missing, then writes tables and a figure.

Question: how do the methods compare at equal budget on one task, with what spread over seeds?

    python benchmarks/accuracy.py tune   --config configs/cifar10_lenet_0.1.yaml partition.path=…      seed 3, 20 rounds
    python benchmarks/accuracy.py main   --config configs/cifar10_lenet_0.1.yaml partition.path=…      seeds 0 1 2, 60 rounds
    python benchmarks/accuracy.py long   --config configs/cifar10_lenet_0.1.yaml partition.path=…      seed 0, 200 rounds
    python benchmarks/accuracy.py baselines --config … partition.path=…       other papers' methods: seeds 0 1 2, 60 rounds
    python benchmarks/accuracy.py report --config …                                                    only the tables

Every tuned method gets five settings (clustered sampling has but four) on the seed that the comparison does not use; the
setting with the best mean of the last five evaluations is taken. FedQP's fifth is the best of the first four with a margin of
0.25. The comparison adds the ablations of the best form of FedQP: FedMut's mutants shifted to the same mean, that mean alone,
and FedAvgM with that drift as its momentum. A run that diverged is named in the report and counts in no mean. Finished runs
are kept, interrupted ones are continued; a run of the same name with other settings, as after another tuning, is an error.
With `--tuned benchmarks/results/OTHER-tune.json` the settings are those found on another task.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.files import keep_programs
from fedjax_qp.reports import compare as comparison
from fedjax_qp.reports import rendering
from fedjax_qp.reports.plots import plot_comparison
from fedjax_qp.runs import run as running
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.training import Outcome

TUNE = {
    "fedavgm": [
        f"algorithm=fedavgm algorithm.weighting=uniform algorithm.momentum={m}" for m in (0.3, 0.5, 0.7, 0.9, 0.6)
    ],
    "fedmut": [f"algorithm=fedmut algorithm.alpha={a}" for a in (0.5, 1, 2, 4, 0.25)],
    "nearest": [
        f"algorithm=fedqp algorithm.form=nearest algorithm.alpha={a} algorithm.margin={t}"
        for a, t in ((0.5, 0), (1, 0), (2, 0), (4, 0), (2, 0.25))
    ],
    "box": [
        f"algorithm=fedqp algorithm.form=box algorithm.alpha={a} algorithm.margin={t}"
        for a, t in ((0.5, 0), (1, 0), (1.5, 0), (2, 0), (2, 0.25))
    ],
    "joint": [
        f"algorithm=fedqp algorithm.form=joint algorithm.alpha={a} algorithm.drift={m} algorithm.margin={t}"
        for a, m, t in ((1, 0.5, 0), (1, 0.7, 0), (2, 0.5, 0), (2, 0.7, 0), (2, 0.5, 0.25))
    ],
    "references": [
        f"algorithm=fedqp algorithm.form=references algorithm.references={r} algorithm.alpha={a} algorithm.margin={t}"
        for r, a, t in (
            ("clients", 1, 0),
            ("clients", 2, 0),
            ("history", 1, 0),
            ("history", 2, 0),
            ("history", 2, 0.25),
        )
    ],
}
# The other papers' methods. SCAFFOLD and FedDyn are made for plain SGD, so their learning rate is among what is tuned, and
# FedAvg with plain SGD is their control.
BASELINES = {
    "fedavg-sgd": [
        f"algorithm=fedavg algorithm.weighting=uniform local.momentum=0 local.learning_rate={rate}"
        for rate in (0.02, 0.05, 0.1, 0.2, 0.3)
    ],
    "scaffold": [
        f"algorithm=scaffold local.momentum=0 local.learning_rate={rate} algorithm.server_learning_rate={server}"
        for rate, server in ((0.02, 1), (0.05, 1), (0.1, 1), (0.2, 1), (0.1, 0.5))
    ],
    "feddyn": [
        f"algorithm=feddyn local.momentum=0 local.learning_rate={rate} algorithm.alpha={alpha}"
        for rate, alpha in ((0.05, 0.01), (0.1, 0.01), (0.05, 0.1), (0.1, 0.1), (0.1, 0.001))
    ],
    "fedsam": [
        f"algorithm=fedsam algorithm.weighting=uniform algorithm.radius={r}" for r in (0.01, 0.02, 0.05, 0.1, 0.2)
    ],
    "moon": [f"algorithm=moon algorithm.weighting=uniform algorithm.contrastive={m}" for m in (0.1, 0.5, 1, 5, 10)],
    "fedgen": [f"algorithm=fedgen algorithm.distillation={d}" for d in (0.1, 0.3, 1, 3, 10)],
    "clustered-sampling": [
        "algorithm=clustered_sampling algorithm.by=size",
        *(
            f"algorithm=clustered_sampling engine.rounds_per_chunk=1 algorithm.measure={measure}"
            for measure in ("angle", "L2", "L1")
        ),
    ],
}
FIXED = {"fedavg-size": "algorithm=fedavg", "fedavg-uniform": "algorithm=fedavg algorithm.weighting=uniform"}
PHASES = {"tune": ((3,), 20), "main": ((0, 1, 2), 60), "long": ((0,), 200), "baselines": ((0, 1, 2), 60)}
TUNED_LAST, LAST = 5, 10


def _is_finished(folder: Path, rounds: int) -> bool:
    return any(line["round"] == rounds for line in RunFolder(folder).records(missing_ok=True))


def score(folder: Path, last: int) -> float:
    """Mean accuracy of the last evaluations; 0 for a run that diverged."""
    if RunFolder(folder).diverged():
        return 0.0
    accuracies = [line["test_accuracy"] for line in RunFolder(folder).records() if "test_accuracy" in line]
    return sum(accuracies[-last:]) / len(accuracies[-last:])


def mean_drift(folder: Path) -> float | None:
    """Mean drift over the rounds that have something to mutate along."""
    drifts = [
        line["mutation/drift"] for line in RunFolder(folder).records()[1:] if line.get("mutation/drift") is not None
    ]
    return sum(drifts) / len(drifts) if drifts else None


def configure(arguments: argparse.Namespace, phase: str, label: str, method: str, seed: int) -> configuration.Config:
    rounds = arguments.rounds or PHASES[phase][1]
    name = f"{arguments.config.stem}-{phase}-{label}"
    overrides = [*arguments.overrides, *method.split(), f"name={name}", f"seed={seed}", f"rounds={rounds}"]
    return configuration.load(arguments.config, overrides)


def run_all(configs: Sequence[configuration.Config], console: Console) -> list[Outcome]:
    """Runs what is missing of them.

    Raises:
      SystemExit: they were interrupted; the same command continues.
    """
    outcomes = running.run_all(configs, console)
    if any(outcome.reason == "interrupted" for outcome in outcomes):
        raise SystemExit(130)
    return outcomes


def tune(arguments: argparse.Namespace, console: Console) -> dict[str, str]:
    """Runs the settings of every tuned method; returns the best of each and keeps all scores in a file.

    With `--methods` only those are tuned anew; of the others the file keeps what it has.
    """
    wanted = arguments.methods or [*TUNE, *BASELINES]
    before = tuned(arguments)
    chosen, scores = before["chosen"], [row for row in before["scores"] if row["method"] not in wanted]
    for method, settings in {**TUNE, **BASELINES}.items():
        if method not in wanted:
            continue
        (seed,) = PHASES["tune"][0]
        configs = [
            configure(arguments, "tune", f"{method}{index}", setting, seed) for index, setting in enumerate(settings)
        ]
        rows = [
            {
                "method": method,
                "setting": setting,
                "accuracy": score(outcome.folder, TUNED_LAST),
                "drift": mean_drift(outcome.folder),
                "diverged": RunFolder(outcome.folder).diverged(),
            }
            for setting, outcome in zip(settings, run_all(configs, console), strict=True)
        ]
        chosen[method] = max(rows, key=lambda row: row["accuracy"])["setting"]
        scores += rows
    write(arguments, "tune", {"chosen": chosen, "scores": scores})
    return chosen


def compared(chosen: dict[str, str], scores: list[dict]) -> dict[str, str]:
    """The methods of the comparison: fixed ones, tuned ones, the two best forms of FedQP and the best one's ablations."""
    best = {row["method"]: row["accuracy"] for row in scores if row["setting"] == chosen[row["method"]]}
    drift = {row["method"]: row["drift"] for row in scores if row["setting"] == chosen[row["method"]]}
    forms = sorted(("nearest", "box", "joint", "references"), key=lambda form: -best[form])[:2]
    methods = {**FIXED, "fedavgm": chosen["fedavgm"], "fedmut": chosen["fedmut"]}
    methods |= {f"fedqp-{form}": chosen[form] for form in forms}
    methods |= {f"fedqp-{forms[0]}-{use}": f"{chosen[forms[0]]} algorithm.use={use}" for use in ("shifted", "drift")}
    momentum = min(max(drift[forms[0]], 0), 0.99)
    same_drift = f"algorithm=fedavgm algorithm.weighting=uniform algorithm.momentum={momentum:.2f}"
    return methods | {"fedavgm-same-drift": same_drift}


def compare_methods(arguments: argparse.Namespace, phase: str, methods: dict[str, str], console: Console) -> None:
    """Method by method, its seeds in one program; the report is written anew after each."""
    folders, diverged = [], []
    for label, method in methods.items():
        configs = [configure(arguments, phase, label, method, seed) for seed in arguments.seeds or PHASES[phase][0]]
        if not arguments.only_report:
            run_all(configs, console)
        for config in configs:
            if _is_finished(config.run_folder, config.rounds):
                folders.append(config.run_folder)
            elif RunFolder(config.run_folder).diverged():
                diverged.append(config.run_folder.name)
        report(arguments, phase, folders, diverged, console)


def report(
    arguments: argparse.Namespace, phase: str, folders: list[Path], diverged: list[str], console: Console
) -> None:
    """Table, figure and curves of the finished runs, with the diverged ones named."""
    if not folders:
        return
    runs = comparison.load_runs(folders)
    wanted = f"{arguments.config.stem}-{phase}-fedavg-uniform"
    baseline = wanted if any(method.label == wanted for method in comparison.methods(runs)) else None
    rows = comparison.summary(runs, last=arguments.last, target=None, baseline=baseline)
    console.print(rendering.table(rows))
    stem = arguments.output or _results(arguments, phase)
    note = f"\nDiverged, and in no mean: {', '.join(diverged)}.\n" if diverged else ""
    files = {ending: stem.with_name(stem.name + ending) for ending in (".md", ".json", ".png", ".csv")}
    files[".md"].write_text(rendering.to_markdown(rows) + note)
    files[".json"].write_text(rendering.to_json(rows))
    plot_comparison(runs, files[".png"])
    with files[".csv"].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "round", "train_loss", "test_loss", "test_accuracy", "client_accuracy_q10", "drift"])
        for folder in folders:
            for line in RunFolder(folder).records():
                if "test_accuracy" in line:
                    worst = line["client_accuracy"]["q10"]
                    values = (line["train_loss"], line["test_loss"], line["test_accuracy"], worst)
                    drift = line.get("mutation/drift")
                    numbers = ["" if value is None else f"{value:.5g}" for value in (*values, drift)]
                    writer.writerow([folder.name, line["round"], *numbers])


def _results(arguments: argparse.Namespace, phase: str) -> Path:
    folder = Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{arguments.config.stem.replace('.', '_')}-{phase}"


def tuned(arguments: argparse.Namespace) -> dict:
    """What the tuning found so far."""
    file = arguments.tuned or _results(arguments, "tune").with_suffix(".json")
    return json.loads(file.read_text()) if file.exists() else {"chosen": {}, "scores": []}


def write(arguments: argparse.Namespace, phase: str, content: dict) -> None:
    _results(arguments, phase).with_suffix(".json").write_text(json.dumps(content, indent=1))


def check_methods(parser: argparse.ArgumentParser, asked: list[str] | None, known: list[str]) -> None:
    """Ends with an error where a name is unknown, as an override that stands behind `--methods` is."""
    if unknown := [name for name in asked or () if name not in known]:
        parser.error(f"--methods {' '.join(unknown)}: choose among {' '.join(known)}; settings stand before --methods.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=[*PHASES, "report"])
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10_lenet_0.1.yaml"))
    parser.add_argument("--rounds", type=int, help="instead of the phase's own number")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the phase's own seeds")
    parser.add_argument("--last", type=int, default=LAST, help="the evaluations at the end whose mean is reported")
    parser.add_argument("--methods", nargs="+", help="only these of the comparison or the tuning")
    parser.add_argument("--tuned", type=Path, help="file of another task's tuning, whose settings are taken over")
    parser.add_argument("--output", type=Path, help="the report's files, without ending; default by task and phase")
    parser.add_argument("overrides", nargs="*", help="settings to change in all runs")
    arguments = parser.parse_intermixed_args()
    if arguments.tuned and arguments.phase == "tune":
        parser.error("--tuned takes over another task's settings; leave it out to tune.")
    if arguments.output and arguments.phase in ("tune", "report"):
        parser.error(f"--output names the files of one comparison; leave it out of {arguments.phase}.")
    arguments.only_report = arguments.phase == "report"
    keep_programs()
    console = Console()
    if arguments.phase == "tune":
        check_methods(parser, arguments.methods, [*TUNE, *BASELINES])
        console.print(tune(arguments, console))
        return
    found = tuned(arguments)
    if arguments.phase == "baselines":
        methods = {"fedavg-uniform": FIXED["fedavg-uniform"]}
        methods |= {name: found["chosen"][name] for name in BASELINES if name in found["chosen"]}
    else:
        methods = compared(found["chosen"], found["scores"])
    if arguments.methods:
        check_methods(parser, arguments.methods, list(methods))
        methods = {label: methods[label] for label in arguments.methods}
    forms = [label for label in methods if label.startswith("fedqp-")]
    long = {label: methods[label] for label in ("fedavg-uniform", "fedmut", *forms[:1]) if label in methods}
    for phase in ("main", "long") if arguments.only_report else (arguments.phase,):
        compare_methods(arguments, phase, long if phase == "long" else methods, console)


if __name__ == "__main__":
    main()
