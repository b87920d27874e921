"""The folder of one run: the names of its files, and how they are written and read. Nothing else knows them.

Imports no JAX, so that reports can read a run without it. What a file holds is the business of who writes it; here are the
files that make a folder a run's, those that say how it stands, and what must agree among them.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pydantic

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.files import JsonFile, lock_folder, remove_partial
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import record_file
from fedjax_qp.runs.record_file import Recorder
from fedjax_qp.runs.times import Times
from fedjax_qp.settings import strict
from fedjax_qp.settings.values import shown
from fedjax_qp.watch import Watch

if TYPE_CHECKING:
    from fedjax_qp.runs.checkpoint import Checkpoints

_WATCHES = pydantic.TypeAdapter(tuple[Watch, ...])
_KINDS = {"name": str, "seed": int, "rounds": int}  # of settings that every reader of a configuration needs


class SharedProgram(pydantic.BaseModel, strict=True):
    """A run's place among those of one program; a run alone has a program of its own."""

    id: str
    runs: pydantic.PositiveInt
    place: pydantic.NonNegativeInt


class RunFolder:
    """A run's folder, which need not exist yet; making this object reads nothing.

    Examples:
      >>> RunFolder("runs/mine-seed0").records()[-1]["test_accuracy"]
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        # From the beginning. The configuration is written last: its presence marks a run.
        self.config_file = path / "config.yaml"
        self.partition_figure = path / "partition.png"
        self.environment = JsonFile(path / "environment.json")  # what it is computed with
        self.provenance = JsonFile(path / "provenance.json")  # digests of what it is made of
        self.watched = JsonFile(path / "watched.json")
        self.layout = JsonFile(
            path / "layout.json"
        )  # lanes and devices, and the program that it shares with other runs
        self.plugins = path / "plugins"  # copies of those that it needs
        # While it goes on.
        self.records_file = path / "records.jsonl"
        self.times = Times(path / "times.jsonl")
        self.startup = JsonFile(path / "startup.json")  # how long until the first round
        self.trackers = JsonFile(path / "tracking.json")  # what each tracker has
        self.tensorboard = path / "tensorboard"
        self.checkpoints_folder = path / "checkpoints"
        self._lock = "run.lock"
        # Once it goes no further.
        self.failure = JsonFile(path / "failure.json")  # it diverged
        self.end = JsonFile(path / "ended.json")  # why, and after which round
        self.figure = path / "run.png"
        # What commands leave in it.
        self.report = path / "report.html"
        self.inspections = path / "inspect"
        self.adapters = path / "adapters"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def within(cls, place: Path) -> "Iterator[RunFolder]":
        """The folders with records at any depth of a folder, by name; of a run's folder that one alone."""
        own = cls(place)
        if own.has_records():
            yield own
            return
        for file in sorted(place.rglob(own.records_file.name)):
            yield cls(file.parent)

    def make(self) -> None:
        """Creates the folder.

        Raises:
          ConfigurationError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ConfigurationError(
                f"the run folder {self} cannot be written ({error.strerror}): choose another one with folder=PATH."
            ) from None

    def lock(self) -> IO[str]:
        """Keeps other processes from writing to the run until the result, a context manager, is closed.

        Raises:
          ConfigurationError: another process continues the run.
        """
        held = lock_folder(self.path, self._lock, "continues the run")
        remove_partial(self.path)
        return held

    # --- configuration ------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return self.config_file.is_file()

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The run's configuration, see `config.load`.

        Raises:
          ConfigurationError: there is no run, or a setting is unknown or out of range.
        """
        self._check_run()
        return configuration.load(self.config_file, list(overrides))

    def raw_config(self) -> dict[str, Any]:
        """The configuration as it stands there, parts in their long form.

        Only what is needed to tell runs apart is checked: names that an earlier version had may be gone.

        Raises:
          ConfigurationError: there is no run, or the file is not the configuration of one.
        """
        self._check_run()
        values = strict.load_yaml(strict.read_text(self.config_file), str(self.config_file))
        if not isinstance(values, dict) or "name" not in values:
            raise ConfigurationError(f"{self.config_file} is not the configuration of a run: it has no name.")
        for part in configuration.PARTS:
            if isinstance(values.get(part), str):
                values[part] = {"name": values[part]}
        wrong = [key for key, kind in _KINDS.items() if key in values and type(values[key]) is not kind]
        wrong += [part for part in configuration.PARTS if part in values and not _is_part(values[part])]
        if wrong or not _has_names(values):
            what = f"{wrong[0]} = {shown(values[wrong[0]])}" if wrong else "keys that are no text"
            raise ConfigurationError(
                f"{self.config_file} is not the configuration of a run: it has {what}. Restore the file."
            )
        return values

    def save_config(self, config: Config) -> None:
        """Writes the configuration; from then on the folder holds a run."""
        configuration.save(config, self.config_file)

    def _check_run(self) -> None:
        if not self.holds_run():
            raise ConfigurationError(
                f"{self} holds no run (no {self.config_file.name}): give the folder of one run, or start one with "
                "`fedjax-qp run CONFIG`."
            )

    # --- records and checkpoints --------------------------------------------------------------------------------------

    def has_records(self) -> bool:
        """Whether the run has come to its first round, or begun it."""
        return self.records_file.is_file()

    def records(self, *, missing_ok: bool = False) -> list[dict]:
        """The records so far, see `records`; a last line that was cut off when the run was killed is left out.

        Args:
          missing_ok: gives none where there is no file of records.

        Raises:
          ConfigurationError: there is no such file, or a line is damaged.
        """
        return [] if missing_ok and not self.has_records() else record_file.read(self.records_file)

    def recorder(self, resume_round: int | None = None) -> Recorder:
        """Opens the records to append to, see `record_file.Recorder`."""
        return Recorder(self.records_file, resume_round=resume_round)

    def checkpoints(self, *, keep: int = 1) -> "Checkpoints":
        """Opens the checkpoints, see `checkpoint.Checkpoints`; `keep` matters only to who saves."""
        from fedjax_qp.runs.checkpoint import Checkpoints  # loads JAX and orbax

        return Checkpoints(self.checkpoints_folder, keep=keep)

    def saved_rounds(self) -> list[int]:
        """The rounds that have a checkpoint, oldest first; whether it is sound shows when it is read."""
        if not self.checkpoints_folder.is_dir():
            return []
        found = [path for path in self.checkpoints_folder.iterdir() if path.name.isdecimal() and path.is_dir()]
        return sorted(int(path.name) for path in found)

    def missing_records(self, records: Sequence[dict]) -> str | None:
        """Says what the folder should hold of records and does not; None where they are complete.

        They are on the disk before a checkpoint is saved, so they reach at least as far as its newest one.
        """
        reached = max([*self.saved_rounds(), *(record["round"] for record in records)], default=0)
        return record_file.gap(records, reached)

    def restorable(self) -> list[int]:
        """The rounds of the checkpoints that the run can go on from, the newest first; none where it begins with round 1.

        Records are on the disk before a checkpoint is saved, so those of every checkpoint's rounds must be there.

        Raises:
          ConfigurationError: the run has checkpoints, but its records do not reach to any of them; or the other way about.
        """
        lines = self.records(missing_ok=True)
        stored = self.saved_rounds()[::-1]
        covered = [round for round in stored if _gap_before(lines, round) is None]
        if stored and not covered:
            raise ConfigurationError(
                f"{self.records_file} is not complete ({_gap_before(lines, stored[0])}): restore the file from a backup, or "
                f"delete {self} to compute every round again."
            )
        # The first checkpoint may still be under way when the second is due, and no later; the last one comes after the mark
        # of the run's end, which therefore says nothing of it. What counts are the settings that the records were made with.
        made_with = self.config()
        unsaved = 2 * made_with.checkpoints.every_chunks * made_with.engine.rounds_per_chunk
        if not stored and lines and lines[-1]["round"] > unsaved:
            raise ConfigurationError(
                f"{self} has records of {lines[-1]['round']} rounds, but no checkpoint: restore {self.checkpoints_folder} "
                "from a backup, or delete the run's folder to compute every round again."
            )
        return covered

    # --- marks --------------------------------------------------------------------------------------------------------

    def ended(self) -> tuple[str, int] | None:
        """Why the run goes no further and after which round; None while it does, and where its last state was never saved."""
        found = self.end.read() or {}
        reason, round = found.get("reason"), found.get("round")
        if not isinstance(reason, str) or type(round) is not int:
            return None
        return (reason, round) if reason == "diverged" or round in self.saved_rounds() else None

    def mark_end(self, reason: str, round: int) -> None:
        """Notes why the run goes no further, and after which round."""
        self.end.write({"reason": reason, "round": round})

    def diverged(self) -> bool:
        """Whether training left the finite numbers."""
        return self.failure.exists()

    def mark_failure(self, message: str) -> None:
        """Notes that the run diverged, so that a sweep can tell it from an interruption."""
        self.failure.write({"reason": "non-finite loss", "message": message})

    def clear_marks(self) -> None:
        """Forgets how the run ended: it goes on."""
        self.failure.remove()
        self.end.remove()

    def program(self) -> "SharedProgram | None":
        """The program that the run was last in; None where none is noted, or the note is damaged."""
        try:
            return SharedProgram.model_validate((self.layout.read() or {}).get("program"))
        except pydantic.ValidationError:
            return None

    def watches(self) -> tuple[Watch, ...]:
        """What is watched of the run; nothing where an earlier version wrote the folder, or the file is damaged."""
        try:
            return _WATCHES.validate_python((self.watched.read() or {}).get("watched", ()))
        except pydantic.ValidationError:
            return ()

    def save_watches(self, watches: Iterable[Watch]) -> None:
        """Keeps what is watched of the run, since a report does not build the method."""
        self.watched.write({"watched": [watch._asdict() for watch in watches]})


def _gap_before(lines: Sequence[dict], round: int) -> str | None:
    """What the records up to a round lack."""
    return record_file.gap([line for line in lines if line["round"] <= round], round)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _has_names(value: Any) -> bool:
    """Whether all keys are text, also of inner mappings."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_has_names, value.values()))
    return not isinstance(value, list) or all(map(_has_names, value))
