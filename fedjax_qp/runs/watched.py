"""What is watched of a run: kept in its folder, since a report does not build the method, and said when it goes too far."""

import math
from collections.abc import Iterable
from pathlib import Path

import pydantic

from fedjax_qp.files import read_mark, write_json
from fedjax_qp.runs import record_numbers
from fedjax_qp.watch import Watch

FILE = "watched.json"
_WATCHES = pydantic.TypeAdapter(tuple[Watch, ...])


def write(folder: Path, watches: Iterable[Watch]) -> None:
    """Leaves them in a run's folder."""
    write_json(folder / FILE, {"watched": [watch._asdict() for watch in watches]})


def read(folder: Path) -> tuple[Watch, ...]:
    """Those of a run's folder; none where an earlier version wrote it, or the file is damaged."""
    found = read_mark(folder / FILE) or {}
    try:
        return _WATCHES.validate_python(found.get("watched", ()))
    except pydantic.ValidationError:
        return ()


def warning(watch: Watch, records: Iterable[dict]) -> str | None:
    """A watch's advice, filled in, where a finite value of these records reaches its limit."""
    values = [(record_numbers.value(record, watch.metric), record["round"]) for record in records]
    limit = math.inf if watch.limit is None else watch.limit
    reached = [(value, round) for value, round in values if value is not None and limit <= value < math.inf]
    if not reached:
        return None
    value, round = max(reached)
    known = {"{value}": f"{value:.3g}", "{round}": str(round), "{rounds}": str(len(reached))}
    said = watch.advice  # not formatted: a folder may come from anybody
    for name, text in known.items():
        said = said.replace(name, text)
    return said or None
