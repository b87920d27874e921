"""Small runs by configuration, in this process or in others."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from fedjax_qp.experiment import build, first_state
from fedjax_qp.runs.folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]


SMALL = {
    "name": "small",
    "rounds": 4,
    "data": "digits",
    "partition": {"name": "dirichlet", "clients": 12, "beta": 0.5, "minimum": 5},
    "model": {"name": "mlp", "hidden": [16]},
    "algorithm": {"name": "fedqp", "form": "nearest", "alpha": 1.0},
    "local": {"learning_rate": 0.05, "epochs": 1, "batch_size": 16},
    "participation": {"cohort": 4},
    "engine": {"lanes": 2, "rounds_per_chunk": 2},
    "evaluation": {"every": 1, "batch_size": 100},
}


def write(folder: Path, **changes) -> Path:
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**SMALL, "folder": str(folder / "runs"), **changes}))
    return file


def final_state(folder: Path):
    experiment = build(RunFolder(folder).config())
    with RunFolder(folder).checkpoints() as checkpoints:
        return checkpoints.restore(first_state(experiment))


def assert_bitwise(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def quiet() -> Console:
    return Console(quiet=True)


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fedjax_qp", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ))


def wait_for_rounds(process: subprocess.Popen, folder: Path, rounds: int) -> None:
    file = RunFolder(folder).records_file
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= rounds:
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended early:\n{process.communicate()[0]}")
        time.sleep(0.002)
    pytest.fail(f"no {rounds} rounds in time")
