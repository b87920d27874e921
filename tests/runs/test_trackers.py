"""Trackers hold what the records hold, continue the same run, never stop a run, and send nothing anywhere by default."""

import importlib.util
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console
from support.records import made_records
from support.runs import write
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from fedjax_qp import config
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import trackers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.programs import groups
from fedjax_qp.runs.run import resume, run
from fedjax_qp.runs.trackers import Trackers, check_trackers


def fails(sentence: str) -> None:
    pytest.fail(sentence)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(path: Path) -> list[Event]:
    """Events of a TensorBoard file: length (8 bytes), checksum (4), event, checksum (4), and so on."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def board(folder: Path) -> list[tuple[list[int], list[tuple[int, str, float]]]]:
    """Of each event file, in order: the steps it purges from, and its scalars."""
    files = sorted(RunFolder(folder).tensorboard.iterdir(), key=lambda path: path.name.rsplit("after", 1)[1])
    found = []
    for all_events in map(events, files):
        scalars = [(e.step, value.tag, value.simple_value) for e in all_events for value in e.summary.value]
        found.append(([e.step for e in all_events if e.HasField("session_log")], scalars))
    return found


def test_tensorboard_holds_the_scalars_and_purges_on_resume(tmp_path):
    loaded = config.load(write(tmp_path))
    for history, more in (([], made_records(1, 2)), (made_records(1, 1), made_records(2, 2))):
        opened = Trackers(loaded, tmp_path, history, fails)  # twice within a second: another file all the same
        opened.write(more)
        opened.close("finished")
    first, second = board(tmp_path)
    one = [(1, "train_loss", 1.0), (1, "client_accuracy/q10", 0.5)]
    two = [(2, "train_loss", 0.5), (2, "client_accuracy/q10", 0.5)]
    assert first == ([1], one + two) or first == ([], one + two)
    assert second == ([2], two)


def test_tensorboard_that_is_turned_on_later_gets_the_past(tmp_path):
    off = config.load(write(tmp_path), ["tracking.tensorboard=false"])
    Trackers(off, tmp_path, [], fails).write(made_records(1, 2))
    assert not RunFolder(tmp_path).tensorboard.exists()
    opened = Trackers(config.load(write(tmp_path)), tmp_path, made_records(1, 2), fails)
    opened.write(made_records(3, 3))
    opened.close("finished")
    ((_, scalars),) = board(tmp_path)
    assert [step for step, name, _ in scalars if name == "train_loss"] == [1, 2, 3]


def test_tensorboard_gets_what_it_missed_while_it_was_off(tmp_path):
    on, off = (config.load(write(tmp_path), [f"tracking.tensorboard={flag}"]) for flag in ("true", "false"))
    for loaded, done in ((on, 1), (off, 2), (on, 3)):
        opened = Trackers(loaded, tmp_path, made_records(1, done - 1), fails)
        opened.write(made_records(done, done))
        opened.close("finished")
    first, second = board(tmp_path)
    steps = [step for _, scalars in (first, second) for step, name, _ in scalars if name == "train_loss"]
    assert steps == [1, 2, 3]


# --- Weights & Biases and MLflow, as they are -------------------------------------------------------------------------

# A run of three rounds is killed one round after its checkpoint, resumed, and ends with round five. Python's part of any use
# of the network shows in the audit events, that of the programs it starts at the proxy.
INTERRUPTED = """
import json, socket, sys
from pathlib import Path

