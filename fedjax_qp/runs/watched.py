"""What users are told where a metric that a method wants watched goes too far."""

import math
from collections.abc import Iterable

from fedjax_qp.runs import record_numbers
from fedjax_qp.watch import Watch


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
