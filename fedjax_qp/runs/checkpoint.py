"""Checkpoints of a run: written in the background, whole or not at all, verified before they are read.

Every checkpoint is a folder named after its round:

    <folder>/<round>/state          written by orbax: the leaves of the `FederatedState` by name
    <folder>/<round>/facts.json     accuracy, and the leaves of size zero
    <folder>/<round>/digests.json   of every file: orbax misses some flipped bits
    <folder>.log                    what orbax says of a failure, if there was one

Orbax's own `CheckpointManager` is not used: it refuses to save a round again after a fallback to an older one, and it
holds up its caller twenty times longer than a copy of the state takes.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, Shaped

from fedjax_qp.federated import FederatedState
from fedjax_qp.files import read_mark, sync_folder, write_json
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json

Leaves = dict[str, Shaped[np.ndarray, "..."]]
_PARTIAL, _DISCARDED = ".partial", ".discarded"  # a killed process leaves them behind; the next save removes them


class Checkpoints:
    """The checkpoints of one run in one folder: the newest `keep`, and the one with the best accuracy.

    One process writes a folder; others may read it meanwhile. Under `jax.distributed` all processes make the same calls
    and the first one writes. Use it as a context manager, or call `close()`: a save that is under way when the
    interpreter exits may be lost (the checkpoints before it never are).
    """

    def __init__(self, folder: Path, *, keep: int):
        """Opens `folder`, or creates it; from `keep` = 2 on, damage to the newest checkpoint does not cost the run.

        Raises:
          ConfigurationError: `keep` is below 1, or the folder cannot be written.
        """
        if keep < 1:
            raise ConfigurationError(f"checkpoints: keep = {keep} is not valid: it must be 1 or more.")
        self._folder = Path(folder).absolute()
        self._log = self._folder.with_name(f"{self._folder.name}.log")
        self._keep = keep
        self._pending: concurrent.futures.Future | None = None
        _check_writable(self._folder)
        # Each process works alone: by default orbax makes all processes meet in every call.
        process = jax.process_index()
        options = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
        # All of orbax runs in this thread: the caller pays for the copy only, and orbax cannot collide with the event
        # loop that a notebook runs in the main thread.
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(self, state: FederatedState, *, accuracy: float | None) -> None:
        """Copies the state, whose buffers the caller may then donate; writes it in the background, one save at a time.

        Args:
          state: its round names the checkpoint. A checkpoint of the same round is replaced.
          accuracy: of the model in `state`; None or NaN where it was not evaluated, which never counts as best.

        Raises:
          ConfigurationError: the folder holds intact checkpoints of later rounds, or the save before this one failed.
        """
        self.wait()
        leaves = {name: _host_copy(leaf) for name, leaf in _named(state).items()}
        if jax.process_index() != 0:
            return
        round = int(leaves[".round"])
        # After a fallback to an older checkpoint the damaged ones are still there; `_write` removes them.
        tried = {stored: self._worker.submit(self._read, stored) for stored in self._stored() if stored > round}
        later = [stored for stored, outcome in tried.items() if outcome.exception() is None]
        if later:
            raise ConfigurationError(
                f"cannot save round {round} in {self._folder}: it holds checkpoints of the later rounds {later}. "
                "Resume from those, choose another folder, or delete them."
            )
        accuracy = None if accuracy is None or math.isnan(accuracy) else float(accuracy)
        self._pending = self._worker.submit(self._write, round, leaves, accuracy)

    def restore(self, like: FederatedState, among: Sequence[int] | None = None) -> FederatedState | None:
        """Returns the newest readable state as numpy arrays, bitwise as it was saved; None when there is none at all.

        Warns about each damaged checkpoint that it passes over. Placing the arrays on devices is the caller's part.

        Args:
          like: gives the structure, shapes and dtypes to expect, by arrays or `jax.ShapeDtypeStruct`s.
          among: rounds to choose from; default all that have a checkpoint.

        Raises:
          ConfigurationError: the checkpoint is of another form than `like`, or all checkpoints are damaged.
        """
        return self._first_readable(sorted(self.rounds() if among is None else among, reverse=True), like)

    def restore_best(self, like: FederatedState) -> FederatedState | None:
        """As `restore`, but the most accurate one (of equals the first); None where no checkpoint has an accuracy."""
        # A checkpoint whose accuracy cannot be read is tried first: it might have been the best, so it needs a warning.
        accuracies = self._accuracies(self.rounds(), unreadable=math.inf)
        return self._first_readable(sorted(accuracies, key=lambda round: -accuracies[round]), like)

    def restore_round(self, like: FederatedState, round: int) -> FederatedState:
        """As `restore`, but the checkpoint of one round.

        Raises:
          ConfigurationError: there is none of that round, it is damaged, or of another form than `like`.
        """
        if round not in self.rounds():
            raise ConfigurationError(
                f"{self._folder} has no checkpoint of round {round}: choose one of {self.rounds()}."
            )
        state = self._first_readable([round], like)
        assert state is not None
        return state

    def rounds(self) -> list[int]:
        """Returns the rounds with a checkpoint, oldest first, after waiting for a save that is under way."""
        self.wait()
        return self._stored()

    def discard_after(self, round: int) -> None:
        """Removes the checkpoints of later rounds: the run goes back to `round`."""
        for stored in reversed(self.rounds()):
            if stored > round:
                self._discard(stored)

    def wait(self) -> None:
        """Returns when everything is on disk; raises ConfigurationError if the save that was under way failed."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:  # orbax and tensorstore raise a dozen types; all mean that nothing was saved
            what = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            raise ConfigurationError(
                f"could not save a checkpoint in {self._folder}: {what}. "
                "Check that the folder still exists, is writable and has space left, then resume the run."
            ) from None

    def close(self) -> None:
        """Waits, then frees the background thread; the object cannot be used afterwards."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _stored(self) -> list[int]:
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _accuracies(self, rounds: list[int], *, unreadable: float) -> dict[int, float]:
        """Returns the accuracies of those checkpoints that have one."""
        accuracies = {}
        for round in rounds:
            accuracy = (read_mark(self._folder / str(round) / "facts.json") or {}).get("accuracy", unreadable)
            if accuracy is not None:  # whatever is wrong with it, `_first_readable` is the place that says so
                accuracies[round] = float(accuracy) if isinstance(accuracy, int | float) else unreadable
        return accuracies

    def _write(self, round: int, leaves: Leaves, accuracy: float | None) -> None:
        for path in self._folder.iterdir():
            if path.name.endswith((_PARTIAL, _DISCARDED)):
                shutil.rmtree(path)
        partial = self._folder / f"{round}{_PARTIAL}"
        filled = {name: leaf for name, leaf in leaves.items() if leaf.size}  # orbax has no arrays of size zero
        empty = {name: [leaf.dtype.name, leaf.shape] for name, leaf in leaves.items() if not leaf.size}
        with _logging_to(self._log):
            self._checkpointer.save(partial / "state", args=ocp.args.StandardSave(filled))
        write_json(partial / "facts.json", {"accuracy": accuracy, "empty": empty})
        digests = {path.relative_to(partial).as_posix(): _digest(path) for path in partial.rglob("*") if path.is_file()}
        write_json(partial / "digests.json", digests)
        for stored in self._stored():
            if stored >= round:
                self._discard(stored)
        partial.rename(self._folder / str(round))
        sync_folder(self._folder)
        accuracies = self._accuracies(self._stored(), unreadable=-math.inf)
        best = max(accuracies, key=accuracies.__getitem__, default=None)
        for stored in self._stored()[: -self._keep]:
            if stored != best:
                self._discard(stored)

    def _discard(self, round: int) -> None:
        # Renamed first, so that a kill halfway through the deletion does not leave something like a checkpoint.
        shutil.rmtree((self._folder / str(round)).rename(self._folder / f"{round}{_DISCARDED}"))

    def _read(self, round: int) -> Leaves:
        checkpoint = self._folder / str(round)
        digests = load_json((checkpoint / "digests.json").read_bytes(), "digests.json")
        states = {path.relative_to(checkpoint).as_posix() for path in checkpoint.glob("state/**/*") if path.is_file()}
        if not states or not states | {"facts.json"} <= digests.keys():
            raise ValueError("digests.json does not name the files that are there")
        for name, digest in digests.items():
            if _digest(checkpoint / name) != digest:
                raise ValueError(f"{name} does not match its digest")
        facts = load_json((checkpoint / "facts.json").read_bytes(), "facts.json")
        empty = {name: np.zeros(shape, jnp.dtype(dtype)) for name, (dtype, shape) in facts["empty"].items()}
        with _logging_to(self._log):
            filled = self._checkpointer.restore(checkpoint / "state", args=ocp.args.StandardRestore())
        return {name: np.asarray(leaf) for name, leaf in filled.items()} | empty

    def _first_readable(self, candidates: list[int], like: FederatedState) -> FederatedState | None:
        for round in candidates:
            try:
                leaves = self._worker.submit(self._read, round).result()
            except Exception as error:  # damage shows as any type of error, depending on what it hit
                message = f"the damaged checkpoint of round {round} in {self._folder / str(round)} is passed over"
                warnings.warn(f"{message}: {type(error).__name__}: {error}", UserWarning, stacklevel=3)
            else:
                return _filled(like, leaves, self._folder / str(round))
        if candidates:
            raise ConfigurationError(
                f"every checkpoint in {self._folder} that could be used is damaged (rounds {sorted(candidates)}). "
                "Restore the folder from a backup, or delete it to start over."
            )
        return None


@contextlib.contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Has orbax write its tracebacks to a file: what went wrong comes back as an exception, and is said in one line."""
    handler = logging.FileHandler(file, delay=True)  # no file where there is nothing to say
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # of a full disk the exception tells

    def pass_on(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        with contextlib.suppress(OSError):
            handler.handle(record)
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(pass_on)
    try:
        yield
    finally:
        logger.removeFilter(pass_on)
        with contextlib.suppress(OSError):
            handler.close()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ConfigurationError(
            f"checkpoints cannot be written to {folder}: {error.strerror}. "
            "Choose a folder that you may create and write, or correct its permissions."
        ) from None


def _named(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _host_copy(leaf: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    # A real copy: on the CPU the host's view is the buffer itself, and while it exists JAX cannot donate that buffer.
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, copy=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _filled(like: FederatedState, leaves: Leaves, path: Path) -> FederatedState:
    """Returns the leaves in the structure of `like`; raises ConfigurationError with what differs, if anything does."""
    wanted, found = _forms(_named(like)), _forms(leaves)
    names = [name for name in wanted | found if found.get(name) != wanted.get(name)]
    if names:
        shown = [f"{name} is {found.get(name, 'absent')}, not {wanted.get(name, 'absent')}" for name in names[:6]]
        raise ConfigurationError(
            f"the checkpoint {path} has another form than this run in {len(names)} places: {', '.join(shown)}. "
            "Resume with the model, algorithm and number of clients that it was saved with, or choose another folder."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _forms(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves.items()}
