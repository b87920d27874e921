"""The numbers of records by their names, and what they say of a run. What a record holds is told in `records`."""

import math
from collections.abc import Iterable

VIEWS = ("personal", "tuned")


def value(record: dict, name: str) -> float | None:
    """A number of a record by its name, an inner one as "personal/perplexity/mean".

    Returns:
      NaN where what was measured is not finite, which a record holds as null; None where nothing was measured.
    """
    outer, _, inner = name.partition("/")
    if name in record:
        found = record[name]
    elif inner and isinstance(record.get(outer), dict):
        found = {outer: record[outer]}
        for part in name.split("/"):
            if not isinstance(found, dict) or part not in found:
                return None
            found = found[part]
    else:
        return None
    if found is None and _was_measured(record, name):
        return float("nan")
    return float(found) if isinstance(found, int | float) else None


def _was_measured(record: dict, name: str) -> bool:
    """Whether a null stands for a number that is not finite."""
    outer, inner = name.partition("/")[::2]
    if outer in VIEWS:  # no client with tests may have taken part, or all of them: then there is no accuracy either
        finite = record[outer].get("accuracy")
        group = "unseen" if inner.endswith("/unseen") else "mean"
        there = finite.get(group) is not None if isinstance(finite, dict) else group == "mean"
        return there and "nonfinite" in record[outer]
    if name == "train_loss" or outer == "client":
        return record.get("reporting", 1) > 0
    return outer != "client_accuracy" and (outer != "test_loss" or record.get("test_accuracy") is not None)


def scalars(record: dict) -> list[tuple[str, float]]:
    """The numbers of a record, those of nested dicts as "outer/inner"; lists and nulls are left out."""
    found = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", number) for inner, number in scalars(value)]
        elif isinstance(value, int | float) and name != "round":
            found.append((name, float(value)))
    return found


def headline(record: dict) -> tuple[str, float | None] | None:
    """The number that a record is judged by, with its name; None before an evaluation.

    Language models are judged by their clients' mean perplexity, of which less is better, all others by accuracy.
    """
    personal = record.get("personal")
    if personal is not None and "perplexity" in personal and len(record.get("class_accuracy") or ()) < 2:
        return "perplexity", personal["perplexity"].get("mean")
    named = {"accuracy": "test_accuracy", "R²": "test_r2"}
    return next(((name, record[key]) for name, key in named.items() if key in record), None)


def nonfinite_tests(records: Iterable[dict]) -> str | None:
    """One sentence that names the tests whose loss was not finite, or None. Accuracies look healthy beside such a loss."""
    found: dict[str, list[int]] = {}
    for record in records:
        loss = value(record, "test_loss")
        kinds = ["the common test set"] if loss is not None and math.isnan(loss) else []
        for view in VIEWS:
            clients = record.get(view, {}).get("nonfinite", [])
            kinds += (
                [f"the {view} model of client{'s' if len(clients) > 1 else ''} {_listed(clients)}"] if clients else []
            )
        for kind in kinds:
            found.setdefault(kind, []).append(record["round"])
    if not found:
        return None
    parts = [f"{kind} (round{'s' if len(rounds) > 1 else ''} {_listed(rounds)})" for kind, rounds in found.items()]
    return f"a test loss is not finite, or too large for a perplexity: {'; '.join(parts)}. Means over it are null."


def _listed(numbers: list[int], most: int = 5) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"


def rounds_to_reach(records: Iterable[dict], accuracy: float) -> int | None:
    """The first round whose test accuracy is at least `accuracy` (0 to 1), or None."""
    for record in records:
        value = record.get("test_accuracy")
        if value is not None and value >= accuracy:
            return record["round"]
    return None
