"""How long a run's chunks took, apart from its records, which are the same bytes whenever they are computed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_qp.files import writing
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings import strict

_KINDS = {"round": (int,), "rounds": (int,), "seconds": (int, float), "first": (bool,)}


class Time(NamedTuple):
    """The time of one chunk."""

    round: int  # its last one
    rounds: int  # how many it had
    seconds: float  # since the previous chunk, or the start
    first: bool  # of a process: compilation is in it


class Times(NamedTuple):
    """The file of them, a JSON line each."""

    path: Path

    def append(self, time: Time) -> None:
        """Adds a line.

        Raises:
          ConfigurationError: the disk is full.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(time._asdict()) + "\n")

    def read(self) -> tuple[list[Time], str | None]:
        """All of them, of a chunk that was computed again after a kill both, and a sentence where lines are damaged."""
        try:
            *lines, torn = strict.read_text(self.path).split("\n") if self.path.is_file() else [""]
        except ConfigurationError as error:
            return [], f"Times are left out: {error}"
        found = [self._time(line) for line in lines if line]
        times = [time for time in [*found, self._time(torn)] if time is not None]  # a kill may have torn the last one
        lost = found.count(None)
        return times, f"Times are incomplete: {lost} lines of {self.path} are damaged." if lost else None

    def _time(self, line: str) -> Time | None:
        try:
            found: Any = strict.load_json(line, self.path.name)
        except ConfigurationError:
            return None
        if not isinstance(found, dict) or any(type(found.get(name)) not in kinds for name, kinds in _KINDS.items()):
            return None
        return Time(**{name: found[name] for name in _KINDS}) if found["rounds"] > 0 else None
