"""One run in several processes, on one machine or many: who they are, and what they must agree on.

Every process holds the data, makes the same plans and runs the same program, each on its own devices (`engine.devices` counts
those of all). The first process writes the run's folder and talks; the folder must be visible to all, since they read it to
resume. Whatever may differ between processes and steers the run (a clock, a signal) is decided in common.
"""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from fedjax_qp.console.terminal import take_back
from fedjax_qp.engine.devices import cores_as_devices
from fedjax_qp.registry import ConfigurationError


def join(
    *, cluster: bool = False, coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Connects this process to the others; a process alone only shares out its cores. Comes before JAX touches a device.

    Args:
      cluster: they were started by a cluster, which JAX finds by itself.
      coordinator: else host:port of the first process, or JAX_COORDINATOR_ADDRESS.
      processes: how many there are, or JAX_NUM_PROCESSES.
      process: which one this is, from 0, or JAX_PROCESS_ID.

    Raises:
      ConfigurationError: something is missing or out of range, or JAX finds no cluster.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number = _given(processes, "JAX_NUM_PROCESSES"), _given(process, "JAX_PROCESS_ID")
    if not cluster and coordinator is None:
        if (count, number) != (None, None):
            raise ConfigurationError("several processes need --coordinator HOST:PORT, or --cluster.")
        cores_as_devices()
        return
    if not cluster and (count is None or number is None or not 0 <= number < count):
        raise ConfigurationError(
            f"--processes {count} --process {number} with coordinator {coordinator!r}: give the number of processes, and "
            "which one this is, from 0 to one less; or --cluster."
        )
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ConfigurationError(f"coordinator {coordinator!r} is not of the form HOST:PORT.")
    on_loopback = coordinator is not None and coordinator.rpartition(":")[0] in ("localhost", "127.0.0.1")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            cluster_detection_method=None if cluster else "deactivate",
            coordinator_bind_address=coordinator if on_loopback else None,  # by default it listens to the whole network
        )
    except ValueError as error:
        raise ConfigurationError(
            f"JAX finds no cluster here ({error}): give --coordinator, --processes and --process."
        ) from None
    finally:
        take_back()  # JAX's notice of preemption takes SIGTERM for itself; a run ends in order by its own means


def count() -> int:
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def console() -> Console:
    """A console that is silent except on process 0."""
    return Console(quiet=not first())


def meet(place: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def of_first(value: float) -> float:
    """The first process's number, in all processes."""
    return value if jax.process_count() == 1 else float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def any_of(flag: bool) -> bool:
    """True everywhere if the flag is set on any process."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextlib.contextmanager
def in_common() -> Iterator[None]:
    """What fails here in one process fails in all, so that none waits for one that is gone; all leave together.

    Blocks within each other would be counted wrongly, as would anything inside in which the processes meet.

    Raises:
      ConfigurationError: it failed in another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if any_of(failure is not None):
        raise failure or ConfigurationError("another process of this run could not go on; it says why.")


def _given(option: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if option is not None or text is None:
        return option
    if not text.isdecimal():
        raise ConfigurationError(f"{variable} = {text!r} is not a number.")
    return int(text)
