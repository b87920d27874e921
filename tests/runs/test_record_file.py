"""The file of records: whole after a kill, the same bytes for the same records, and damage is named."""

import errno
import os
from pathlib import Path

import pytest

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import record_file
from fedjax_qp.runs.record_file import Recorder


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "records.jsonl"


def made_records(first: int, last: int) -> list[dict]:
    return [{"round": n, "train_loss": 1 / n, "mutation/cosine_after": [1.0, None]} for n in range(first, last + 1)]


def rounds(path: Path) -> list[int]:
    return [record["round"] for record in record_file.read(path)]


def test_written_records_are_read_back(path):
    with Recorder(path) as recorder:
        assert record_file.read(path) == []
        recorder.write(made_records(1, 3))
        assert record_file.read(path) == made_records(1, 3)  # on the disk before the file is closed
        recorder.write([])
        recorder.write(made_records(4, 5))
    recorder.close()  # again: harmless
    assert record_file.read(path) == made_records(1, 5)


@pytest.mark.parametrize("torn", ['{"round": 6, "train_lo', '{"round": 6, "name": "é'.encode()[:-1], "6", b"\xff"])
def test_torn_last_line_is_left_out(path, torn):
    with Recorder(path) as recorder:
        recorder.write(made_records(1, 5))
    with path.open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    assert rounds(path) == [1, 2, 3, 4, 5]
    with Recorder(path, resume_round=5) as recorder:
        recorder.write(made_records(6, 6))
    assert rounds(path) == [1, 2, 3, 4, 5, 6]


def test_resume_drops_what_the_checkpoint_does_not_hold(path):
    with Recorder(path) as recorder:
        recorder.write(made_records(1, 8))
    whole = path.read_bytes()
    with Recorder(path, resume_round=5) as recorder:
        assert rounds(path) == [1, 2, 3, 4, 5]
        recorder.write(made_records(6, 8))
    assert path.read_bytes() == whole
    with Recorder(path):  # no checkpoint: from the beginning
        assert rounds(path) == []
    assert list(path.parent.iterdir()) == [path]


def test_damage_before_the_last_line_is_an_error(path):
    path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(ConfigurationError, match="line 2"):
        record_file.read(path)


def test_not_a_run_folder(path):
    with pytest.raises(ConfigurationError, match=r"no records\.jsonl"):
        record_file.read(path)
    with pytest.raises(ConfigurationError, match="no such folder"):
        record_file.read(path.parent / "absent" / path.name)


@pytest.mark.parametrize(
    ("found", "finished", "said"),
    [
        ([1, 2, 3], 3, None),
        ([], 0, None),
        ([1, 2, 3], None, None),
        ([], 3, "rounds 1 to 3 of 3 missing"),
        ([1, 2], 4, "rounds 3 to 4 of 4 missing"),
        ([1, 3, 4, 6], None, "round 2 and 1 more of 6 missing"),
        ([1, 2, 2, 3], 3, "round 2 stands there 2 times"),
        ([1, 3, 2], 3, "the rounds stand in another order"),
    ],
)
def test_gaps_are_named(found, finished, said):
    assert record_file.gap([{"round": round} for round in found], finished) == said


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[1]",
        '{"train_loss": 1}',
        '{"round": null}',
        '{"round": "2"}',
        '{"round": true}',
        '{"round": 0}',
        '{"round": 2.0}',
        '{"round": 2, "round": 3}',
        '{"round": 2, "train_loss": NaN}',
        '{"round": 2, "test_accuracy": "high"}',
        '{"round": 2, "test_accuracy": [1]}',
        '{"round": 2, "client_accuracy": "high"}',
        '{"round": 2, "personal": 5}',
        '{"round": 2, "x": ' + "[" * 100_000,
    ],
)
def test_what_is_no_record_is_refused_with_its_line(path, line):
    for place, text in ((2, f'{{"round": 1}}\n{line}\n{{"round": 3}}\n'), (2, f'{{"round": 1}}\n{line}\n')):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=f"line {place} is not a record") as error:
            record_file.read(path)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_full_disk_is_one_line(path, monkeypatch):
    with Recorder(path) as recorder:
        recorder.write(made_records(1, 1))

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(record_file.os, "fsync", full)
        with pytest.raises(ConfigurationError, match="No space left on device.*free some space"):
            recorder.write(made_records(2, 2))
        monkeypatch.undo()
