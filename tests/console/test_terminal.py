"""A command ends in order on a signal, at any moment, and outlives its terminal."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from support.runs import REPOSITORY, write

from fedjax_qp import config
from fedjax_qp.console import terminal
from fedjax_qp.console.terminal import OutlivingStream, guarded, listening
from fedjax_qp.runs import record_file
from fedjax_qp.runs.folder import RunFolder

# A signal that is ignored stays so in child processes, and tests that run in the background, or with nohup, ignore some.
HEARING = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, "-m", "fedjax_qp", *sys.argv[1:]])
"""
_begun: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_command_left():
    yield
    for process in _begun:
        process.kill()
        process.communicate()
    _begun.clear()


def command(arguments: list[str], **options) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HEARING, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **{"stdout": subprocess.PIPE, **options},
    )
    _begun.append(process)
    return process


def wait_until_caught(process: subprocess.Popen, number: signal.Signals) -> None:
    """Returns when the process has a handler of its own for the signal."""
    status, end = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    if not status.exists():
        pytest.skip("the system does not say which signals a process catches")
    while time.monotonic() < end:
        caught = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        # Python itself catches SIGINT from its start; the guard's other signals show that it stands.
        if all(int(caught, 16) >> (one - 1) & 1 for one in (number, signal.SIGTERM, signal.SIGHUP)):
            return
        time.sleep(0.01)
    pytest.fail("no handler in time")


@pytest.mark.parametrize(("number", "wait"), [(signal.SIGINT, 0), (signal.SIGHUP, 1)])
def test_before_the_first_round_a_signal_ends_a_run_with_one_line(tmp_path, wait, number):
    file = write(tmp_path)
    process = command(["run", str(file), "rounds=100000"])
    wait_until_caught(process, number)
    time.sleep(wait)  # in its imports
    process.send_signal(number)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1 and "nothing is lost" in error


def wait_for_rounds(folder: Path, rounds: int) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):
            if RunFolder(folder).records_file.read_bytes().count(b"\n") >= rounds:
                return
        time.sleep(0.01)
    pytest.fail("no rounds in time")


def test_a_closed_terminal_ends_a_run_in_order(tmp_path):
    file = write(tmp_path)
    folder = config.load(file).run_folder
    process = command(["run", str(file), "rounds=100000"])
    wait_for_rounds(folder, 4)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130 and "SIGHUP: finishing this chunk" in output
    assert record_file.gap(RunFolder(folder).records()) is None


def test_a_second_signal_leaves_at_once_and_says_what_is_kept(tmp_path):
    """The chunk is far too long to wait for."""
    file = write(tmp_path)
    folder = config.load(file).run_folder
    process = command(["run", str(file), "rounds=30000", "engine.rounds_per_chunk=3000", "evaluation.every=3000"])
    end = time.monotonic() + 240
    while not RunFolder(folder).startup.path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    before = time.monotonic()
    output, error = process.communicate(timeout=60)
    assert time.monotonic() - before < 20
    assert process.returncode == 130 and "once more to leave at once" in output
    assert "SIGINT: left at once" in error and str(folder) in error and "Traceback" not in error


def test_a_run_outlives_its_pipe_and_a_full_disk_for_its_output(tmp_path):
    file = write(tmp_path)
    with open("/dev/full", "w") as full:
        process = command(["run", str(file), "rounds=2"], stdout=full)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 0 and "the output is lost from here on" in error
    reading, writing = os.pipe()
    os.close(reading)
    process = command(["resume", str(config.load(file).run_folder), "rounds=4"], stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=240)
    assert (process.returncode, error) == (0, "")
    assert len(RunFolder(config.load(file).run_folder).records()) == 4


def test_a_terminal_without_unicode_shows_question_marks(tmp_path):
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    process = command(["run", str(write(tmp_path)), "rounds=2"], env=environment)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert "finished after round 2" in output and "Traceback" not in error


def test_a_stream_is_silent_after_its_first_failure():
    class Broken:
        encoding = "utf-8"

        def write(self, text: str) -> None:
            raise BrokenPipeError

    stream = OutlivingStream(Broken())  # pyright: ignore[reportArgumentType]
    assert stream.write("text") == 4 and stream.write("more") == 4
    assert stream.encoding == "utf-8"


def test_listeners_get_signals_and_give_them_back():
    before, names = signal.getsignal(signal.SIGTERM), []
    with listening(names.append):
        os.kill(os.getpid(), signal.SIGTERM)
    assert names == ["SIGTERM"] and signal.getsignal(signal.SIGTERM) is before
    with guarded(), listening(names.append):
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 20
        while len(names) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert names == ["SIGTERM"] * 2 and signal.getsignal(signal.SIGTERM) is before and not terminal._guarded


def test_a_listener_that_fails_ends_the_process():
    """Its thread must not die alone, after which no signal would be heard."""
    script = """
import os, signal, time
from fedjax_qp.console.terminal import guarded, listening

def fail(name):
    raise RuntimeError("no console")

with guarded(), listening(fail):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (130, "SIGTERM: left at once (no console)\n")


def test_the_installed_command_is_guarded_while_it_imports():
    entry = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]["fedjax-qp"]
    module, _, function = entry.partition(":")
    script = f"import sys; from {module} import {function} as main; print(*sys.modules); sys.argv[1:] = ['--version']; main()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    loaded, version = ended.stdout.splitlines()
    assert ended.returncode == 0 and version.startswith("fedjax-qp ")
    assert not {"fedjax_qp.cli", "tyro", "rich", "numpy", "jax"} & set(loaded.split())


def test_outside_of_a_command_leaving_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt, match="enough"):
        terminal.leave("enough")
