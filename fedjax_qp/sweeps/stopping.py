"""How good a run is so far, and when a trial is given up: the median rule.

The value of a run at a round is the mean of the metric's last evaluations up to there, the value of a trial the mean over
its seeds, so early stopping looks at what the ranking looks at. From round `after` on, a trial is given up when its value is
worse than the median of the other trials of its variant at that round. Details, all of them decisions:

* A trial is stopped as a whole. It is judged once all of its seeds have come to a round, and then all of them stop: a mean
  over fewer seeds could not be compared with anything.
* Variants are judged apart: every method keeps its best settings, however much better another method is.
* Trials that were given up stay among the others, as worse than any that runs. So side by side no more than half of a
  variant's trials are given up however often they are judged, and the trials that come later meet a rising bar.
* Nothing is judged with fewer than `least_trials` others at that round. Diverged and failed trials are no judges.

Which trials have come to a round depends on their order and on the workers' speed, so with several workers two sweeps may
stop different trials. Judgement is passed where a chunk of rounds ends.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps.space import EarlyStopping, Rank
from fedjax_qp.sweeps.trials import read_attempt, read_ending, read_stopped, stop_trial, stopped_file

Curve = list[tuple[int, float]]  # (round, value) of each evaluation
number = record_numbers.value


class Peer(NamedTuple):
    """A trial as workers know it."""

    name: str
    variant: str


class Curves:
    """Reads metrics from run folders; a file is parsed again only when it has changed."""

    def __init__(self, metric: str):
        self._metric = metric
        self._read: dict[Path, tuple[tuple[int, int], Curve, int]] = {}

    def curve(self, run_folder: Path) -> Curve:
        """The evaluations of a run so far."""
        return self._entry(run_folder)[1]

    def rounds(self, run_folder: Path) -> int:
        """The rounds of a run so far."""
        return self._entry(run_folder)[2]

    def _entry(self, run_folder: Path) -> tuple[tuple[int, int], Curve, int]:
        folder = RunFolder(run_folder)
        file = folder.records_file
        try:
            found = file.stat()
        except FileNotFoundError:
            return (0, 0), [], 0
        stamp = (found.st_size, found.st_mtime_ns)
        if file not in self._read or self._read[file][0] != stamp:
            lines = folder.records()
            self._read[file] = stamp, curve(lines, self._metric), lines[-1]["round"] if lines else 0
        return self._read[file]


def curve(lines: Sequence[dict], metric: str) -> Curve:
    """The rounds in which a metric was recorded, and its values there: NaN where it was not finite."""
    found = [(line["round"], number(line, metric)) for line in lines]
    return [(round, value) for round, value in found if value is not None]


def value_at(curve: Curve, round: int | None, last: int) -> float | None:
    """Mean of the last evaluations up to a round (None: the end), NaN if one is; None before the first."""
    values = [value for at, value in curve if round is None or at <= round]
    return statistics.fmean(values[-last:]) if values else None


def goodness(value: float | None, sign: int) -> float:
    """The larger the better: a value that is not finite is worse than any other, as is none."""
    return sign * value if value is not None and math.isfinite(value) else -float("inf")


class Judge:
    """Decides for the runs of one task, on a worker, whether they go on."""

    def __init__(
        self,
        folder: Path,
        attempt: str,
        rank: Rank,
        rule: EarlyStopping | None,
        peers: Sequence[Peer],
        seeds: Sequence[int],
        together: Collection[str] = (),
    ):
        """Args: together: the trials with runs in the same program."""
        self._together = together
        self._folder, self._attempt = folder, attempt
        self._rank, self._rule, self._seeds = rank, rule, seeds
        self._peers = {peer.name: peer for peer in peers}
        self._curves = Curves(rank.metric)

    def verdict(self, trial: str, seed: int, history: Sequence[dict]) -> str | None:
        """The reason for which a run ends now, or None."""
        if read_attempt(self._folder) != self._attempt:
            return "interrupted"
        if self._rule is None or not history:
            return None
        given_up, round = read_stopped(self._folder, trial), history[-1]["round"]
        if given_up is not None:  # rounds before that are computed again after a kill; it ends where it did
            return "stopped early" if round >= given_up[1] else None
        reason = self._worse_than_median(trial, {seed: curve(history, self._rank.metric)}, round)
        if reason is None:
            return None
        stop_trial(self._folder, trial, reason, round)
        return "stopped early"

    def _worse_than_median(self, trial: str, own: dict[int, Curve], round: int) -> str | None:
        assert self._rule is not None
        value = self._value(trial, round, own)
        if round < self._rule.after or value is None:
            return None
        sign, variant = self._rank.sign, self._peers[trial].variant
        names = [peer.name for peer in self._peers.values() if peer.name != trial and peer.variant == variant]
        stopped = [name for name in names if stopped_file(self._folder, name).exists()]
        running = [
            self._value(name, round, {}) for name in names if name not in stopped and not self._broken(name, round)
        ]
        others = [goodness(other, sign) for other in running if other is not None]
        others += [-float("inf")] * len(stopped)
        if len(others) < self._rule.least_trials or goodness(value, sign) >= (median := statistics.median(others)):
            return None
        return (
            f"{self._rank.metric} {value:.4g} in round {round} is worse than the median {sign * median:.4g} of "
            f"{len(others)} other trials"
        )

    def _broken(self, trial: str, round: int) -> bool:
        """Whether a run of a trial diverged or failed, however good it was before.

        Of those in the same program nobody knew so at the rounds before; when these are computed again, nobody does either.
        """
        folders = [self._run_folder(trial, seed) for seed in self._seeds]
        endings = [read_ending(folder) for folder in folders]
        failed = any(ending is not None and ending.status == "failed" for ending in endings)
        diverged = [folder for folder in folders if RunFolder(folder).diverged()]
        if trial in self._together:
            diverged = [folder for folder in diverged if _last_round(folder) < round]
        return failed or bool(diverged)

    def _run_folder(self, trial: str, seed: int) -> Path:
        return self._folder / "runs" / f"{trial}-seed{seed}"

    def _value(self, trial: str, round: int, own: dict[int, Curve]) -> float | None:
        """A trial's value at a round, or None until all of its seeds have come there."""
        values = []
        for seed in self._seeds:
            folder = self._run_folder(trial, seed)
            if seed not in own and self._curves.rounds(folder) < round:
                return None
            values.append(value_at(own[seed] if seed in own else self._curves.curve(folder), round, self._rank.last))
        present = [value for value in values if value is not None]
        return statistics.fmean(present) if len(present) == len(values) else None


def _last_round(run_folder: Path) -> int:
    """The last round that an ended run finished; 0 where its mark is damaged."""
    return (RunFolder(run_folder).ended() or ("", 0))[1]


def metric_names(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The names that `Rank.metric` can take in these records."""
    return sorted({name for line in lines for name, _ in record_numbers.scalars(line)})
