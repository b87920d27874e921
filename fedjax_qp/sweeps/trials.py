"""The folder of a sweep: what was tried and how it ended. A kill at any moment loses nothing of it.

    sweep.yaml              the sweep, with the base configuration as it was read
    study.log               Optuna's journal: a study for each variant, one for the comparison; optuna-dashboard opens it
    runs/fedqp-003-seed0    an ordinary run folder: variant, number of the trial in its study, seed
    comparison/…            the runs that follow the search
    results.csv, …          see `results`

Runs are executed by workers, perhaps on other machines, that share this folder's file system and nothing else. The sweep
itself adds trials and ends them; the worker that holds a run's lock reports its values round by round. What a study knows of
a trial besides its settings follows from the run folders. `attempt` names the sweep process that owns the folder now: a
worker that was left behind by an earlier one sees that at the end of its chunk, and leaves.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from fedjax_qp import config as configuration
from fedjax_qp.files import lock_folder, lock_now, write_whole, writing
from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.reports.compare import Spread, spread
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings.strict import load_yaml, read_text
from fedjax_qp.sweeps.search import Point, identity
from fedjax_qp.sweeps.space import COMPARISON, Rank, Sweep

JOURNAL = "study.log"
_COMPLETE = {"finished", "target reached", "no progress"}  # a run that ended so did all it was asked for
# What changes no run: where and how they are computed, and where the files were read from.
_FREE = ("config", "folder", "workers", "cluster", "runs_per_task", "retries", "batch")


class Trial(NamedTuple):
    """A trial of Optuna's in the words of a sweep."""

    study: str
    number: int  # in its study
    variant: str
    name: str  # of its runs, which add the seed
    settings: dict[str, Any]


class Phase(NamedTuple):
    """The search or the comparison: where its runs are, their seeds, and how they are ranked."""

    folder: Path
    seeds: tuple[int, ...]
    rank: Rank

    def run_folders(self, trial: Trial) -> list[Path]:
        return [self.folder / f"{trial.name}-seed{seed}" for seed in self.seeds]


