"""Files that one process at a time may hold; the system takes them back when their holder dies."""

import fcntl
from pathlib import Path
from typing import IO

from fedjax_qp.files import writing
from fedjax_qp.registry import ConfigurationError


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