attempts = []
def watch(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and not isinstance(arguments[1], str):
        attempts.append(str(arguments[1:] if event == "socket.connect" else arguments))
sys.addaudithook(watch)

from fedjax_qp import config
from fedjax_qp.runs.trackers import Trackers
from support.records import made_records

folder, problems = Path(sys.argv[1]), []
loaded = config.load(folder.parent / "small.yaml", ["tracking.wandb={}", "tracking.mlflow={}"])
for history, more, reason in (
    ([], made_records(1, 3), "interrupted"),
    (made_records(1, 2), made_records(3, 5), "finished"),
):
    opened = Trackers(loaded, folder, history, problems.append)
    opened.write(more)
    opened.close(reason)
print(json.dumps({"attempts": attempts, "problems": problems}))
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, dict]:
    """The run folder, and what the process said; a proxy that nobody may ask stands in for the network."""
    if not all(map(importlib.util.find_spec, ("wandb", "mlflow"))):
        pytest.skip("needs `pip install -e '.[trackers]'`")
    folder = tmp_path_factory.mktemp("runs") / "tracked-seed0"
    folder.mkdir()
    write(folder.parent)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), address)
        paths = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "CI"))}
        command = [sys.executable, "-c", INTERRUPTED, str(folder)]
        environment = {**kept, **proxies, "PYTHONPATH": paths, "WANDB_CONFIG_DIR": str(folder.parent)}
        process = subprocess.run(
            command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody came
            proxy.accept()
    return folder, json.loads(process.stdout.splitlines()[-1])


def test_nothing_uses_the_network_and_nothing_fails(interrupted):
    assert interrupted[1] == {"attempts": [], "problems": []}


def test_mlflow_holds_every_round_once_in_one_run(interrupted):
    folder, _ = interrupted
    with closing(sqlite3.connect(folder.parent / "mlflow.db")) as database:
        ((id, name, status),) = database.execute("SELECT run_uuid, name, status FROM runs").fetchall()
        assert (name, status) == ("tracked-seed0", "FINISHED")
        assert id == RunFolder(folder).trackers.read()["mlflow"]["id"]
        losses = database.execute("SELECT step, value FROM metrics WHERE key = 'train_loss' ORDER BY step").fetchall()
        assert losses == [(n, pytest.approx(1 / n)) for n in range(1, 6)]
        assert {key for (key,) in database.execute("SELECT key FROM metrics")} == {"train_loss", "client_accuracy/q10"}
        params = dict(database.execute("SELECT key, value FROM params").fetchall())
        assert params["algorithm.form"] == "nearest" and params["local.momentum"] == "0.9"
        assert database.execute("SELECT name FROM experiments WHERE name = 'fedjax_qp'").fetchall()
        assert ("ended", "finished") in database.execute("SELECT key, value FROM tags").fetchall()


def wandb_records(path: Path) -> list:
    """The messages of a .wandb file: blocks of 32 KiB of (checksum 4, length 2, kind 1, data), after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, found, pieces = path.read_bytes(), 7, [], b""
    while place + 7 < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(pieces))  # pyright: ignore[reportAttributeAccessIssue]
            pieces = b""
    return found


def test_wandb_holds_every_round_once_in_one_run(interrupted):
    folder, _ = interrupted
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2  # one a process
    ids, losses, projects = set(), [], set()
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                projects.add((record.run.project, record.run.display_name, record.run.run_group))
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                losses.append((int(row["_step"]), float(row["train_loss"])))
    assert ids == {RunFolder(folder).trackers.read()["wandb"]["id"]}
    assert projects == {("fedjax_qp", "tracked-seed0", config.load(folder.parent / "small.yaml").name)}
    assert losses == [(n, pytest.approx(1 / n)) for n in range(1, 6)]


# A server that takes connections and never answers, one that is not there; then a run resumed with other settings.
SILENT_SERVERS = """
import json, socket, sys, time
from pathlib import Path

from fedjax_qp import config
from fedjax_qp.runs.trackers import Trackers
from support.records import made_records

folder, found = Path(sys.argv[1]), {}
file = folder.parent / "small.yaml"
import mlflow

with socket.create_server(("127.0.0.1", 0)) as silent:
    for name, port in (("silent", silent.getsockname()[1]), ("absent", 9)):
        said, began = [], time.monotonic()
        loaded = config.load(file, ["tracking.tensorboard=false", f"tracking.mlflow.uri=http://127.0.0.1:{port}"])
        opened = Trackers(loaded, folder, [], said.append)
        for round in (1, 2):
            opened.write(made_records(round, round))
        opened.close("finished")
        found[name] = [time.monotonic() - began, said]
for overrides, history in (([], []), (["rounds=9", "evaluation.every=2"], made_records(1, 2))):
    loaded = config.load(file, ["tracking.tensorboard=false", "tracking.mlflow={}", *overrides])
    Trackers(loaded, folder, history, print).close("finished")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory) -> tuple[Path, dict]:
    if not importlib.util.find_spec("mlflow"):
        pytest.skip("needs `pip install -e '.[trackers]'`")
    folder = tmp_path_factory.mktemp("runs") / "tracked-seed0"
    folder.mkdir()
    write(folder.parent)
    paths = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    process = subprocess.run(
        [sys.executable, "-c", SILENT_SERVERS, str(folder)],
        env={**kept, "PYTHONPATH": paths},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return folder, json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "most"), [("absent", 5), ("silent", 20)])
