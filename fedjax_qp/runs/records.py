"""What a run leaves behind: one plain-JSON record per round, in `records.jsonl` (`trackers` send copies elsewhere).

A record is a dict: "round" (from 1), "train_loss", "reporting" (clients), "local_steps" (their sum), every metric of
the algorithm under its own name, and in rounds with an evaluation "test_loss", "test_accuracy", "class_accuracy" and, where
clients differ in their labels, "client_accuracy": what each client would see on the common test set in its own mixture of
labels. Where clients have tests of their own, "personal" (each client's model after the last aggregation) and "tuned" (as the
client left it) hold loss, accuracy and, of language models, perplexity: spread over the clients that have taken part so far,
the mean over those that have not ("unseen"), and the numbers of all clients.

What a mean is taken over:
  * "train_loss", "client/personal_loss": all examples (target tokens of a language model) that the reporting clients were
    trained on in the round, each at the moment of its step; batches and clients count by what they hold.
  * all other "client/…": the reporting clients, each of which counts the same.
  * "test_loss", "test_accuracy": all examples (tokens) of the common test set.
  * "personal", "tuned": first a client's own test examples (tokens), then the clients, each of which counts the same, since
    personalised learning is judged by what single clients get.

A number that is not finite is written as null, so that the file is valid JSON. It is not missing, it is worse than any other:
where a tested client's loss is not finite, or its perplexity too large for a number, the mean and the maximum over clients
and the quantiles that touch it are null too, and the view names these clients under "nonfinite". Only clients that have no
test examples are left out. Nothing depends on the clock: two runs that compute the same bits write the same bytes.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fedjax_qp.files import write_whole, writing
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json
from fedjax_qp.settings.values import shown

if TYPE_CHECKING:  # comparing needs no JAX
    from fedjax_qp.engine.plan import Plan

FILE = "records.jsonl"
# Beside it, once a run goes no further:
FAILURE = "failure.json"  # it diverged
ENDED = "ended.json"  # why, and after which round
VIEWS = ("personal", "tuned")
COUNTED = "client/counted"  # how many examples a client's losses are means over: their weight, and no entry of its own
_TEST_NUMBERS = ("test_loss", "test_accuracy")
_QUANTILES = {"q05": 0.05, "q10": 0.10, "q25": 0.25, "q50": 0.50, "q75": 0.75, "q90": 0.90, "q95": 0.95}

# --- from metrics to records ------------------------------------------------------------------------------------------


def chunk_records(
    metrics: dict[str, np.ndarray],
    plan: "Plan",
    first_round: int,
    label_shares: Float[np.ndarray, "K C"] | None,
    seen: Set[int] = frozenset(),
    scores: Callable[[dict[str, np.ndarray]], dict[str, float]] | None = None,
) -> list[dict]:
    """Turns the metrics of one chunk into records.

    Args:
      metrics: from `Engine.run`, on the host: arrays [R, ...], those named "client/…" [R, M, ...]. Sums over the test
        set are "test/loss" [R], "test/correct" [R, C] and "test/count" [R, C]; over the clients' own tests likewise
        "personal/…" and "tuned/…" [R, K, …].
      plan: the plan that was run; its first `plan.rounds` rows are in use.
      first_round: number of rounds finished before the chunk.
      label_shares: share of each class in each client's training examples, rows sum to 1; None for a language model, whose
        tests count tokens.
      seen: clients that have taken part in earlier rounds.
      scores: the model's, which makes further numbers of its sums over the test set; see `federated.Model`.

    Returns:
      One record per round in use; see the module docstring. Means over clients leave out those that dropped out.
    """
    records, seen = [], set(seen)
    for index in range(int(plan.rounds)):
        row = {name: values[index] for name, values in metrics.items()}
        seen |= {int(client) for client in np.asarray(plan.cohorts.clients[index])[_reporting(plan, index)]}
        record = _record(row, plan, index, first_round + index + 1, label_shares)
        if bool(plan.evaluate[index]):
            record |= _further_tests(row, scores)
            language = label_shares is None
            record |= {view: _view(row, view, seen, language) for view in VIEWS if f"{view}/loss" in row}
        records.append(record)
    return records


def nonfinite_clients(metrics: dict[str, np.ndarray], plan: "Plan", first_round: int) -> tuple[int, list[int]] | None:
    """Finds the first round of a chunk in which training left the finite numbers.

    A loss is taken before its step, so a divergence in a client's last step shows only in its other metrics (the norm of
    its update), and one on the server only in the norm of the global update.

    Returns:
      That round's number (from 1) and the clients (all who report, if only the server's update broke), or None.
    """
    of_clients = [value for name, value in metrics.items() if name.startswith("client/")]
    of_server = metrics.get("update/norm")
    for index in range(int(plan.rounds)):
        reporting = _reporting(plan, index)
        finite = np.all([np.isfinite(value[index]) for value in of_clients], axis=0)
        broken = reporting & ~finite
        if not broken.any() and of_server is not None and not np.isfinite(of_server[index]):
            broken = reporting
        if broken.any():
            return first_round + index + 1, [int(client) for client in plan.cohorts.clients[index][broken]]
    return None


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


def _reporting(plan: "Plan", index: int) -> Bool[np.ndarray, "M"]:
    return np.asarray(plan.cohorts.steps[index]) > 0


def _record(row: dict[str, np.ndarray], plan: "Plan", index: int, round: int, label_shares: np.ndarray | None) -> dict:
    reporting = _reporting(plan, index)
    record: dict[str, Any] = {
        "round": round,
        "train_loss": None,
        "reporting": int(reporting.sum()),
        "local_steps": int(np.sum(plan.cohorts.steps[index])),
    }
    for name in sorted(row):  # the order of the keys is part of the file's bytes
        value = np.asarray(row[name])
        if name == COUNTED:
            continue
        if name.startswith("client/"):
            weights = row[COUNTED][reporting] if name.endswith("loss") and COUNTED in row else None
            mean = _mean_over_clients(value[reporting].astype(np.float64), weights)
            record["train_loss" if name == "client/loss" else name] = _plain(mean)
        elif not name.startswith(("test/", *(f"{view}/" for view in VIEWS))):
            record[name] = _plain(value)
    if bool(plan.evaluate[index]) and "test/count" in row:
        record |= _test_entries(row, label_shares)
    return record


def _mean_over_clients(
    values: Float[np.ndarray, "M *rest"], weights: Int[np.ndarray, "M"] | None
) -> Float[np.ndarray, "*rest"]:
    """NaN where there is no client, or none with a weight."""
    if not len(values) or (weights is not None and not weights.sum()):
        return np.full(values.shape[1:], np.nan)
    return np.average(values, axis=0, weights=weights)


def _test_entries(row: dict[str, np.ndarray], label_shares: Float[np.ndarray, "K C"] | None) -> dict:
    count = np.asarray(row["test/count"], np.float64)
    loss = _plain(quotient(np.asarray(row["test/loss"], np.float64), count.sum()))
    if "test/correct" not in row:
        return {"test_loss": loss}
    correct = np.asarray(row["test/correct"], np.float64)
    by_class = quotient(correct, count)
    entries = {
        "test_loss": loss,
        "test_accuracy": _plain(quotient(correct.sum(), count.sum())),
        "class_accuracy": _plain(by_class),
    }
    if label_shares is not None:
        of_clients = mixture_accuracy(by_class, label_shares)
        entries["client_accuracy"] = _spread(of_clients[np.isfinite(of_clients)])
    return entries


def _further_tests(
    row: dict[str, np.ndarray], scores: Callable[[dict[str, np.ndarray]], dict[str, float]] | None
) -> dict[str, Any]:
    """Whatever else the model measures on the test set, by name: its scores, or the means of its further sums."""
    sums = {name.removeprefix("test/"): np.asarray(value) for name, value in row.items() if name.startswith("test/")}
    if scores is None:
        further = [name for name in sums if name not in ("loss", "correct", "count")]
        found = {
            name: quotient(sums[name].astype(np.float64), np.asarray(sums["count"].sum(), np.float64))
            for name in further
        }
    else:
        found = scores(sums)
    return {f"test_{name}": _plain(value) for name, value in sorted(found.items())}


def mixture_accuracy(
    by_class: Float[np.ndarray, "C"], label_shares: Float[np.ndarray, "K C"]
) -> Float[np.ndarray, "K"]:
    """The accuracy that each client would see on test examples in its own mixture of labels.

    It costs no further evaluation, since it only weighs the accuracies of the classes. Classes without test examples (NaN)
    are left out of a client's mixture; NaN for a client that has no other class.
    """
    tested = np.isfinite(by_class)
    return quotient(label_shares[:, tested] @ by_class[tested], label_shares[:, tested].sum(axis=1))


def _spread(values: Float[np.ndarray, "K"]) -> dict[str, float | None]:
    """Mean, quantiles and extremes; a value that is not finite is the largest of all, and null is what depends on it."""
    if not len(values):
        return dict.fromkeys(("mean", *_QUANTILES, "min", "max"))
    ranked = np.sort(np.where(np.isfinite(values), values, np.inf))
    shares, largest = np.array(list(_QUANTILES.values())), np.max(ranked, initial=0, where=np.isfinite(ranked))
    above = ranked[np.ceil(shares * (len(ranked) - 1)).astype(int)]  # a quantile lies between two values
    quantiles = np.where(np.isfinite(above), np.quantile(np.minimum(ranked, largest), shares), np.nan)
    named = {name: _plain(value) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    mean = np.where(np.isfinite(ranked[-1]), values.mean(), np.nan)
    return {"mean": _plain(mean), **named, "min": _plain(ranked[0]), "max": _plain(ranked[-1])}


def _view(row: dict[str, np.ndarray], view: str, seen: set[int], language: bool) -> dict:
    """One view of the clients' models, each on its own tests."""
    loss, correct, count = (np.asarray(row[f"{view}/{name}"], np.float64) for name in ("loss", "correct", "count"))
    count = count.sum(-1)
    of_client = {"loss": quotient(loss, count), "accuracy": quotient(correct.sum(-1), count)}
    if language:
        with np.errstate(over="ignore"):
            of_client["perplexity"] = np.exp(of_client["loss"])
    took_part, tested = np.isin(np.arange(len(loss)), list(seen)), count > 0
    entries: dict[str, Any] = {}
    for name, values in of_client.items():
        known, unseen = (values[tested & group] for group in (took_part, ~took_part))
        entries[name] = {**_spread(known), "unseen": _spread(unseen)["mean"]}
        entries[name]["clients"] = _plain(values)
    broken = tested & ~np.all([np.isfinite(values) for values in of_client.values()], axis=0)
    return entries | ({"nonfinite": np.flatnonzero(broken).tolist()} if broken.any() else {})


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient; NaN where the denominator is not positive."""
    positive = denominator > 0
    return np.where(positive, numerator / np.where(positive, denominator, 1), np.nan)


def _plain(value: Any) -> Any:
    """A number or (nested) list that JSON can hold; None where a number is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --- files ------------------------------------------------------------------------------------------------------------