class Store:
    """A sweep's folder, opened by the one process that owns it; a context manager gives it back."""

    def __init__(self, sweep: Sweep):
        """Opens or makes the folder.

        Raises:
          ConfigurationError: another process has it open, or it holds a sweep that this one does not only add to.
        """
        self.folder = sweep.sweep_folder.absolute()
        self.sweep = sweep
        self.failures: dict[Path, str] = {}  # by run folder: why its task failed, in this attempt
        self._studies: dict[str, Study] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder, "sweep.lock", "runs the sweep")
        except OSError as error:
            raise ConfigurationError(
                f"the sweep folder {self.folder} cannot be written ({error.strerror}): choose another with folder=PATH."
            ) from None
        try:
            self._check_and_save()
            self.attempt = uuid.uuid4().hex
            write_whole(self.folder / "attempt", self.attempt)
            self._renew()
            self.storage = open_storage(self.folder)
        except BaseException:
            self._lock.close()
            raise

    def phase(self, study: str) -> Phase:
        compare, rank = self.sweep.compare, self.sweep.rank
        if study != COMPARISON or compare is None:
            return Phase(self.folder / "runs", self.sweep.seeds, rank)
        return Phase(self.folder / COMPARISON, compare.seeds, Rank(rank.metric, rank.direction, compare.last))

    def study(self, name: str) -> Study:
        """A variant's study, or that of the comparison; made where there is none."""
        if name not in self._studies:
            direction = self.sweep.rank.optuna_direction
            self._studies[name] = optuna.create_study(
                study_name=name, storage=self.storage, direction=direction, load_if_exists=True
            )
        return self._studies[name]

    def studies(self) -> list[Study]:
        """All that there are, in the order in which they began."""
        return [self.study(found.study_name) for found in self.storage.get_all_studies()]

    def study_name(self, variant: str) -> str:
        """What a variant's study is called; the sweep's name where there are no variants."""
        return variant or self.sweep.name

    def count(self) -> int:
        """How many trials there are."""
        return sum(len(study.get_trials(deepcopy=False)) for study in self.studies())

    def add(self, study: str, variant: str, points: Sequence[Point], name: str | None = None) -> list[int]:
        """Adds the points that are new; returns the numbers of the trials of all of them.

        Args:
          variant: in whose space they are.
          name: of a single trial's runs; default by variant and number.
        """
        known = self.study(study).get_trials(deepcopy=False)
        numbers = {_identity(one.user_attrs["variant"], one.user_attrs["settings"]): one.number for one in known}
        for point in points:
            if (key := _identity(variant, point.settings)) in numbers:
                continue
            numbers[key] = len(numbers)
            called = name or f"{variant or 'trial'}-{numbers[key]:03d}"
            told = {"name": called, "variant": variant, "settings": point.settings}
            with writing(self.folder / JOURNAL):
                self.study(study).add_trial(
                    create_trial(
                        state=TrialState.RUNNING,
                        params=dict(point.params),
                        distributions=dict(point.distributions),
                        user_attrs=told,
                    )
                )
        return [numbers[_identity(variant, point.settings)] for point in points]

    def settle(self) -> list[tuple[str, FrozenTrial]]:
        """Tells Optuna of the trials whose runs have all ended since; returns these with the names of their studies.

        Raises:
          ConfigurationError: no run records the metric that ranks them; the nearest that there are are named.
        """
        found = []
        for study in self.studies():
            for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if self._settle(study, frozen):
                    found.append((study.study_name, study.trials[frozen.number]))
        return found

    def waits(self, run_folder: Path) -> bool:
        """Whether a run has neither ended nor, in this attempt, failed."""
        return run_folder not in self.failures and RunFolder(run_folder).ended() is None

    def end_attempt(self) -> None:
        """Asks all workers to finish their chunks and leave."""
        write_whole(self.folder / "attempt", "")

    def close(self) -> None:
        """Gives the folder back; a second call does nothing."""
        self._lock.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # a cluster that is not ours would work on
            self.end_attempt()
        self.close()

    def _settle(self, study: Study, frozen: FrozenTrial) -> bool:
        trial, phase = trial_of(study.study_name, frozen), self.phase(study.study_name)
        folders = phase.run_folders(trial)
        if any(map(self.waits, folders)):
            return False
        histories, identifier = [read_history(folder) for folder in folders], trial_id(self.storage, trial)
        for round, value in curve(histories, phase.rank).items():
            if round not in frozen.intermediate_values:  # of the last chunk, after which a worker is not asked
                self.storage.set_trial_intermediate_value(identifier, round, value)
        status, reason = self._ending(folders)
        value = value_of(histories, phase.rank) if status == "complete" else None
        if status == "complete" and value is None:
            names = {name for history in histories for line in history for name, _ in record_numbers.scalars(line)}
            raise unknown_name("metric (rank.metric)", phase.rank.metric, sorted(names))
        if value is not None and not math.isfinite(value.mean):
            status, reason, value = "diverged", f"{phase.rank.metric} is not finite", None
        rounds = min(len(history) for history in histories)
        std = None if value is None else value.std
        for key, said in {"status": status, "reason": reason, "rounds": rounds, "std": std}.items():
            self.storage.set_trial_user_attr(identifier, key, said)
        # Trials that were given up or diverged taught something, those that failed did not: the samplers know of the former.
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        study.tell(trial.number, None if value is None else value.mean, state=states.get(status, TrialState.PRUNED))
        return True

    def _ending(self, folders: Sequence[Path]) -> tuple[str, str]:
        """How a trial ended, by the worst of its runs, and why."""
        failed = [self.failures[folder] for folder in folders if folder in self.failures]
        if failed:
            return "failed", failed[0]
        reasons = [ended[0] for folder in folders if (ended := RunFolder(folder).ended()) is not None]
        if "diverged" in reasons:
            return "diverged", "diverged"
        said = "; ".join(dict.fromkeys(reason for reason in reasons if reason != "finished"))
        return ("complete" if set(reasons) <= _COMPLETE else "stopped"), said

    def _renew(self) -> None:
        """Writes the journal anew, from the settings of its trials and the run folders.

        Optuna does not open ended trials again. But one that failed is tried again, and one may be given further seeds.
        """
        file, new = self.folder / JOURNAL, self.folder / f"{JOURNAL}.new"
        if not file.exists():
            return
        try:
            before = open_storage(self.folder)
            names = [one.study_name for one in before.get_all_studies()]
            found = {name: before.get_all_trials(before.get_study_id_from_name(name)) for name in names}
        except (ValueError, KeyError) as error:
            raise ConfigurationError(
                f"{file} is damaged ({error}): restore it from a backup, or choose another name= for the sweep."
            ) from None
        new.unlink(missing_ok=True)
        with writing(new):
            storage = JournalStorage(JournalFileBackend(str(new)))
            for name, trials in found.items():
                direction = self.sweep.rank.optuna_direction
                study = optuna.create_study(study_name=name, storage=storage, direction=direction)
                study.add_trials([self._opened(name, frozen) for frozen in trials])
            os.replace(new, file)

    def _opened(self, study: str, frozen: FrozenTrial) -> FrozenTrial:
        trial, phase = trial_of(study, frozen), self.phase(study)
        kept = {"name", "variant", "settings", "stopped"}
        return create_trial(
            state=TrialState.RUNNING,
            params=frozen.params,
            distributions=frozen.distributions,
            user_attrs={key: value for key, value in frozen.user_attrs.items() if key in kept},
            intermediate_values=curve([read_history(folder) for folder in phase.run_folders(trial)], phase.rank),
        )

    def _check_and_save(self) -> None:
        file, values = self.folder / "sweep.yaml", _plain(self.sweep)
        if file.exists():
            changes = changes_to_the_past(_saved(file), values)
            if changes:
                raise ConfigurationError(
                    f"{self.folder} holds a sweep with other settings: {'; '.join(changes)}. Its trials would not belong "
                    "together: choose another name=, or undo the change. What only adds (seeds, trials, values of a grid, "
                    "variants) is welcome."
                )
        write_whole(file, yaml.safe_dump(values, sort_keys=False))


