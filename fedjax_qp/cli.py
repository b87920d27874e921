"""The command line: `fedjax-qp new | run | resume | sweep | compare | report | inspect | adapters | answer | …`."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fedjax_qp import __version__
from fedjax_qp import config as configuration
from fedjax_qp.console.adapting import adapters, answer, memory
from fedjax_qp.console.arguments import understood
from fedjax_qp.console.looking import compare, inspect, report
from fedjax_qp.console.options import (
    ALONE,
    File,
    Joining,
    Overrides,
    Plugins,
    Positional,
    Run,
    Seeds,
    check_config,
    load_plugins,
)
from fedjax_qp.console.terminal import guarded
from fedjax_qp.files import keep_programs
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings import plugins as plugged


def run(config: File, overrides: Overrides = (), *, seeds: Seeds = None, several: Joining = ALONE) -> int:
    """Runs a configuration file.

    Args:
      config: YAML file, or @NAME for one that comes with the package, such as @mnist5k.
      overrides: settings to change, such as rounds=20 algorithm.alpha=2 algorithm=fedavg.
      seeds: runs once for each of these seeds, in one program where the data allow it; finished ones are kept.
      several: processes of one run.
    """
    configs = _configs(config, overrides, seeds)
    check_config(configs[0])
    from fedjax_qp.experiment import check, resolve
    from fedjax_qp.runs import processes
    from fedjax_qp.runs.loop import NonFiniteLoss
    from fedjax_qp.runs.run import run as start
    from fedjax_qp.runs.run import run_all

    processes.join(**asdict(several))
    console = processes.console()
    if seeds is not None and processes.count() > 1:
        raise ConfigurationError("--seeds runs in one process: start a run for each seed, or leave the processes out.")
    for one in configs:  # before its folder is looked at: a typo must not end in advice about what lies there
        check(resolve(one))
    if seeds is None:
        try:
            outcomes = [start(configs[0], console)]
        except NonFiniteLoss as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    else:
        outcomes = run_all(configs, console)
    for outcome in outcomes:
        if outcome.error is not None:
            print(f"error: {outcome.folder}: {outcome.error}", file=sys.stderr)
    if any(outcome.reason == "interrupted" for outcome in outcomes):
        return 130
    return int(any(outcome.reason == "diverged" for outcome in outcomes))


def _configs(file: Path, overrides: Sequence[str], seeds: Sequence[int] | None) -> list[configuration.Config]:
    """One configuration for each seed, read without loading JAX."""
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        raise ConfigurationError(
            f"--seeds {' '.join(map(str, seeds))}: give each seed once, for example --seeds 0 1 2."
        )
    if seeds is not None and any(override.startswith("seed=") for override in overrides):
        raise ConfigurationError("seed=… beside --seeds: leave one of them out.")
    ends = [[]] if seeds is None else [[f"seed={seed}"] for seed in seeds]
    configs = [configuration.load(file, [*overrides, *end]) for end in ends]
    return configs


def resume(run: Run, overrides: Overrides = (), *, plugins: Plugins = (), several: Joining = ALONE) -> int:
    """Continues an interrupted run from its newest checkpoint.

    Args:
      run: the run's folder.
      overrides: settings to change, such as rounds=200.
      plugins: files or modules that the run needs, where those of its configuration have moved or are a stranger's.
      several: processes of one run.
    """
    if plugins:
        named = load_plugins(plugins)
        overrides = (*overrides, f"plugins={json.dumps(named)}")
    RunFolder(run).config(overrides)  # a typo comes before JAX is loaded
    from fedjax_qp.runs import processes
    from fedjax_qp.runs.loop import NonFiniteLoss
    from fedjax_qp.runs.run import resume as go_on

    processes.join(**asdict(several))
    try:
        return 130 if go_on(run, list(overrides)).reason == "interrupted" else 0
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def sweep(config: File, overrides: Overrides = (), *, check: bool = False) -> int:
    """Searches settings: many trials, several seeds each, on all cores or on a Dask cluster. Repeated, it continues.

    Args:
      config: YAML file of the sweep, or @NAME; see fedjax_qp/sweeps/space.py and configs/sweep_mnist_5k.yaml.
      overrides: settings of the sweep (workers=2 trials=40) or of its base configuration (rounds=20) to change.
      check: only checks every trial and counts the runs.
    """
    from fedjax_qp.sweeps.space import load

    loaded = load(config, list(overrides))
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "jax" not in sys.modules:  # this process trains nothing, and must not hold the workers' memory
        os.environ["JAX_PLATFORMS"] = "cpu"
    check_config(configuration.from_dict(loaded.base))
    try:
        from fedjax_qp.sweeps.run import planned_runs, run_sweep
    except ImportError as error:
        raise ConfigurationError(f"sweeps need more packages ({error}): pip install -e '.[sweep]'.") from None

    console = Console()
    if check:
        console.print(planned_runs(loaded))
        return 0
    outcome = run_sweep(loaded, console, platforms=platforms)
    return 130 if outcome.interrupted else int(outcome.failed)


def list_parts(
    what: Annotated[str, Positional, tyro.conf.arg(metavar="WHAT")] = "all", *, plugins: Plugins = ()
) -> int:
    """Lists algorithms, data sources, partitions and models with their options and defaults; or explains one of them.

    Args:
      what: algorithms, data, partitions, models, all; a name such as fedavg; or a group of settings that belong to none of
        them, such as local, engine or evaluation.
      plugins: files or modules whose parts are listed too.
    """
    load_plugins(plugins)
    from fedjax_qp.console.listing import listing

    console = Console()
    for item in listing(what, width=min(console.width, 120)):
        console.print(item, markup=False, highlight=False, soft_wrap=True)
    return 0


def check(
    files: Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="")],
    *,
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME.OPTION=VALUE ...]", help_behavior_hint="")] = (),
) -> int:
    """Checks what files or modules of your own register by the laws that this package's methods, data and models keep.

    Args:
      files: plug-ins, see docs/howto/plugins.md.
      options: values of options, such as slow_average.step_size=0.7; others have their defaults.
    """
    if not files:
        raise ConfigurationError("no file is named: give one that registers something, such as mine.py.")
    from fedjax_qp.console.tables import TextTable
    from fedjax_qp.contract.check import check as checked

    console = Console()
    given = [configuration.parse_override(option) for option in options]
    names = plugged.located(files, Path())
    with console.status("checking"):
        found = list(checked(names, given))
    rows = [[one.part, one.law, "passed" if one.passed else "failed", one.reason or ""] for one in found]
    console.print(TextTable(["part", "law", "", "reason"], rows, words=(3, 0, 1, 2)))
    return int(not all(one.passed for one in found))


def new(name: Annotated[str, Positional, tyro.conf.arg(metavar="NAME")]) -> int:
    """Writes a commented configuration to begin with, NAME.yaml, into the current folder.

    Args:
      name: of the file and of its run.
    """
    from fedjax_qp.settings.presets import write_first

    file = write_first(name)
    Console().print(f"{file}: start it with fedjax-qp run {file}", markup=False, highlight=False)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "new": new,
    "run": run,
    "resume": resume,
    "sweep": sweep,
    "compare": compare,
    "report": report,
    "inspect": inspect,
    "adapters": adapters,
    "answer": answer,
    "memory": memory,
    "list": list_parts,
    "check": check,
}


@guarded()
def main(arguments: list[str] | None = None) -> None:
    """Entry point; configuration errors end with one readable line and status 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"fedjax-qp {__version__}")
        sys.exit(0)
    keep_programs()
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            args=understood(arguments, COMMANDS),
            prog="fedjax-qp",
            description="Simulates federated learning; --version says which one this is.",
            config=(tyro.conf.DisallowNone,),
        )
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