class Recorder:
    """Appends records to `folder/records.jsonl`.

    A chunk's records are on the disk when `write` returns, so a checkpoint that is saved afterwards never runs ahead of
    them. What a killed run wrote beyond its last checkpoint is dropped on resuming.
    """

    def __init__(self, folder: Path, *, resume_round: int | None = None):
        """Opens the file; a context manager closes it.

        Args:
          folder: the run folder, which exists.
          resume_round: rounds that the checkpoint has finished. Records up to it are kept, all later ones are dropped;
            None starts afresh, which drops every earlier record.

        Raises:
          ConfigurationError: the file cannot be written, or a line before the last is damaged.
        """
        kept = resume_round or 0
        self._path = Path(folder) / FILE
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


def read(folder: Path) -> list[dict]:
    """Reads the records of a run; a last line that was cut off when the run was killed is left out.

    Raises:
      ConfigurationError: the folder is missing, holds no records, or a line is damaged.
    """
    path = Path(folder) / FILE
    if not path.parent.is_dir():
        raise ConfigurationError(f"{folder} is not a run folder: there is no such folder.")
    if not path.is_file():
        raise ConfigurationError(f"{folder} is not a run folder: it has no {FILE}. Give the folder of one run.")
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


def missing(folder: Path, records: Sequence[dict]) -> str | None:
    """Says what a run's folder should hold of records and does not; None where they are complete.

    They are on the disk before a checkpoint is saved, so they reach at least as far as its newest one.
    """
    checkpoints = Path(folder) / "checkpoints"
    saved = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    rounds = [int(name) for name in saved if name.isdecimal()]
    return gap(records, max([*rounds, *(record["round"] for record in records)], default=0))


def headline(record: dict) -> tuple[str, float | None] | None:
    """The number that a record is judged by, with its name; None before an evaluation.

    Language models are judged by their clients' mean perplexity, of which less is better, all others by accuracy.
    """
    personal = record.get("personal")
    if personal is not None and "perplexity" in personal and len(record.get("class_accuracy") or ()) < 2:
        return "perplexity", personal["perplexity"].get("mean")
    named = {"accuracy": "test_accuracy", "R²": "test_r2"}
    return next(((name, record[key]) for name, key in named.items() if key in record), None)


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
