"""Eight host devices for every test, and quick compilation (the programs are small); set before JAX starts."""

import os

FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Larger data that lies beside a developer's checkout; absent for users."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with CIFAR-10 and the published splits is not here")
    return SHARED


@pytest.fixture(scope="session")
def compilations():
    """A function that counts the programs that XLA has compiled so far."""
    import jax

    seen: list[str] = []

    def note(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: len(seen)
