"""The folder of a sweep: what was tried and how each run ended. A kill at any moment loses nothing of it.

    sweep.yaml            the sweep, with the base configuration as it was read
    trials.jsonl          one line a trial, written before its runs start
    runs/trial003-seed0   an ordinary run folder, with `outcome.json` once it has ended for the sweep
    stopped/              one file for each trial that early stopping has given up
    results.*, …          see `results` and `figures`

Runs are executed by workers, perhaps on other machines, that share this folder's file system and nothing else. Only the
sweep itself writes the list of trials; only the worker that holds a run's lock writes into its folder. `attempt` names the
sweep process that owns the folder now: a worker that was left behind by an earlier one sees that at the end of its
chunk, and leaves.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fedjax_qp import config as configuration
from fedjax_qp.files import lock_folder, lock_now, read_mark, write_json, write_whole, writing
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json, load_yaml, read_text
from fedjax_qp.sweeps.search import Point, identity
from fedjax_qp.sweeps.space import Sweep, to_dict

OUTCOME = "outcome.json"
COMPLETE = ("finished", "target reached", "no progress")  # a run that ended so did all it was asked for
# What changes no run: where and how they are computed, and where the files were read from.
_FREE = ("config", "folder", "overrides", "workers", "cluster", "runs_per_task", "retries", "batch")


class Trial(NamedTuple):
    """A point with its number, which names its runs."""

    number: int
    point: Point

    def run_name(self, seed: int) -> str:
        return f"{self.name}-seed{seed}"

    @property
    def name(self) -> str:
        return f"trial{self.number:03d}"


class Ending(NamedTuple):
    """How a run ended for good; an interrupted one has not."""

    status: str  # "complete", "stopped" (early), "diverged" or "failed"
    reason: str
    rounds: int


class Store:
    """A sweep's folder, opened by the one process that owns it; a context manager gives it back."""

    def __init__(self, sweep: Sweep, base: dict[str, Any]):
        """Opens or makes the folder.

        Raises:
          ConfigurationError: another process has it open, or it holds a sweep that this one does not only add to.
        """
        self.folder = sweep.sweep_folder.absolute()
        self.sweep = sweep
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.folder, "sweep.lock", "runs the sweep")
        except OSError as error:
            raise ConfigurationError(
                f"the sweep folder {self.folder} cannot be written ({error.strerror}): choose another with folder=PATH."
            ) from None
        try:
            self._check_and_save(base)
            self.trials = _read_trials(self.folder)
            self.attempt = uuid.uuid4().hex
            write_whole(self.folder / "attempt", self.attempt)
        except BaseException:
            self._lock.close()
            raise

    @property
    def runs_folder(self) -> Path:
        return self.folder / "runs"

    def run_folder(self, trial: Trial, seed: int) -> Path:
        return self.runs_folder / trial.run_name(seed)

    def add(self, points: Sequence[Point]) -> list[Trial]:
        """Adds the points that are new; returns the trials of all of them."""
        known = {identity(trial.point): trial for trial in self.trials}
        new = [point for point in points if identity(point) not in known]
        trials = [Trial(number, point) for number, point in enumerate(new, len(self.trials))]
        _repair(self.folder / "trials.jsonl")
        path = self.folder / "trials.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            for trial in trials:
                file.write(json.dumps({"number": trial.number, **trial.point._asdict()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials += trials
        known |= {identity(trial.point): trial for trial in trials}
        return [known[identity(point)] for point in points]

    def ending(self, trial: Trial, seed: int) -> Ending | None:
        return read_ending(self.run_folder(trial, seed))

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

    def _check_and_save(self, base: dict[str, Any]) -> None:
        file = self.folder / "sweep.yaml"
        values = {**_plain(to_dict(self.sweep)), "base": base}
        if file.exists():
            changes = changes_to_the_past(_saved(file), values)
            if changes:
                raise ConfigurationError(
                    f"{self.folder} holds a sweep with other settings: {'; '.join(changes)}. Its trials would not belong "
                    "together: choose another name=, or undo the change. What only adds (seeds, trials, values of a grid, "
                    "variants) is welcome."
                )
        write_whole(file, yaml.safe_dump(values, sort_keys=False))


def _saved(file: Path) -> dict[str, Any]:
    """The sweep that a folder holds."""
    found = load_yaml(read_text(file), str(file))
    if not isinstance(found, dict) or not {"search", "seeds", "trials", "variants", "space"} <= found.keys():
        raise ConfigurationError(f"{file} is damaged: restore it from a backup, or choose another name= for the sweep.")
    return found


def read_ending(run_folder: Path) -> Ending | None:
    """How a run ended, or None while it has not."""
    found = read_mark(run_folder / OUTCOME)
    if found is None or found.keys() != set(Ending._fields) or type(found["rounds"]) is not int:
        return None  # where it is damaged, the run itself knows how it ended
    return Ending(**found)


def write_ending(run_folder: Path, ending: Ending) -> None:
    """Marks a run as ended for good."""
    run_folder.mkdir(parents=True, exist_ok=True)
    write_json(run_folder / OUTCOME, ending._asdict())


def read_attempt(folder: Path) -> str:
    """Names the sweep process that owns the folder; "" where none does."""
    try:
        return (folder / "attempt").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def stopped_file(folder: Path, trial: str) -> Path:
    return folder / "stopped" / f"{trial}.json"


def stop_trial(folder: Path, trial: str, reason: str, round: int = 0) -> None:
    """Gives a trial up after a round, with all of its seeds."""
    file = stopped_file(folder, trial)
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"reason": reason, "round": round})


def read_stopped(folder: Path, trial: str) -> tuple[str, int] | None:
    """Why a trial was given up and after which round, or None; of a damaged file only that it was."""
    file = stopped_file(folder, trial)
    if not file.exists():
        return None
    found = read_mark(file) or {}
    round = found.get("round")
    return str(found.get("reason", "given up")), round if type(round) is int else 0


@contextlib.contextmanager
def run_locks(folder: Path, names: Sequence[str], give_up: Any, wait: Any) -> Iterator[bool]:
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

    Ranking may change where it decides nothing: without early stopping and without Optuna.
    """
    free = (*_FREE, *(("rank",) if after["search"] != "optuna" and after["early_stopping"] is None else ()))
    before, after = ({key: value for key, value in one.items() if key not in free} for one in (before, after))
    if set(before["seeds"]) <= set(after["seeds"]):
        after["seeds"] = before["seeds"]
    if after["trials"] is not None and before["trials"] is not None and before["trials"] <= after["trials"]:
        after["trials"] = before["trials"]
    of_before, of_after = ({one["name"]: one for one in sweep.pop("variants")} for sweep in (before, after))
    if of_before.keys() <= of_after.keys() and of_before:
        of_after = {name: of_after[name] for name in of_before}
    before |= {"variants": of_before}
    after |= {"variants": of_after}
    if before["search"] == "grid":
        after["space"] = _without_added_values(before["space"], after["space"])
        for name in of_before.keys() & of_after.keys():
            space = _without_added_values(of_before[name]["space"], of_after[name]["space"])
            of_after[name] = {**of_after[name], "space": space}
    return configuration.differences(before, after)


def _without_added_values(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Leaves out of a space the values that its lists have gained."""
    gained = [
        key
        for key, new in after.items()
        if isinstance(new, list) and isinstance(old := before.get(key), list) and all(value in new for value in old)
    ]
    return {key: before[key] if key in gained else value for key, value in after.items()}


def _read_trials(folder: Path) -> list[Trial]:
    file = folder / "trials.jsonl"
    _repair(file)
    lines = read_text(file).splitlines() if file.exists() else []
    return [_trial(line, number, f"{file}, line {number + 1}") for number, line in enumerate(lines)]


def _trial(line: str, number: int, where: str) -> Trial:
    value = load_json(line, where)
    if not isinstance(value, dict) or value.keys() != {"number", *Point._fields} or value["number"] != number:
        raise ConfigurationError(
            f"{where} is not trial {number}: restore the file, or choose another name= for the sweep."
        )
    del value["number"]
    return Trial(number, Point(**value))


def _repair(file: Path) -> None:
    """Cuts off a last line that a kill left unfinished; none of its runs had started."""
    if file.exists() and not (content := file.read_bytes()).endswith(b"\n") and content:
        write_whole(file, content[: content.rfind(b"\n") + 1])


def _plain(values: Any) -> Any:
    """As YAML and JSON read it back: lists, not tuples."""
    return yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(values, default=str))))