def test_a_server_that_does_not_answer_costs_seconds_once(unanswered, name, most):
    seconds, said = unanswered[1][name]
    assert len(said) == 1 and "tracking.mlflow failed and is left out" in said[0]
    assert seconds < most


def test_a_resumed_mlflow_run_shows_what_changed(unanswered):
    with closing(sqlite3.connect(unanswered[0].parent / "mlflow.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM runs").fetchall() == [(1,)]
        tags = dict(database.execute("SELECT key, value FROM tags").fetchall())
        params = dict(database.execute("SELECT key, value FROM params").fetchall())
    assert (params["rounds"], tags["rounds"]) == ("4", "9")
    assert (params["evaluation.every"], tags["evaluation.every"]) == ("1", "2")
    assert "local.momentum" not in tags


# --- failures, with a tracker that fails as told ----------------------------------------------------------------------


class Made:
    """A tracker in memory; raises when it gets round `breaks_at`."""

    breaks_at: int | None = None
    opened: ClassVar[list[str | None]] = []
    rounds: ClassVar[list[int]] = []
    ends: ClassVar[list[str | None]] = []

    def __init__(self, config, folder, id):
        self.id = id or "made"
        Made.opened.append(id)

    def log(self, lines):
        for line in lines:
            if line["round"] == Made.breaks_at:
                raise ConnectionError("no [server] there")
            Made.rounds.append(line["round"])

    def close(self, reason):
        Made.ends.append(reason)


@pytest.fixture
def made(monkeypatch):
    for name, value in {"breaks_at": None, "opened": [], "rounds": [], "ends": []}.items():
        monkeypatch.setattr(Made, name, value)
    monkeypatch.setattr(trackers, "WandbTracker", Made)
    monkeypatch.setattr("fedjax_qp.runs.run.check_trackers", lambda config: None)
    return Made


def test_a_tracker_that_fails_is_reported_once_and_caught_up_on_resume(tmp_path, made):
    written = io.StringIO()
    output = Console(file=written, width=400)
    made.breaks_at = 3
    outcome = run(config.load(write(tmp_path), ["tracking.wandb={}"]), output)
    said = written.getvalue()
    assert outcome.reason == "finished"
    assert [line["round"] for line in RunFolder(outcome.folder).records()] == [1, 2, 3, 4]
    assert said.count("tracking.wandb failed") == 1 and "no [server] there" in said and "resume" in said
    assert (made.rounds, made.ends) == ([1, 2], [])
    ((_, scalars),) = board(outcome.folder)  # the others did not notice
    assert {step for step, _, _ in scalars} == {1, 2, 3, 4}
    made.breaks_at = None
    resume(outcome.folder, [], Console(quiet=True))
    assert (made.opened, made.rounds, made.ends) == ([None, "made"], [1, 2, 3, 4], ["finished"])
    resume(outcome.folder, ["tracking.wandb.project=other"], Console(quiet=True))  # ids mean nothing elsewhere
    assert made.opened[-1] is None and made.rounds[4:] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, made, monkeypatch):
    def refuse(*_):
        raise OSError("no login")

    monkeypatch.setattr(trackers, "WandbTracker", refuse)
    said = []
    opened = Trackers(config.load(write(tmp_path), ["tracking.wandb={}"]), tmp_path, [], said.append)
    opened.write(made_records(1, 2))
    opened.close("finished")
    assert len(said) == 1 and "OSError: no login" in said[0]
    assert RunFolder(tmp_path).trackers.read().keys() == {"tensorboard"}


