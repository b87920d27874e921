"""Real commands, killed with SIGKILL at random moments and continued until they end, leave what an uninterrupted one leaves.

Compared to the bit: the bytes of every run's records, and every leaf of every checkpoint. The variable KILLS says how many
killed commands each case has (default 2).
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from support.runs import SMALL

from fedjax_qp.runs.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("KILLS", "2"))
ROUNDS = 24
STARTING = 0.2  # of the kills fall into the start, before any round
PATIENCE = 600  # seconds
RUN = {**SMALL, "rounds": ROUNDS, "checkpoints": {"keep": 2}, "tracking": {"tensorboard": False}}


class Case(NamedTuple):
    """A command that writes runs."""

    prepare: Callable[[Path], None]  # its files, in a folder of its own
    begin: list[str]
    runs: list[str]  # their folders below that one
    resume: list[str] | None = None  # once the only run has begun; None: the same command again


def write_fedqp(folder: Path) -> None:
    participation = {"cohort": 4, "dropout": 0.2, "stragglers": 0.3}
    algorithm = {"name": "fedqp", "form": "joint", "alpha": 1.0}
    write_yaml(folder / "run.yaml", RUN | {"algorithm": algorithm, "participation": participation})


def write_perfit(folder: Path) -> None:
    words = [{"instruction": f"Say {n % 7}.", "output": f"The cat {'sat ' * (n % 5)}there."} for n in range(40)]
    (folder / "words.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    model = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"
    if not model.is_dir():
        pytest.skip("the folder ../shared with the small language model is not here")
    changes = {
        "rounds": ROUNDS // 2,
        "data": {"name": "records", "files": str(folder / "words.jsonl")},
        "partition": {"name": "iid", "clients": 3},
        "model": {"name": "pretrained", "path": str(model), "rank": 2},
        "algorithm": {"name": "perfit", "warm_up": 1, "prunings": 2, "score_batches": 1},
        "text": {"cut_off": 48, "template": "short", "test_records": 4},
        "local": {"optimizer": "adam", "learning_rate": 0.003, "epochs": 2, "batch_size": 4},
        "participation": {"cohort": 2, "dropout": 0.2},
        "evaluation": {"every": 1, "batch_size": 4},
    }
    write_yaml(folder / "run.yaml", RUN | changes)


def write_seeds(folder: Path) -> None:
    write_yaml(folder / "run.yaml", RUN | {"algorithm": "fedavg"})


def write_sweep(folder: Path) -> None:
    write_seeds(folder)
    sweep = {
        "name": "several",
        "config": "run.yaml",
        "folder": "runs",
        "space": {"local.learning_rate": [0.02, 0.05, 1e-7]},
        "seeds": [0, 1],
        "workers": 1,
        "rank": {"last": 1},
        "early_stopping": {"after": 6, "least_trials": 2},
    }
    write_yaml(folder / "sweep.yaml", sweep)


def write_yaml(file: Path, values: dict) -> None:
    file.write_text(yaml.safe_dump(values))


ONE = ["runs/small-seed0"]
CASES = {
    "fedqp": Case(write_fedqp, ["run", "run.yaml"], ONE, ["resume", ONE[0]]),
    "perfit": Case(write_perfit, ["run", "run.yaml"], ONE, ["resume", ONE[0]]),
    "sweep": Case(
        write_sweep,
        ["sweep", "sweep.yaml"],
        [f"runs/several/runs/trial-{trial:03d}-seed{seed}" for trial in range(3) for seed in (0, 1)],
    ),
    "seeds": Case(
        write_seeds, ["run", "run.yaml", "--seeds", "0", "1", "2"], [f"runs/small-seed{seed}" for seed in range(3)]
    ),
}


def start(case: Case, folder: Path) -> subprocess.Popen:
    """Begins a command, or continues it; in a session of its own, so that a kill takes its workers too."""
    begun = case.resume is not None and RunFolder(folder / case.runs[0]).holds_run()
    arguments = case.resume if begun and case.resume is not None else case.begin
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, "-m", "fedjax_qp", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(case: Case, folder: Path) -> float:
    """Runs a command to its end; returns how long its start took."""
    began, process = time.monotonic(), start(case, folder)
    while not lines(case, folder) and process.poll() is None:
        time.sleep(0.01)
    starting = time.monotonic() - began
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return starting


def lines(case: Case, folder: Path) -> int:
    """Records that all runs have so far."""
    total = 0
    for run in case.runs:
        with contextlib.suppress(FileNotFoundError):
            total += RunFolder(folder / run).records_file.read_bytes().count(b"\n")
    return total


def kill(case: Case, folder: Path, numbers: np.random.Generator, starting: float, everything: int) -> None:
    """Kills a command in its start, or a moment after some number of records that it has not come to yet."""
    process = start(case, folder)
    end = time.monotonic() + PATIENCE
    if numbers.random() < STARTING:
        time.sleep(numbers.uniform(0, starting))
    else:
        target = numbers.integers(lines(case, folder), max(everything, lines(case, folder) + 1))
        while lines(case, folder) <= target and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(numbers.uniform(0, 0.3))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def contents(folder: Path) -> tuple[bytes, dict[int, dict[str, bytes]]]:
    """A run's records and the leaves of all its checkpoints."""
    with RunFolder(folder).checkpoints() as checkpoints:
        read = checkpoints._worker.submit  # orbax works in that thread
        states = {round: read(checkpoints._read, round).result() for round in checkpoints.rounds()}
    leaves = {round: {name: leaf.tobytes() for name, leaf in state.items()} for round, state in states.items()}
    return RunFolder(folder).records_file.read_bytes(), leaves


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], tuple[Path, float]]:
    """The uninterrupted command of a case, with the seconds of its start."""
    known: dict[str, tuple[Path, float]] = {}

    def of(name: str) -> tuple[Path, float]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            CASES[name].prepare(folder)
            known[name] = folder, finish(CASES[name], folder)
        return known[name]

    return of


@pytest.mark.parametrize("trial", range(KILLS))
@pytest.mark.parametrize("name", CASES)
def test_killed_commands_end_with_the_same_bits(whole, tmp_path, name, trial):
    case, (expected, starting) = CASES[name], whole(name)
    case.prepare(tmp_path)
    numbers = np.random.default_rng((trial, len(name)))
    for _ in range(numbers.integers(1, 3)):
        kill(case, tmp_path, numbers, starting, lines(case, expected))
    finish(case, tmp_path)
    for run in case.runs:
        found, wanted = contents(tmp_path / run), contents(expected / run)
        assert found[0] == wanted[0], f"{run}: other records"
        assert found[1].keys() == wanted[1].keys(), f"{run}: checkpoints of other rounds"
        assert found[1] == wanted[1], f"{run}: other states"
