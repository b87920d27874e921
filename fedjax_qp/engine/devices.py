"""Which devices a run takes: what the engine's settings leave open, and what they must agree on.

Of a CPU every core can be a device: two lanes on two cores then work at their own pace, where operations of one device would
share both cores and wait for each other at each end. Whether that is faster is measured with the lanes (see `runs.autotune`).
"""

import dataclasses
import os

import jax
import psutil

from fedjax_qp.config import Config, Engine
from fedjax_qp.models import models
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


def share_out_cores() -> None:
    """Makes every core a device of its own, unless the environment has said how many there are; before JAX's first use."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", cores())
    except RuntimeError:  # JAX is in use already, with the devices that it has
        return


def settle(config: Config) -> Config:
    """Replaces "auto" where the other settings leave no choice. Still open are one device or all, with lanes: auto."""
    engine, parallel = config.engine, config.engine.parallel
    devices = engine.devices
    if devices == "auto" and jax.process_count() > 1:
        devices = jax.device_count() // engine.model_devices
    elif devices == "auto" and (parallel == "vmap" or engine.lanes != "auto" or engine.model_devices > 1):
        devices = 1
    if parallel == "auto" and devices != "auto":
        parallel = "shard_map" if devices > 1 or jax.process_count() > 1 else "vmap"
    return dataclasses.replace(config, engine=dataclasses.replace(engine, parallel=parallel, devices=devices))


def choices(engine: Engine, clients: int) -> list[int]:
    """Numbers of devices to choose from, for settled settings and the number of clients of a round."""
    if engine.devices != "auto":
        return [engine.devices]
    available = min(jax.device_count(), clients)
    if jax.default_backend() == "cpu":
        available = min(available, cores())
    return [available, 1] if available > 1 else [1]


def check_devices(config: Config) -> None:
    """Checks settled settings of the engine against each other and against the devices there are."""
    engine, available = config.engine, jax.device_count()
    if engine.devices == "auto":
        return
    if engine.devices > available:
        raise ConfigurationError(
            f"engine.devices = {engine.devices}, but {available} {jax.default_backend()} device(s) are visible: choose 1 "
            f"to {available} (host devices: XLA_FLAGS=--xla_force_host_platform_device_count={engine.devices})."
        )
    _check_model_devices(config, available)
    _check_processes(config, available)
    check_lanes(config)


def check_lanes(config: Config) -> None:
    """Checks the numbers of lanes and devices against each other and the cohort, where they are given."""
    engine = config.engine
    devices = 1 if engine.devices == "auto" else engine.devices
    if engine.parallel == "vmap" and devices > 1:
        raise ConfigurationError(
            f"engine.devices = {engine.devices} with engine.parallel = 'vmap', which uses one device: choose shard_map "
            "or pmap."
        )
    if engine.lanes != "auto" and engine.lanes % devices:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} must be a multiple of engine.devices = {engine.devices}: every device takes "
            "the same number of lanes."
        )
    most = -(-config.participation.cohort // devices) * devices
    if engine.lanes != "auto" and engine.lanes > most:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} is more than the {config.participation.cohort} clients of a round: choose 1 "
            f"to {most}."
        )


def _check_processes(config: Config, available: int) -> None:
    """Several processes share one mesh of all their devices."""
    engine, count = config.engine, jax.process_count()
    if count == 1:
        return
    if engine.parallel != "shard_map":
        raise ConfigurationError(
            f"engine.parallel = {engine.parallel!r} with {count} processes: choose shard_map, whose mesh spans them."
        )
    if engine.devices * engine.model_devices != available:
        raise ConfigurationError(
            f"engine.devices = {engine.devices} (and engine.model_devices = {engine.model_devices}) with {count} processes, "
            f"which have {available} devices in all: choose engine.devices = {available // engine.model_devices}."
        )


def _check_model_devices(config: Config, available: int) -> None:
    engine = config.engine
    if engine.model_devices == 1:
        return
    given = f"engine.model_devices = {engine.model_devices}"
    if engine.parallel == "pmap":
        raise ConfigurationError(
            f"{given} with engine.parallel = 'pmap', which knows no second axis of devices: choose shard_map (or vmap with "
            "engine.devices = 1), or 1."
        )
    fitting = models.names(["instructions"])
    if config.model.name not in fitting:
        raise ConfigurationError(
            f"{given}, but model = {config.model.name!r} has no frozen weights to share: choose 1 and raise engine.devices, "
            f"or one of {', '.join(fitting)}."
        )
    needed = engine.lane_devices * engine.model_devices
    if needed > available:
        most = max(1, available // engine.lane_devices)
        raise ConfigurationError(
            f"{given} with engine.devices = {engine.devices} needs {needed} devices, but {available} "
            f"{jax.default_backend()} device(s) are visible: choose 1 to {most} (host devices: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed})."
        )
