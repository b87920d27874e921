"""Eight host devices for every test, and quick compilation (the programs are small); set before JAX starts.

Compiled programs are kept in .cache/programs of the checkout, for the two workers, the processes that tests start, and the
next time. JAX_ENABLE_COMPILATION_CACHE=false compiles everything anew.
"""

import os
from pathlib import Path

FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
PROGRAMS = Path(__file__).resolve().parents[1] / ".cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))  # with a bound JAX also locks files while it writes
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Larger data that lies beside a developer's checkout; absent for users."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with CIFAR-10 and the published splits is not here")
    return SHARED


@pytest.fixture
def own_registries(monkeypatch):
    """What a test registers, and which plug-ins it runs, is forgotten after it."""
    from fedjax_qp.experiment import REGISTRIES
    from fedjax_qp.settings import plugins

    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))
    monkeypatch.setattr(plugins, "_loaded", {})


@pytest.fixture(scope="session")
def compilations():
    """A function that counts the programs that XLA has compiled so far."""
    from fedjax_qp.contract.laws import compilations

    return compilations
