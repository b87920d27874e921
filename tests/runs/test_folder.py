"""A run's folder: its files keep their names, and what they say must agree."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedjax_qp
from fedjax_qp import config
from fedjax_qp.files import JsonFile
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.times import Time, Times
from fedjax_qp.watch import Watch

# One chunk of one round, so a run may be two rounds ahead of its first checkpoint.
RUN = config.from_dict(
    {
        "name": "mine",
        "rounds": 8,
        "data": "digits",
        "partition": "iid",
        "model": "mlp",
        "algorithm": "fedavg",
        "engine": {"rounds_per_chunk": 1},
    }
)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "mine-seed0")


def begin(folder: RunFolder, rounds: int, saved: list[int]) -> None:
    """A run with records of so many rounds, and something in the place of its checkpoints."""
    folder.make()
    folder.save_config(RUN)
    with folder.recorder() as recorder:
        recorder.write([{"round": round} for round in range(1, rounds + 1)])
    for round in saved:
        (folder.checkpoints_folder / str(round)).mkdir(parents=True)


def test_files_keep_their_names(folder):
    """Folders of earlier versions must load."""
    names = {
        name: (value.path if isinstance(value, JsonFile | Times) else value).name
        for name, value in vars(folder).items()
        if isinstance(value, JsonFile | Times | Path) and name != "path"
    }
    assert names == {
        "config_file": "config.yaml",
        "partition_figure": "partition.png",
        "environment": "environment.json",
        "provenance": "provenance.json",
        "watched": "watched.json",
        "layout": "layout.json",
        "plugins": "plugins",
        "records_file": "records.jsonl",
        "times": "times.jsonl",
        "startup": "startup.json",
        "trackers": "tracking.json",
        "tensorboard": "tensorboard",
        "checkpoints_folder": "checkpoints",
        "failure": "failure.json",
        "end": "ended.json",
        "figure": "run.png",
        "report": "report.html",
        "inspections": "inspect",
        "adapters": "adapters",
    }
    assert not folder.path.exists()  # a name alone makes nothing


def test_nothing_else_knows_the_names():
    package = Path(fedjax_qp.__file__).parent
    names = re.findall(r'"(\w+\.(?:json|jsonl|yaml|png|lock))"', inspect.getsource(RunFolder))
    assert {"config.yaml", "records.jsonl", "run.png", "run.lock"} <= set(names)
    spelled = {
        (file.relative_to(package).as_posix(), name)
        for file in package.rglob("*.py")
        for name in names
        if re.search(rf"""["'/]{re.escape(name)}["']""", file.read_text(encoding="utf-8"))
    }
    assert {file for file, _ in spelled} == {"runs/folder.py"}


