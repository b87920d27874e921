"""What a run was computed with: versions, device and commit."""

import os
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax

from fedjax_qp import config as configuration


def environment() -> dict[str, object]:
    """Versions, device and commit, for the run folder."""
    packages = ("fedjax_qp", "jax", "jaxlib", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy")
    optional = [name for name in ("transformers", "tokenizers") if find_spec(name) is not None]
    return {
        "packages": {name: version(name) for name in (*packages, *optional)},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, marked when it has local changes."""
    here = Path(configuration.__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
