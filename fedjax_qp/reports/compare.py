"""Compares finished runs: a method is a set of runs that differ in nothing but the seed.

Numbers are means over seeds with their sample standard deviation. The difference to a baseline is paired, taken seed
by seed: runs of one seed share their partition, their cohorts and their first model, and much of the spread over seeds
comes from these. Settings other than the algorithm in which compared runs differ are part of the result.

Runs of different length are compared over the rounds that all of them were to have. What was measured and is not finite is
no missing value: it makes the means that it belongs to "not finite" (null in JSON).
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fedjax_qp import config as configuration
from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.watch import Watch

# Where and how a run was computed, and how long; what it computes in a round does not depend on it. `engine.lanes` is even
# measured anew in each run.
_ARRANGEMENT = ("folder", "plugins", "engine", "checkpoints", "tracking", "rounds", "evaluation")
_MISSING = "–"


class Run(NamedTuple):
    """One run folder, read."""

    folder: Path
    config: dict[str, Any]
    records: list[dict]
    done: int | None = None  # its last round, where its records are not compared up to there
    watched: tuple[Watch, ...] = ()


class Method(NamedTuple):
    """Runs that differ in nothing but the seed."""

    label: str
    runs: list[Run]  # by seed


class Spread(NamedTuple):
    """A quantity over seeds."""

    mean: float
    std: float | None  # sample standard deviation; None for a single seed
    seeds: int  # how many have the quantity


class Reached(NamedTuple):
    """Rounds to reach a target accuracy."""

    target: float
    median: float | None  # over all seeds, where one that never got there counts as infinite; None = infinite
    seeds: int  # how many got there


class Difference(NamedTuple):
    """A method minus the baseline, seed by seed."""

    baseline: str
    points: Spread | None  # percentage points; None without a common seed


class Row(NamedTuple):
    """One method in a comparison. Accuracies are shares, 0 to 1; None where nothing was recorded."""

    method: str
    seeds: list[int]
    last: int
    perplexity: Spread | None  # of a language model: mean over clients, mean of the last `last` evaluations
    accuracy: Spread | None  # mean of the last `last` evaluations
    final: Spread | None  # the last evaluation
    best: Spread | None
    worst_decile: Spread | None  # 10 % quantile over clients, mean of the last `last` evaluations
    reached: Reached | None  # None without a target
    watched: dict[str, Spread | None]  # what the method wants shown, by its label: mean over rounds
    difference: Difference | None  # of `accuracy`; None without a baseline and for the baseline itself
    unequal: list[str]  # what besides the algorithm differs from the baseline (or the first method)
    unfinished: list[str]  # runs that diverged or did not come to their end, or whose records have gaps
    remarks: list[str]  # what else a reader must know of its runs
    tests: Mapping[str, Spread | None] = MappingProxyType({})  # further "test_…" numbers: mean of the last evaluations


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """Reads run folders.

    Raises:
      ConfigurationError: a folder is not a run folder, or a file in it is damaged; the message names what is missing.
    """
    runs = []
    for folder in map(RunFolder, folders):
        records = folder.records()
        runs.append(Run(folder.path, folder.raw_config(), records, watched=folder.watches()))
    if not runs:
        raise ConfigurationError("nothing to compare: give one or more run folders.")
    return runs


def over_common_rounds(runs: Sequence[Run]) -> list[Run]:
    """The runs up to the last round that all of them were to have."""
    common = min((run.config["rounds"] for run in runs if "rounds" in run.config), default=None)
    if common is None:
        return list(runs)
    return [_cut(run, common) if run.config.get("rounds", common) > common else run for run in runs]


def _cut(run: Run, rounds: int) -> Run:
    records = [record for record in run.records if record["round"] <= rounds]
    return run._replace(config=run.config | {"rounds": rounds}, records=records, done=_finished(run))


def methods(runs: Iterable[Run]) -> list[Method]:
    """Groups runs that differ in nothing but the seed and their arrangement, in the order in which they are first given.

    Returns:
      Methods under their runs' name; where several have one name, the settings in which they differ are added.

    Raises:
      ConfigurationError: two runs of one method have the same seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_settings(run, "seed"), sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    for members in groups.values():
        members.sort(key=_seed)
        for first, second in itertools.pairwise(members):
            if _seed(first) == _seed(second):
                raise ConfigurationError(
                    f"{first.folder} and {second.folder} are the same run (seed {_seed(first)}): leave one of them out."
                )
    labels = _labels([members[0] for members in groups.values()])
    return [Method(label, members) for label, members in zip(labels, groups.values(), strict=True)]