def open_storage(folder: Path) -> JournalStorage:
    """Opens the journal of a sweep's folder, also on a worker."""
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def _identity(variant: str, settings: dict[str, Any]) -> str:
    return identity({"variant": variant, **settings})


def trial_of(study: str, frozen: FrozenTrial) -> Trial:
    told = frozen.user_attrs
    return Trial(study, frozen.number, told["variant"], told["name"], told["settings"])


def trial_id(storage: JournalStorage, trial: Trial) -> int:
    """Names a trial in its storage."""
    study = storage.get_study_id_from_name(trial.study)
    return storage.get_trial_id_from_study_id_trial_number(study, trial.number)


def curve(histories: Sequence[Sequence[dict]], rank: Rank) -> dict[int, float]:
    """A trial's value after each round in which all of its seeds were evaluated.

    Args:
      histories: the records of each seed.
    """
    of_seeds = [_curve(history, rank) for history in histories]
    common = set.intersection(*map(set, of_seeds))
    return {round: statistics.fmean(one[round] for one in of_seeds) for round in sorted(common)}


def value_of(histories: Sequence[Sequence[dict]], rank: Rank) -> Spread | None:
    """A trial's value at the end of its runs, with its spread over seeds; NaN where one is, None where a seed has none."""
    last = [list(_curve(history, rank).values())[-1:] for history in histories]
    return spread([value for values in last for value in values]) if all(last) else None


def _curve(history: Sequence[dict], rank: Rank) -> dict[int, float]:
    values: list[float] = []
    found = {}
    for record in history:
        value = record_numbers.value(record, rank.metric)
        if value is not None:
            values.append(value)
            found[record["round"]] = statistics.fmean(values[-rank.last :])
    return found


def read_history(folder: Path) -> list[dict]:
    """The records of a run so far."""
    return RunFolder(folder).records(missing_ok=True)


def read_attempt(folder: Path) -> str:
    """Names the sweep process that owns the folder; "" where none does."""
    try:
        return (folder / "attempt").read_text(errors="replace")
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def run_locks(
    folder: Path, names: Sequence[str], give_up: Callable[[], bool], wait: Callable[[], None]
) -> Iterator[bool]:
    """Holds the locks of some runs, which the system takes back when their holder dies.

    Args:
      give_up: asked while another worker holds a lock; true ends the waiting.
      wait: called in between.

    Yields:
      Whether all locks are held.
    """
    with contextlib.ExitStack() as stack:
        held = True
        (folder / "locks").mkdir(exist_ok=True)
        for name in sorted(names):  # in one order, so that no two workers wait for each other
            file = stack.enter_context((folder / "locks" / name).open("a"))
            while not (held := lock_now(file)) and not give_up():
                wait()
            if not held:
                break
        yield held


def changes_to_the_past(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two sweeps and does not only add to the first.

    Ranking may change where it decides nothing: without early stopping, `tpe` and a comparison.
    """
    decides = after["search"] == "tpe" or after["early_stopping"] is not None or before["compare"] is not None
    free = (*_FREE, *(() if decides else ("rank",)))
    before, after = ({key: value for key, value in one.items() if key not in free} for one in (before, after))
    after["seeds"] = _without_added(before["seeds"], after["seeds"])
    if None not in (before["trials"], after["trials"]) and before["trials"] <= after["trials"]:
        after["trials"] = before["trials"]
    if before["compare"] is None or after["compare"] is None:
        after["compare"] = before["compare"] and after["compare"]
    else:
        seeds = _without_added(before["compare"]["seeds"], after["compare"]["seeds"])
        after["compare"] = {**after["compare"], "seeds": seeds, "baseline": before["compare"]["baseline"]}
    for one in (before, after):
        one["variants"] = {variant["name"]: dict(variant) for variant in one["variants"]}
    if before["variants"]:
        after["variants"] = {name: one for name, one in after["variants"].items() if name in before["variants"]}
    spaces = [(before, after), *((one, after["variants"].get(name)) for name, one in before["variants"].items())]
    for old, new in spaces if before["search"] == "grid" else ():
        if new is not None:
            found = {key: _without_added(old["space"].get(key), value) for key, value in new["space"].items()}
            new["space"] = found
    return configuration.differences(before, after)


def _without_added(before: Any, after: Any) -> Any:
    """A list as it was where it has only gained values."""
    gained = isinstance(before, list) and isinstance(after, list) and all(value in after for value in before)
    return before if gained else after


def _saved(file: Path) -> dict[str, Any]:
    """The sweep that a folder holds."""
    found = load_yaml(read_text(file), str(file))
    if not isinstance(found, dict) or not set(Sweep.__dataclass_fields__) <= found.keys():
        raise ConfigurationError(
            f"{file} is damaged, or of another version: restore it from a backup, or choose another name= for the sweep."
        )
    return found


def _plain(sweep: Sweep) -> dict[str, Any]:
    """As YAML and JSON read it back: lists, not tuples."""
    return yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(sweep), default=str))))
