"""One run in two processes: the results of one process with all devices, and nothing lost when both are killed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.runs import final_state, quiet, wait_for_rounds, write

from fedjax_qp import config
from fedjax_qp.experiment import build
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import processes
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import run


def settings(devices: int, rounds: int) -> list[str]:
    mesh = [f"engine.devices={devices}", f"engine.lanes={devices}", f"participation.cohort={devices}"]
    return ["engine.parallel=shard_map", *mesh, f"rounds={rounds}"]


def start_two(devices: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes that share so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices // 2}")
    command = [sys.executable, "-m", "fedjax_qp", *arguments, "--coordinator", coordinator, "--processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        for number in range(2)
    ]


def finish(started: list[subprocess.Popen]) -> None:
    """Both end well, and one of them talks."""
    outputs = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "finished after round" in outputs[0] and "round" not in outputs[1]


def assert_same(first: Path, second: Path, rounds: int) -> None:
    """Each round written once; after one round the same but for the order of sums, later ones within grown rounding."""
    lines, expected = RunFolder(first).records(), RunFolder(second).records()
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    losses = [[line["train_loss"] for line in both] for both in (lines, expected)]
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5)
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert int(final_state(first).round) == rounds


def test_two_processes_equal_one(tmp_path):
    file = write(tmp_path, algorithm="fedavg")
    whole = run(config.load(file, [*settings(4, 4), "name=whole"]), quiet()).folder
    finish(start_two(4, ["run", str(file), *settings(4, 4)]))
    assert_same(config.load(file).run_folder, whole, 4)


def test_a_process_among_several_hears_its_signals():
    """JAX's notice of preemption would swallow SIGTERM, by which a cluster asks a run to end."""
    script = """
import os, signal, socket, time
from fedjax_qp.runs import processes
from fedjax_qp.console.terminal import guarded

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
with guarded():
    processes.join(coordinator=f"127.0.0.1:{port}", processes=1, process=0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130 and "SIGTERM: left; nothing is lost" in ended.stderr


@pytest.mark.slow
def test_two_processes_survive_a_kill(tmp_path):
    """Two of four devices each."""
    file = write(tmp_path)
    whole = run(config.load(file, [*settings(8, 40), "name=whole"]), quiet()).folder
    folder = config.load(file).run_folder
    started = start_two(8, ["run", str(file), *settings(8, 40)])
    try:
        wait_for_rounds(started[0], folder, 4)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert len(RunFolder(folder).records()) < 40
    finish(start_two(8, ["resume", str(folder)]))
    assert_same(folder, whole, 40)


def test_options_that_name_no_process_are_refused(monkeypatch):
    with pytest.raises(ConfigurationError, match="--coordinator HOST:PORT, or --cluster"):
        processes.join(processes=2, process=0)
    with pytest.raises(ConfigurationError, match="--processes 2 --process 2.*from 0 to one less"):
        processes.join(coordinator="127.0.0.1:1", processes=2, process=2)
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        processes.join(coordinator="127.0.0.1", processes=2, process=0)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ConfigurationError, match="JAX_PROCESS_ID = 'one'"):
        processes.join(coordinator="127.0.0.1:1", processes=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.parallel=vmap"], "engine.parallel = 'vmap' with 2 processes: choose shard_map"),
        (["engine.parallel=shard_map", "engine.devices=4", "engine.lanes=4"], "choose engine.devices = 8"),
    ],
)
def test_several_processes_use_all_their_devices(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=message):
        build(config.load(write(tmp_path), settings))


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    with pytest.raises(OSError, match="full"), processes.in_common():
        raise OSError("full")
    with processes.in_common():
        pass
    monkeypatch.setattr(processes, "any_of", lambda flag: True)
    with pytest.raises(ConfigurationError, match="another process of this run could not go on"), processes.in_common():
        pass
    with pytest.raises(OSError, match="full"), processes.in_common():
        raise OSError("full")


@pytest.mark.slow
def test_two_processes_leave_a_run_alone_that_another_continues(tmp_path):
    """Only the first one takes the lock, and the other one must not wait for it."""
    file = write(tmp_path, algorithm="fedavg")
    finish(start_two(4, ["run", str(file), *settings(4, 2)]))
    folder = config.load(file).run_folder
    with RunFolder(folder).lock():
        started = start_two(4, ["resume", str(folder), "rounds=4"])
        outputs = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], outputs
    assert "another process continues the run" in outputs[0] and "it says why" in outputs[1]


def test_a_process_alone_agrees_with_itself():
    assert processes.first() and processes.of_first(0.1) == 0.1
    assert processes.any_of(True) and not processes.any_of(False)
    processes.meet("here")
