"""Small files are whole or absent, and damage to one is read as its absence."""

import errno
import os

import pytest

from fedjax_qp import files
from fedjax_qp.files import read_mark, remove_partial, write_json, write_whole
from fedjax_qp.registry import ConfigurationError


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "mark.json", {"reason": "finished", "round": 4})
    assert read_mark(tmp_path / "mark.json") == {"reason": "finished", "round": 4}
    write_whole(tmp_path / "mark.json", b"{}")
    assert read_mark(tmp_path / "mark.json") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["mark.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_damaged_mark_counts_as_none(tmp_path, content):
    (tmp_path / "mark.json").write_bytes(content)
    assert read_mark(tmp_path / "mark.json") is None
    assert read_mark(tmp_path / "absent.json") is None


def test_a_write_that_fails_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    write_whole(tmp_path / "mark.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        ConfigurationError, match=r"mark\.json cannot be written \(No space left on device\): free some space"
    ):
        write_whole(tmp_path / "mark.json", "new")
    assert (tmp_path / "mark.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["mark.json"]


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    for name in ("ended.json.ab12.partial", "ended.json"):
        (tmp_path / name).write_text("")
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]
