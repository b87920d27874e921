"""Files: small ones that are whole at any moment, locks, and the user's cache folder.

A file is written beside its place, brought to the disk, then put there: a kill or a power cut leaves the old content or the
new one, never an empty or half a file. Where a disk is full or may not be written, `ConfigurationError` says what to do.
Nothing here imports JAX, so that the command line can set JAX's variables before JAX reads them.
"""

import contextlib
import fcntl
import json
import os
import sys
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import platformdirs

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json

_PARTIAL = ".partial"
# JAX's own settings, as variables; a variable that is set already stays as it is.
_PROGRAMS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": 4 * 2**30,  # bytes; beyond, the programs not used for longest are dropped
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.2,  # faster ones are not worth a file
}


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes or replaces a file; it is on the disk when this returns.

    Args:
      durable: false spares the wait for the disk: after a power cut the file may be the old one, or damaged.

    Raises:
      ConfigurationError: the disk is full, or the folder cannot be written.
    """
    # Several processes may write one file, each beside it under a name of its own.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """As `write_whole`, of a plain value."""
    write_whole(path, json.dumps(value, indent=2) + "\n", durable=durable)


def read_mark(path: Path) -> dict[str, Any] | None:
    """Reads a small JSON file of this package's; one that is absent or damaged counts as none."""
    with contextlib.suppress(OSError, ConfigurationError):
        found = load_json(path.read_bytes(), str(path))
        return found if isinstance(found, dict) else None
    return None


class JsonFile(NamedTuple):
    """A small JSON file of this package's."""

    path: Path

    def read(self) -> dict[str, Any] | None:
        """See `read_mark`."""
        return read_mark(self.path)

    def write(self, value: Any, *, durable: bool = True) -> None:
        """See `write_json`."""
        write_json(self.path, value, durable=durable)

    def exists(self) -> bool:
        """Whether it is there, damaged or not."""
        return self.path.is_file()

    def remove(self) -> None:
        """Removes it if it is there."""
        self.path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Has the disk keep a folder's list of names, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left half-written; for whoever holds the folder's lock."""
    for path in folder.glob(f"*{_PARTIAL}"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says of a file that cannot be written into one line.

    Raises:
      ConfigurationError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror or error}): free some space on the disk of {path.parent}, or see "
            "that you may write there, then give the same command again, or `fedjax-qp resume` for a run that has begun."
        ) from None


def lock_now(file: IO[str]) -> bool:
    """Takes an open file's lock unless somebody holds it; closing the file gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_folder(folder: Path, name: str, what: str) -> IO[str]:
    """Opens and locks a file in a folder.

    Args:
      what: what the other process would be doing, for the message.

    Raises:
      ConfigurationError: another process holds it, or the folder cannot be written.
    """
    with writing(folder / name):
        file = (folder / name).open("a")
    if not lock_now(file):
        file.close()
        raise ConfigurationError(f"another process {what} in {folder}: wait for it, or end it.")
    return file


def cache_folder() -> Path:
    """FEDJAX_QP_CACHE, or the platform's place for a user's caches (~/.cache/fedjax_qp on Linux)."""
    own = os.environ.get("FEDJAX_QP_CACHE")
    return Path(os.path.expanduser(own)) if own else platformdirs.user_cache_path("fedjax_qp", appauthor=False)


def keep_programs() -> None:
    """Has JAX keep compiled programs from one process to the next, so that a second run of a shape starts in seconds.

    For entry points only (the command line, scripts): it is the one place of this package that sets options of JAX's. Where
    JAX_COMPILATION_CACHE_DIR (another folder) or JAX_ENABLE_COMPILATION_CACHE (false = none) is set, it leaves all to those.
    """
    if os.environ.keys() & {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"}:
        return
    folder = cache_folder() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(
            f"programs are compiled anew: {folder} cannot be written ({error}); set FEDJAX_QP_CACHE.", stacklevel=2
        )
        return
    for name, value in {"JAX_COMPILATION_CACHE_DIR": str(folder), **_PROGRAMS}.items():
        if name not in os.environ:
            os.environ[name] = str(value)  # also for processes that this one starts
            if "jax" in sys.modules:  # it has read its variables
                sys.modules["jax"].config.update(name.lower(), value)
