"""What commands take, as help calls it, and what they do with it before anything else."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fedjax_qp import config as configuration
from fedjax_qp.instruments.settings import What
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings import plugins as plugged
from fedjax_qp.settings.catalogue import check_names

# What help calls them. Their defaults are said in words where they are no values.
Positional = tyro.conf.Positional
UNSET = tyro.conf.arg(help_behavior_hint="")
File = Annotated[Path, Positional, tyro.conf.arg(metavar="CONFIG")]
Overrides = Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]", help_behavior_hint="")]
Run = Annotated[Path, Positional, tyro.conf.arg(metavar="RUN")]
Runs = Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
Seeds = Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="SEED [SEED ...]", help_behavior_hint="")]
Questions = Annotated[
    tuple[str, ...], Positional, tyro.conf.arg(metavar="QUESTION [QUESTION ...]", help_behavior_hint="")
]
Instruments = Annotated[tuple[What, ...], UNSET]
Output = Annotated[Path | None, UNSET]
Plugins = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="")]


@dataclass(frozen=True)
class Processes:
    """One run in several processes; each gets the same command. The run's folder must be visible to all.

    Args:
      cluster: join the processes that Slurm, Open MPI, Kubernetes or a TPU pod has started, as JAX finds them.
      coordinator: else host:port of the first process; or JAX_COORDINATOR_ADDRESS.
      processes: how many there are; or JAX_NUM_PROCESSES.
      process: which one this is, from 0; or JAX_PROCESS_ID.
    """

    cluster: bool = False
    coordinator: Annotated[str | None, UNSET] = None
    processes: Annotated[int | None, UNSET] = None
    process: Annotated[int | None, UNSET] = None


Joining = Annotated[
    Processes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.arg(name="processes", help="one run in several processes, each started by this same command"),
]
ALONE = Processes()


def check_config(config: configuration.Config) -> None:
    """Runs the plug-ins that a configuration names, and looks its names up; loads JAX only where a plug-in does."""
    plugged.load(config.plugins)
    check_names(config)


def load_plugins(names: Sequence[str]) -> tuple[str, ...]:
    """Runs the plug-ins that the command line names, relative to the current folder."""
    found = plugged.located(names, Path())
    plugged.load(found)
    return found


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Makes the folder of a file that a command writes; what goes wrong in writing is one line."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--output {output} cannot be written ({error.strerror or error}): choose another path."
        ) from None
