"""What a run leaves behind: one plain-JSON record per round, in a file (`trackers` send copies elsewhere).

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

from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from fedjax_qp.runs.record_numbers import VIEWS

if TYPE_CHECKING:  # the arithmetic of means needs no JAX
    from fedjax_qp.engine.plan import Plan

COUNTED = "client/counted"  # how many examples a client's losses are means over: their weight, and no entry of its own
_QUANTILES = {"q05": 0.05, "q10": 0.10, "q25": 0.25, "q50": 0.50, "q75": 0.75, "q90": 0.90, "q95": 0.95}


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
