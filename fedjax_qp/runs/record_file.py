"""The file of a run's records: one plain-JSON line per round, appended while it runs, every line checked when it is read."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedjax_qp.files import write_whole, writing
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.record_numbers import VIEWS
from fedjax_qp.settings.strict import load_json
from fedjax_qp.settings.values import shown

_TEST_NUMBERS = ("test_loss", "test_accuracy")


class Recorder:
    """Appends records to a file.

    A chunk's records are on the disk when `write` returns, so a checkpoint that is saved afterwards never runs ahead of
    them. What a killed run wrote beyond its last checkpoint is dropped on resuming.
    """

    def __init__(self, path: Path, *, resume_round: int | None = None):
        """Opens the file; a context manager closes it.

        Args:
          path: the file, in a folder that exists.
          resume_round: rounds that the checkpoint has finished. Records up to it are kept, all later ones are dropped;
            None starts afresh, which drops every earlier record.

        Raises:
          ConfigurationError: the file cannot be written, or a line before the last is damaged.
        """
        kept = resume_round or 0
        self._path = path
        lines = _parsed(self._path) if kept and self._path.exists() else []
        write_whole(self._path, "".join(_line(record) for record in lines if record["round"] <= kept))
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, records: list[dict]) -> None:
        """Appends the records of one chunk and waits until the disk has them.

        Raises:
          ConfigurationError: the disk is full.
        """
        with writing(self._path):
            self._file.write("".join(_line(record) for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        with contextlib.suppress(OSError):  # what a full disk did not take has been reported
            self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[dict]:
    """Reads the records of a run; a last line that was cut off when the run was killed is left out.

    Raises:
      ConfigurationError: the folder or the file is missing, or a line is damaged.
    """
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path.parent} is not a run folder: there is no such folder.")
    if not path.is_file():
        raise ConfigurationError(
            f"{path.parent} is not a run folder: it has no {path.name}. Give the folder of one run."
        )
    return _parsed(path)


def gap(records: Sequence[dict], finished: int | None = None) -> str | None:
    """Says where records are not one for each of the rounds 1 … `finished`, in order; None where they are.

    Args:
      finished: rounds that must be there; default up to the largest that is.
    """
    rounds = [record["round"] for record in records]
    finished = max(rounds, default=0) if finished is None else finished
    if rounds == list(range(1, finished + 1)):
        return None
    missing = sorted(set(range(1, finished + 1)) - set(rounds))
    if missing:
        return f"{_named_rounds(missing)} of {finished} missing"
    again = next((round for round, count in Counter(rounds).items() if count > 1), None)
    if again is not None:
        return f"round {again} stands there {rounds.count(again)} times"
    return "the rounds stand in another order"


def _named_rounds(rounds: list[int]) -> str:
    """The first stretch of some rounds, and how many there are besides."""
    last = next((round for place, round in enumerate(rounds) if round - rounds[0] != place), None)
    stretch = rounds if last is None else rounds[: rounds.index(last)]
    name = f"round {stretch[0]}" if len(stretch) == 1 else f"rounds {stretch[0]} to {stretch[-1]}"
    more = len(rounds) - len(stretch)
    return name + (f" and {more} more" if more else "")


def _parsed(path: Path) -> list[dict]:
    """The records in a file. Bytes are split before decoding: a torn line may end inside a character."""
    *lines, torn = path.read_bytes().split(b"\n")
    records = [_checked(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    with contextlib.suppress(ConfigurationError):  # a kill left it so
        records.append(_checked(torn, str(path)))
    return records


def _checked(line: bytes, where: str) -> dict:
    """One record; `where` it stands, for the message."""
    try:
        record, problem = load_json(line, where), None
    except ConfigurationError:
        record, problem = {}, "not plain JSON"
    problem = problem or _problem(record)
    if problem is not None:
        raise ConfigurationError(f"{where} is not a record ({problem}): restore the file or remove the line.")
    return record


def _problem(record: Any) -> str | None:
    """What keeps a JSON value from being a record."""
    if not isinstance(record, dict) or "round" not in record:
        return "not a mapping with a round"
    round = record["round"]
    if type(round) is not int or round < 1:
        return f"round = {shown(round)} is not a whole number from 1"
    for name, value in record.items():
        whole, grouped = name in ("train_loss", *_TEST_NUMBERS), name in ("client_accuracy", *VIEWS)
        fits = isinstance(value, dict) if grouped else not (whole and isinstance(value, dict | list))
        if not fits or not _numeric(value):
            return f"{shown(name)} is {'not a mapping' if grouped else 'not a number'}"
    return None


def _numeric(value: Any) -> bool:
    """Whether a value consists of numbers and nulls."""
    if isinstance(value, dict | list):
        return all(map(_numeric, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (int, float)


def _line(record: dict) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
