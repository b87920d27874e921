"""Small files that are whole at any moment: written beside, on the disk, then put in their place.

A kill or a power cut leaves the old content or the new, never an empty or half a file. `ConfigurationError` says what to do
where a disk is full or may not be written.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json

_PARTIAL = ".partial"


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
