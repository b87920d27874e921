"""The devices that there are.

Of a CPU every core can be a device: two lanes on two cores then work at their own pace, where operations of one device would
share both cores and wait for each other at each end. Whether that is faster is measured with the lanes (see `runs.autotune`).
"""

import os

import jax
import psutil

from fedjax_qp.registry import ConfigurationError


def cores() -> int:
    """Processor cores that this process may use; two threads of a core are one.

    PJRT_NPROC, which says how many threads XLA may have (a sweep's workers are given their share), counts too.
    """
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    given = os.environ.get("PJRT_NPROC", str(physical))
    if not given.isdecimal():
        raise ConfigurationError(
            f"PJRT_NPROC = {given[:80]!r} must be a whole number of threads, such as {physical}, or unset."
        )
    return max(1, min(physical, allowed, int(given[:9])))


def cores_as_devices() -> None:
    """Makes every core a device of its own, unless the environment has said how many there are; before JAX's first use."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores())
    except RuntimeError:  # JAX is in use already, with the devices that it has
        return