def test_reading_a_run_loads_neither_jax_nor_the_machinery(folder):
    begin(folder, 3, [2])
    script = f"""
import sys
from fedjax_qp.reports import compare, plots
from fedjax_qp.runs.folder import RunFolder
folder = RunFolder({str(folder)!r})
print(folder.config().name, len(folder.records()), folder.saved_rounds(), folder.restorable(), folder.ended())
(run,) = compare.load_runs([folder.path])
print([name for name in ("jax", "orbax", "fedjax_qp.engine", "fedjax_qp.runs.loop") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.splitlines() == ["mine 3 [2] [2] None", "[]"]


def test_the_configuration_marks_a_run(folder):
    folder.make()
    assert not folder.holds_run()
    for read in (folder.config, folder.raw_config):
        with pytest.raises(ConfigurationError, match=r"mine-seed0 holds no run \(no config\.yaml\): give the folder"):
            read()
    folder.save_config(RUN)
    assert folder.holds_run() and folder.config() == RUN
    assert folder.config(["rounds=9"]).rounds == 9
    assert folder.raw_config()["algorithm"] == {"name": "fedavg"}
    folder.config_file.write_text("name: old\nalgorithm: gone\nforgotten: 1\n")
    assert folder.raw_config() == {"name": "old", "algorithm": {"name": "gone"}, "forgotten": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: 3", "it has no name"),
        ("- name", "it has no name"),
        ("name: 3", "it has name = 3"),
        ("{name: a, seed: true}", "it has seed = True"),
        ("{name: a, model: {hidden: 3}}", "it has model = "),
        ("{name: a, other: {1: 2}}", "it has keys that are no text"),
    ],
)
def test_what_is_no_configuration_is_refused(folder, text, message):
    folder.make()
    folder.config_file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        folder.raw_config()


def test_records_are_none_before_the_first(folder):
    with pytest.raises(ConfigurationError, match="no such folder"):
        folder.records()
    folder.make()
    with pytest.raises(ConfigurationError, match=r"no records\.jsonl"):
        folder.records()
    assert folder.records(missing_ok=True) == [] and not folder.has_records()
    with folder.recorder() as recorder:
        recorder.write([{"round": 1}, {"round": 2}])
    with folder.recorder(1) as recorder:
        recorder.write([{"round": 2, "train_loss": 0.5}])
    assert folder.records() == [{"round": 1}, {"round": 2, "train_loss": 0.5}]


def test_runs_are_found_at_any_depth(tmp_path):
    for name in ("b/inner", "a", "a/inner"):
        begin(RunFolder(tmp_path / name), 1, [])
    assert [run.path.relative_to(tmp_path).as_posix() for run in RunFolder.within(tmp_path)] == [
        "a/inner",
        "a",
        "b/inner",
    ]
    assert [run.path for run in RunFolder.within(tmp_path / "a")] == [tmp_path / "a"]
    assert list(RunFolder.within(tmp_path / "absent")) == []


def test_records_reach_at_least_as_far_as_the_newest_checkpoint(folder):
    begin(folder, 1, [2, 10, 4])
    (folder.checkpoints_folder / "12.partial").mkdir()
    assert folder.saved_rounds() == [2, 4, 10]
    assert folder.missing_records([{"round": 1}]) == "rounds 2 to 10 of 10 missing"
    assert folder.missing_records([{"round": round} for round in range(1, 12)]) is None


@pytest.mark.parametrize(
    ("rounds", "saved", "expected"), [(0, [], []), (2, [], []), (5, [2, 4], [4, 2]), (3, [2, 4], [2])]
)
def test_a_run_goes_on_from_checkpoints_that_its_records_reach(folder, rounds, saved, expected):
    begin(folder, rounds, saved)
    assert folder.restorable() == expected


def test_a_run_that_lost_its_past_goes_nowhere(folder):
    begin(folder, 1, [2])
    with pytest.raises(ConfigurationError, match=r"records\.jsonl is not complete \(round 2 of 2 missing\): restore"):
        folder.restorable()
    begin(folder, 3, [])
    (folder.checkpoints_folder / "2").rmdir()
    with pytest.raises(ConfigurationError, match="has records of 3 rounds, but no checkpoint: restore"):
        folder.restorable()


def test_the_end_counts_with_its_checkpoint(folder):
    begin(folder, 4, [2])
    assert folder.ended() is None and not folder.diverged()
    folder.mark_end("finished", 4)
    assert folder.ended() is None  # a kill came between the mark and the checkpoint
    (folder.checkpoints_folder / "4").mkdir()
    assert folder.ended() == ("finished", 4)
    folder.mark_end("diverged", 3)
    folder.mark_failure("loss is inf in round 4")
    assert folder.ended() == ("diverged", 3) and folder.diverged()
    assert folder.failure.read() == {"reason": "non-finite loss", "message": "loss is inf in round 4"}
    folder.clear_marks()
    folder.clear_marks()  # again: harmless
    assert folder.ended() is None and not folder.diverged()
    folder.end.write({"reason": "finished", "round": True})
    assert folder.ended() is None


def test_one_process_at_a_time(folder):
    folder.make()
    (folder.path / "ended.json.ab12.partial").write_text("")
    with folder.lock():
        assert [path.name for path in folder.path.iterdir()] == ["run.lock"]
        with pytest.raises(ConfigurationError, match="another process continues the run in .*mine-seed0"):
            folder.lock()
    folder.lock().close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="run folder .* cannot be written .*: choose another one with folder="):
        RunFolder(tmp_path / "file" / "run").make()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"program": {"id": "a", "runs": 3, "place": 2}}', ("a", 3, 2)),
        ('{"program": {"id": "a", "runs": "3", "place": 2}}', None),
        ('{"program": {"id": "a", "runs": 0, "place": 0}}', None),
        ('{"program": {"id": "a"}}', None),
        ("{}", None),
        ("{", None),
    ],
)
def test_the_program_of_a_run_is_read_or_there_is_none(folder, content, expected):
    folder.make()
    assert folder.program() is None
    folder.layout.path.write_text(content)
    found = folder.program()
    assert (found and (found.id, found.runs, found.place)) == expected


def test_what_is_watched_is_kept(folder):
    folder.make()
    assert folder.watches() == ()
    watches = (Watch("mutation/drift", "drift", 1.0, "less alpha"), Watch("train_loss"))
    folder.save_watches(watches)
    assert folder.watches() == watches
    for damaged in ('{"watched": 3}', '{"watched": [{"limit": 1}]}', "{"):
        folder.watched.path.write_text(damaged)
        assert folder.watches() == ()


def test_times_are_read_back(folder):
    folder.make()
    assert folder.times.read() == ([], None)
    times = [Time(2, 2, 9.5, True), Time(4, 2, 1.25, False)]
    for time in times:
        folder.times.append(time)
    assert json.loads(folder.times.path.read_text().splitlines()[0]) == times[0]._asdict()
    assert folder.times.read() == (times, None)
    with folder.times.path.open("a") as file:
        file.write('{"round": 6, "rou')  # a kill tore it
    assert folder.times.read() == (times, None)
    with folder.times.path.open("a") as file:
        file.write('\n{"round": 6, "rounds": 0, "seconds": 1, "first": true}\n')
    assert folder.times.read() == (times, f"Times are incomplete: 2 lines of {folder.times.path} are damaged.")
