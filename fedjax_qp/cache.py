"""What need not be made again, in the user's cache folder: prepared data, imported models, compiled programs.

Imports no JAX, so that the command line can set JAX's variables before JAX reads them.
"""

import os
import sys
import warnings
from pathlib import Path

import platformdirs

# JAX's own settings, as variables; a variable that is set already stays as it is.
_PROGRAMS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": 4 * 2**30,  # bytes; beyond, the programs not used for longest are dropped
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.2,  # faster ones are not worth a file
}


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