def summary(
    runs: Iterable[Run], *, last: int = 10, target: float | None = None, baseline: str | None = None
) -> list[Row]:
    """Summarises each method over its seeds.

    Args:
      last: number of last evaluations that an accuracy is averaged over (all, where there are fewer).
      target: accuracy (0 to 1) for the rounds to reach it.
      baseline: label of the method that paired differences are taken to, or a name that only its runs have.

    Raises:
      ConfigurationError: no method is named like the baseline, or a number is out of range.
    """
    if last < 1:
        raise ConfigurationError(f"last = {last} must be at least 1 evaluation.")
    if target is not None and not 0 < target <= 1:
        raise ConfigurationError(f"target = {target} must be an accuracy between 0 and 1, for example 0.75.")
    found = methods(over_common_rounds(list(runs)))
    base = None if baseline is None else named(found, baseline)
    return [_row(method, base, base or found[0], last, target) for method in found]


def named(found: Sequence[Method], baseline: str) -> Method:
    """The method of a label, or of a name that only its runs have: that of a run, or of its folder.

    Raises:
      ConfigurationError: there is none, or there are several.
    """
    exact = [method for method in found if method.label == baseline]
    folder = Path(baseline).name
    alike = exact or [
        method
        for method in found
        if any(baseline == run.config["name"] or folder == run.folder.name for run in method.runs)
    ]
    if len(alike) == 1:
        return alike[0]
    if alike:
        labels = ", ".join(repr(method.label) for method in alike)
        raise ConfigurationError(f"baseline = {baseline!r} is the name of several methods: choose one of {labels}.")
    raise unknown_name("baseline", baseline, [method.label for method in found])


# --- quantities of one run --------------------------------------------------------------------------------------------


def _evaluations(run: Run) -> list[float]:
    return [record["test_accuracy"] for record in run.records if record.get("test_accuracy") is not None]


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def series(run: Run, name: str) -> list[float]:
    """All values of a recorded number, NaN where it was measured and is not finite."""
    found = [record_numbers.value(record, name) for record in run.records]
    return [value for value in found if value is not None]


def _last_mean(run: Run, name: str, last: int) -> float | None:
    return _mean(series(run, name)[-last:])


def shown_watches(runs: Sequence[Run]) -> list[Watch]:
    """What the methods of some runs want shown, each once."""
    return list(dict.fromkeys(watch for run in runs for watch in run.watched if watch.label))


def _seed(run: Run) -> int:
    return run.config.get("seed", 0)


def _finished(run: Run) -> int:
    return run.records[-1]["round"] if run.records else 0


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(method: Method, base: Method | None, reference: Method, last: int, target: float | None) -> Row:
    def over_seeds(quantity: Callable[[Run], float | None]) -> Spread | None:
        return spread([quantity(run) for run in method.runs])

    def accuracy(run: Run) -> float | None:
        return _last_mean(run, "test_accuracy", last)

    return Row(
        method=method.label,
        seeds=[_seed(run) for run in method.runs],
        last=last,
        perplexity=over_seeds(lambda run: _last_mean(run, "personal/perplexity/mean", last)),
        accuracy=over_seeds(accuracy),
        final=over_seeds(lambda run: _last_mean(run, "test_accuracy", 1)),
        best=over_seeds(lambda run: max(_evaluations(run), default=None)),
        worst_decile=over_seeds(lambda run: _last_mean(run, "client_accuracy/q10", last)),
        reached=None if target is None else _reached(method, target),
        watched=_watched_means(method),
        difference=None if base is None or base is method else _difference(method, base, accuracy),
        unequal=_unequal(method, reference),
        unfinished=[
            f"seed {_seed(run)} {state}" for run in method.runs for state in (unfinished(run), incomplete(run)) if state
        ],
        remarks=_remarks(method),
        tests={name: over_seeds(partial(_last_mean, name=name, last=last)) for name in _further_tests(method)},
    )


def _further_tests(method: Method) -> list[str]:
    """The numbers of tests that are recorded besides the loss and the accuracy."""
    names = {name for run in method.runs for record in run.records for name in record if name.startswith("test_")}
    return sorted(names - {"test_loss", "test_accuracy"})


def _watched_means(method: Method) -> dict[str, Spread | None]:
    def over_seeds(metric: str) -> Spread | None:
        return spread([_mean(list(filter(math.isfinite, series(run, metric)))) for run in method.runs])

    return {watch.label: over_seeds(watch.metric) for watch in shown_watches(method.runs)}


def _remarks(method: Method) -> list[str]:
    found = [
        f"seed {_seed(run)}: {said}" for run in method.runs if (said := record_numbers.nonfinite_tests(run.records))
    ]
    for rounds, seeds in _by_value(method, lambda run: run.done if (run.done or 0) > run.config["rounds"] else None):
        common = method.runs[0].config["rounds"]
        found.append(
            f"compared over the first {common} rounds only, which all runs were to have; {seeds} has {rounds}."
        )
    every = [rounds for rounds, _ in _by_value(method, _every)]
    if len(every) > 1:
        found.append(f"its seeds were not evaluated equally often: every {_listed(sorted(every))} rounds.")
    return found