def test_a_slow_failure_is_paid_for_once_by_all_runs_of_a_process(tmp_path, monkeypatch):
    asked, clock = [], [0.0]

    def wait_in_vain(*_):
        asked.append(clock[0])
        clock[0] += 10
        raise TimeoutError("no answer")

    monkeypatch.setattr(trackers, "WandbTracker", wait_in_vain)
    monkeypatch.setattr(trackers, "_spared_until", {})
    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock[0])
    loaded, elsewhere = (
        config.load(write(tmp_path), ["tracking.tensorboard=false", f"tracking.wandb.project={name}"]) for name in "ab"
    )
    for where, later, number in ((loaded, 0, 1), (loaded, 0, 1), (elsewhere, 0, 2), (loaded, 80, 3)):
        clock[0] += later
        said = []
        Trackers(where, tmp_path, [], said.append)
        assert len(asked) == number and len(said) == 1 and "tracking.wandb failed and is left out" in said[0]


def test_only_what_names_a_tracked_run_waits_for_the_disk(tmp_path, made, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    loaded = config.load(write(tmp_path), ["tracking.wandb={}", "tracking.tensorboard=false"])
    opened = Trackers(loaded, tmp_path, [], fails)
    before = len(synced)
    opened.write(made_records(1, 2))
    assert before > 0 and len(synced) == before
    assert RunFolder(tmp_path).trackers.read()["wandb"]["rounds"] == 2


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_refused_before_the_run(tmp_path, monkeypatch):
    loaded = config.load(write(tmp_path), ["tracking.mlflow={}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigurationError, match=r"tracking\.mlflow needs.*pip install -e '.\[trackers\]'.*tracking\.mlflow=null"
    ):
        run(loaded, Console(quiet=True))
    assert not loaded.run_folder.exists()
    check_trackers(config.load(write(tmp_path)))


def test_settings_of_trackers(tmp_path):
    loaded = config.load(write(tmp_path), ["tracking.wandb.project=mine", "tracking.mlflow={}"])
    assert loaded.tracking.wandb == config.Wandb(project="mine", mode="offline")
    assert loaded.tracking.mlflow == config.Mlflow()
    config.save(loaded, tmp_path / "saved.yaml")
    assert config.load(tmp_path / "saved.yaml") == loaded
    off = config.load(tmp_path / "saved.yaml", ["tracking.wandb=null"])
    assert off.tracking.wandb is None
    assert config.load(write(tmp_path / "."), []).tracking == config.Tracking()
    with pytest.raises(ConfigurationError, match="did you mean tracking.wandb.project"):
        config.load(write(tmp_path), ["tracking.wandb.projct=mine"])
    with pytest.raises(ConfigurationError, match="tracking.wandb.mode = 'on'"):
        config.load(write(tmp_path), ["tracking.wandb.mode='on'"])


def test_runs_share_a_program_whatever_tracks_them(tmp_path):
    configs = [
        config.load(write(tmp_path), [f"seed={seed}", f"tracking.{which}={{}}"])
        for seed, which in enumerate(("wandb", "mlflow"))
    ]
    assert groups(configs) == [[0, 1]]
