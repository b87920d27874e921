"""How a run's work lies on devices: a value, chosen once, after the settings are checked and the data are there.

The settings say what the user wants, with "auto" where that is left open; `open_layouts` gives what they leave to choose
from, and `runs.autotune` measures where that is more than one. A layout moves no result beyond rounding.
"""

from typing import NamedTuple

import jax

from fedjax_qp.config import Config, Engine
from fedjax_qp.engine.devices import cores
from fedjax_qp.models import models
from fedjax_qp.registry import ConfigurationError


class Layout(NamedTuple):
    """Lanes, and the devices that share them."""

    lanes: int  # on all devices; a multiple of `devices`
    devices: int = 1  # that split the lanes
    model_devices: int = 1  # that share the frozen weights of each group of lanes
    parallel: str = "vmap"  # one device; or shard_map or pmap over several

    def __str__(self) -> str:
        return f"{self.lanes}" if self.devices == 1 else f"{self.lanes} on {self.devices} devices"


def open_layouts(settings: Engine, clients: int) -> list[list[Layout]]:
    """The layouts that the settings leave open: a list for each number of devices, each by lanes, upwards.

    Args:
      clients: of a round; of all runs that share the lanes.
    """
    return [
        [_layout(settings, lanes, devices) for lanes in _numbers_of_lanes(settings, clients, devices)]
        for devices in _numbers_of_devices(settings, clients)
    ]


def fewest_lanes(settings: Engine) -> Layout:
    """The smallest layout that the settings allow, whatever devices there are."""
    devices = settings.asked_devices
    return _layout(settings, devices if settings.lanes == "auto" else settings.lanes, devices)


def most_lanes(settings: Engine, clients: int) -> Layout:
    """The layout with the most lanes that the settings allow, on the devices that they name, or one."""
    fewest = fewest_lanes(settings)
    most = -(-clients // fewest.devices) * fewest.devices
    return fewest._replace(lanes=most) if settings.lanes == "auto" else fewest


def candidates(clients: int, devices: int) -> list[int]:
    """1, 2, 3, 5, 10, 20, … up to the clients of a round, and one for each, as multiples of the number of devices."""
    numbers = {base * 10**power for base in (1, 2, 3, 5) for power in range(5)} | {clients}
    return sorted({-(-number // devices) * devices for number in numbers if number <= clients})


def _layout(settings: Engine, lanes: int, devices: int) -> Layout:
    parallel = settings.parallel
    if parallel == "auto":
        parallel = "shard_map" if devices > 1 or jax.process_count() > 1 else "vmap"
    return Layout(lanes, devices, settings.model_devices, parallel)


def _numbers_of_lanes(settings: Engine, clients: int, devices: int) -> list[int]:
    return candidates(clients, devices) if settings.lanes == "auto" else [settings.lanes]


def _numbers_of_devices(settings: Engine, clients: int) -> list[int]:
    """One, where the settings name it or leave no choice; otherwise all devices, or one."""
    if settings.devices != "auto":
        return [settings.devices]
    if jax.process_count() > 1:
        return [jax.device_count() // settings.model_devices]
    if settings.parallel == "vmap" or settings.lanes != "auto" or settings.model_devices > 1:
        return [1]
    available = min(jax.device_count(), clients)
    if jax.default_backend() == "cpu":
        available = min(available, cores())
    return [available, 1] if available > 1 else [1]


def check_layout(config: Config) -> None:
    """Checks the settings of the engine against each other and against the devices there are.

    Raises:
      ConfigurationError: names the value, the allowed range and the remedy.
    """
    engine, available = config.engine, jax.device_count()
    numbers = _numbers_of_devices(engine, config.participation.cohort)
    if len(numbers) > 1:
        return
    layout = _layout(engine, fewest_lanes(engine).lanes, numbers[0])
    if layout.devices > available:
        raise ConfigurationError(
            f"engine.devices = {layout.devices}, but {available} {jax.default_backend()} device(s) are visible: choose 1 "
            f"to {available} (host devices: XLA_FLAGS=--xla_force_host_platform_device_count={layout.devices})."
        )
    _check_model_devices(config, layout, available)
    _check_processes(layout, available)
    check_lanes(config, layout.devices)


def check_lanes(config: Config, devices: int | None = None) -> None:
    """Checks the numbers of lanes and devices against each other and the cohort, where they are given.

    Args:
      devices: where their number is known already.
    """
    engine = config.engine
    devices = devices or engine.asked_devices
    if engine.parallel == "vmap" and devices > 1:
        raise ConfigurationError(
            f"engine.devices = {devices} with engine.parallel = 'vmap', which uses one device: choose shard_map or pmap."
        )
    if engine.lanes == "auto":
        return
    if engine.lanes % devices:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} must be a multiple of engine.devices = {devices}: every device takes "
            "the same number of lanes."
        )
    most = -(-config.participation.cohort // devices) * devices
    if engine.lanes > most:
        raise ConfigurationError(
            f"engine.lanes = {engine.lanes} is more than the {config.participation.cohort} clients of a round: choose 1 "
            f"to {most}."
        )


def _check_processes(layout: Layout, available: int) -> None:
    """Several processes share one mesh of all their devices."""
    count = jax.process_count()
    if count == 1:
        return
    if layout.parallel != "shard_map":
        raise ConfigurationError(
            f"engine.parallel = {layout.parallel!r} with {count} processes: choose shard_map, whose mesh spans them."
        )
    if layout.devices * layout.model_devices != available:
        raise ConfigurationError(
            f"engine.devices = {layout.devices} (and engine.model_devices = {layout.model_devices}) with {count} processes, "
            f"which have {available} devices in all: choose engine.devices = {available // layout.model_devices}."
        )


def _check_model_devices(config: Config, layout: Layout, available: int) -> None:
    if layout.model_devices == 1:
        return
    given = f"engine.model_devices = {layout.model_devices}"
    if layout.parallel == "pmap":
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
    needed = layout.devices * layout.model_devices
    if needed > available:
        most = max(1, available // layout.devices)
        raise ConfigurationError(
            f"{given} with engine.devices = {layout.devices} needs {needed} devices, but {available} "
            f"{jax.default_backend()} device(s) are visible: choose 1 to {most} (host devices: "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed})."
        )