def _by_value(method: Method, quantity: Callable[[Run], int | None]) -> list[tuple[int, str]]:
    """The different values of a quantity, each with the seeds that have it."""
    groups: dict[int, list[int]] = {}
    for run in method.runs:
        if (value := quantity(run)) is not None:
            groups.setdefault(value, []).append(_seed(run))
    return [(value, f"seed{'s' if len(seeds) > 1 else ''} {_listed(seeds)}") for value, seeds in groups.items()]


def _every(run: Run) -> int | None:
    """Rounds between two evaluations, where the configuration says so."""
    settings = run.config.get("evaluation")
    every = settings.get("every") if isinstance(settings, dict) else None
    return every if isinstance(every, int) else None


def incomplete(run: Run) -> str | None:
    """What a run's records lack up to where it has come; None where they are complete."""
    found = RunFolder(run.folder).missing_records(run.records) if run.done is None else None
    return None if found is None else f"has records with {found}"


def unfinished(run: Run) -> str | None:
    """Why a run's numbers are not those of a whole run; None where they are."""
    folder = RunFolder(run.folder)
    if folder.diverged():
        return f"diverged after {run.done or _finished(run)} rounds"
    if not folder.end.exists() and _finished(run) < run.config.get("rounds", 0):
        return f"has {_finished(run)} of {run.config['rounds']} rounds"
    return None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of what is there; None where nothing is, NaN where something is not finite."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if not all(map(math.isfinite, present)):
        return Spread(math.nan, None, len(present))
    std = statistics.stdev(present) if len(present) > 1 else None
    return Spread(statistics.fmean(present), std, len(present))


def _reached(method: Method, target: float) -> Reached:
    rounds = [record_numbers.rounds_to_reach(run.records, target) for run in method.runs]
    median = statistics.median([float("inf") if value is None else value for value in rounds])
    return Reached(
        target, None if median == float("inf") else float(median), sum(value is not None for value in rounds)
    )


def _difference(method: Method, base: Method, accuracy: Callable[[Run], float | None]) -> Difference:
    theirs = {_seed(run): accuracy(run) for run in base.runs}
    pairs = [(accuracy(run), theirs.get(_seed(run))) for run in method.runs]
    points = [None if ours is None or other is None else 100 * (ours - other) for ours, other in pairs]
    return Difference(base.label, spread(points))


def _unequal(method: Method, reference: Method) -> list[str]:
    """Settings outside the algorithm in which a method differs from the reference, and unequal numbers of rounds."""
    theirs, ours = (_settings(one.runs[0], "seed", "name", "algorithm") for one in (reference, method))
    found = configuration.differences(theirs, ours)
    before, after = (_every(one.runs[0]) for one in (reference, method))
    if before != after:
        found.append(f"evaluation.every: {before} → {after}")
    rounds, expected = (sorted({_finished(run) for run in one.runs}) for one in (method, reference))
    if rounds != expected or len(rounds) > 1:
        found.append(f"rounds finished: {_listed(expected)} → {_listed(rounds)}")
    return found


def _settings(run: Run, *left_out: str) -> dict[str, Any]:
    found = {key: value for key, value in run.config.items() if key not in (*_ARRANGEMENT, *left_out)}
    partition = found.get("partition")
    if (
        isinstance(partition, dict) and partition.get("test", "common") == "common"
    ):  # as in runs from before there was this
        found["partition"] = {key: value for key, value in partition.items() if key not in ("test", "test_share")}
    return found


def _labels(runs: list[Run]) -> list[str]:
    """One label per method: its name, with the settings that tell it from other methods of that name."""
    labels = []
    for run in runs:
        name, own = run.config["name"], configuration.flat(_settings(run, "seed"))
        namesakes = [configuration.flat(_settings(other, "seed")) for other in runs if other.config["name"] == name]
        keys = _distinguishing(namesakes)
        detail = ", ".join(f"{key}={own.get(key, _MISSING)}" for key in keys)
        labels.append(f"{name} ({detail})" if keys else name)
    return labels


def _distinguishing(several: list[dict[str, Any]]) -> list[str]:
    """The settings in which they differ; where it suffices, only those that all of them have."""
    differing = [
        key for key in sorted(set().union(*several)) if any(one.get(key) != several[0].get(key) for one in several)
    ]
    common = [key for key in differing if all(key in one for one in several)]
    values = {json.dumps([one[key] for key in common], default=str) for one in several}
    return common if len(values) == len(several) else differing


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
