"""Named arrays in .npz files: how they are read, and the cache of prepared data."""

import hashlib
import os
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from fedjax_qp.files import cache_folder

# Part of every cache key: raise it when the content of the cached arrays changes.
CACHE_FORMAT = 2


def cached(name: str, fingerprint: str, read: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns `read()`, kept as a file in the cache folder under name and fingerprint."""
    folder = cache_folder()
    file = folder / f"{name}-{hashlib.sha256(f'{CACHE_FORMAT} {name} {fingerprint}'.encode()).hexdigest()[:16]}.npz"
    try:
        stored = read_npz(file)
        return {key: stored[key] for key in stored["keys"].tolist()}  # damage can make a zip lose members
    except OSError:
        pass  # not there yet; where the folder itself is at fault, writing to it says so
    except Exception as error:  # numpy and zipfile raise whatever their parsers meet
        warnings.warn(f"the cache file {file} is damaged ({brief(error)}); it is built again.", stacklevel=2)
    content = read()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            np.savez(f"{unfinished}/{file.name}", keys=np.array(list(content)), **content)  # type: ignore[arg-type]
            os.replace(f"{unfinished}/{file.name}", file)  # readers see the old file or the whole new one
    except OSError as error:
        warnings.warn(f"{name} is not cached in {folder} ({brief(error)}); set FEDJAX_QP_CACHE.", stacklevel=2)
    return content


def read_npz(file: Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream, warnings.catch_warnings():  # numpy would leave a damaged file open
        warnings.simplefilter("ignore")  # of numpy, about old headers
        opened = np.load(stream, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds a single array without a name")
        size, free = sum(item.file_size for item in opened.zip.infolist()), psutil.virtual_memory().available
        if size > free:
            raise ValueError(f"it holds {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of memory are free")
        if len(set(opened.files)) < len(opened.files):  # the last would win
            raise ValueError("it holds two arrays of one name")
        content = {key: opened[key] for key in opened.files}
        for key, value in content.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"{key} is not an array")
        return content


def brief(error: Exception) -> str:
    """What a library says, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")
