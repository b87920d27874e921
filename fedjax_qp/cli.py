"""The command line: `fedjax-qp new | run | resume | sweep | compare | report | inspect | adapters | answer | …`."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from fedjax_qp import __version__
from fedjax_qp import config as configuration
from fedjax_qp.console.arguments import understood
from fedjax_qp.console.terminal import guarded
from fedjax_qp.files import keep_programs
from fedjax_qp.instruments.settings import Settings, What
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
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
Questions = Annotated[tuple[str, ...], Positional, tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")]
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

MOST_DEVICES = 1024  # that memory is counted for: this host stands in for them all


def run(config: File, overrides: Overrides = (), *, seeds: Seeds = None, several: Joining = ALONE) -> int:
    """Runs a configuration file.

    Args:
      config: YAML file, or @NAME for one that comes with the package, such as @mnist5k.
      overrides: settings to change, such as rounds=20 algorithm.alpha=2 algorithm=fedavg.
      seeds: runs once for each of these seeds, in one program where the data allow it; finished ones are kept.
      several: processes of one run.
    """
    configs = _configs(config, overrides, seeds)
    _check_names(configs[0])
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


def _check_names(config: configuration.Config) -> None:
    """Runs the plug-ins that a configuration names, and looks its names up; loads JAX only where a plug-in does."""
    plugged.load(config.plugins)
    check_names(config)


def resume(run: Run, overrides: Overrides = (), *, plugins: Plugins = (), several: Joining = ALONE) -> int:
    """Continues an interrupted run from its newest checkpoint.

    Args:
      run: the run's folder.
      overrides: settings to change, such as rounds=200.
      plugins: files or modules that the run needs, where those of its configuration have moved or are a stranger's.
      several: processes of one run.
    """
    if plugins:
        named = _load_plugins(plugins)
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


def _load_plugins(names: Sequence[str]) -> tuple[str, ...]:
    """Runs the plug-ins that the command line names, relative to the current folder."""
    found = plugged.located(names, Path())
    plugged.load(found)
    return found


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
    _check_names(configuration.from_dict(loaded.base))
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


def compare(
    runs: Runs,
    *,
    last: int = 10,
    target: Annotated[float | None, UNSET] = None,
    baseline: Annotated[str | None, UNSET] = None,
    output: Path = Path("comparison"),
) -> int:
    """Compares runs: a table and a figure with the spread over seeds.

    Args:
      runs: run folders; runs that differ in nothing but the seed are one method.
      last: number of last evaluations that an accuracy is averaged over.
      target: reports the rounds to reach this accuracy.
      baseline: name of the method that paired differences are taken to.
      output: files are written to this path with the endings .md, .json and .png.
    """
    _check_comparison(runs, last, target)
    from fedjax_qp.reports import compare as comparison
    from fedjax_qp.reports import rendering
    from fedjax_qp.reports.personal import (
        has_personal,
        personal_json,
        personal_markdown,
        personal_summary,
        personal_table,
    )
    from fedjax_qp.reports.plots import plot_comparison

    loaded = comparison.load_runs(list(runs))
    rows = comparison.summary(loaded, last=last, target=target, baseline=baseline)
    console = Console()
    console.print(rendering.table(rows))
    files = {ending: output.with_name(f"{output.name}.{ending}") for ending in ("md", "json", "png")}
    with _writing(output):
        files["md"].write_text(rendering.to_markdown(rows))
        files["json"].write_text(rendering.to_json(rows))
        plot_comparison(loaded, files["png"])
    console.print(f"figure: {files['png']}", markup=False)
    if has_personal(loaded):
        personal = personal_summary(loaded, baseline=baseline)
        console.print(personal_table(personal))
        with _writing(output):
            output.with_name(f"{output.name}-clients.md").write_text(personal_markdown(personal))
            output.with_name(f"{output.name}-clients.json").write_text(personal_json(personal))
    return 0


def _check_comparison(runs: Sequence[Path], last: int, target: float | None) -> None:
    if not runs:
        raise ConfigurationError("no run is named: give one or more run folders, such as runs/mnist5k-seed0.")
    if last < 1:
        raise ConfigurationError(f"--last {last} must be at least 1, the number of evaluations.")
    if target is not None and not 0 < target <= 1:
        raise ConfigurationError(f"--target {target} must be above 0 and at most 1, an accuracy such as 0.9.")


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Makes the folder of a file that a command writes; what goes wrong in writing is one line."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--output {output} cannot be written ({error.strerror or error}): choose another path."
        ) from None


def report(
    runs: Runs,
    *,
    output: Output = None,
    last: int = 10,
    target: Annotated[float | None, UNSET] = None,
    baseline: Annotated[str | None, UNSET] = None,
) -> int:
    """Writes one HTML file that shows a run, or compares several; it opens in any browser without a server.

    Args:
      runs: run folders.
      output: the file; default report.html in the folder of a single run, comparison.html for several.
      last: in a comparison, number of last evaluations that an accuracy is averaged over.
      target: reports the rounds to reach this accuracy.
      baseline: name of the method that paired differences are taken to.
    """
    _check_comparison(runs, last, target)
    from fedjax_qp.reports.html import write_report

    output = output or (RunFolder(runs[0]).report if len(runs) == 1 else Path("comparison.html"))
    with _writing(output):
        write_report(list(runs), output, last=last, target=target, baseline=baseline)
    Console().print(f"report: {output}", markup=False)
    return 0


def inspect(
    runs: Runs,
    *,
    what: Instruments = (),
    plugins: Plugins = (),
    round: Annotated[int | None, UNSET] = None,
    output: Output = None,
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings(),  # noqa: B008 (frozen)
) -> int:
    """Looks at runs' checkpoints: loss surface, sharpness, curvature, conflict, mutations, fairness. Files go to RUN/inspect.

    Args:
      runs: run folders; several are printed side by side.
      what: instruments; default all that fit the method.
      plugins: as in `resume`.
      round: of the checkpoint; default the newest.
      output: writes the table as a CSV file.
      settings: sizes and radii.
    """
    if not runs:
        raise ConfigurationError("no run is named: give one or more run folders, such as runs/mnist5k-seed0.")
    _load_plugins(plugins)
    from fedjax_qp.instruments.inspection import inspect_runs, side_by_side, to_csv

    console = Console()
    found = inspect_runs(list(runs), what=what, round=round, settings=settings, console=console)
    console.print(side_by_side(found))
    if output is not None:
        with _writing(output):
            to_csv(found, output)
    for one in found:
        if one.files:
            console.print(f"numbers and figures: {one.files[0].parent}", markup=False)
    return 0


def adapters(
    run: Run,
    *,
    output: Output = None,
    view: Literal["aggregated", "tuned"] = "aggregated",
    plugins: Plugins = (),
) -> int:
    """Writes every client's adapter of an instruction-tuning run as a PEFT folder.

    Args:
      run: the run's folder.
      output: where the folders go; default `adapters` in the run's folder.
      view: as after the last aggregation, or as the client left its own training.
      plugins: as in `resume`.
    """
    _load_plugins(plugins)
    from fedjax_qp.runs.export import export_clients
    from fedjax_qp.runs.run import restore

    experiment, state = restore(run)
    written = export_clients(experiment, state, output or RunFolder(run).adapters, view)
    Console().print(f"{len(written)} adapters: {written[0].parent}", markup=False)
    return 0


def answer(
    run: Run,
    instructions: Annotated[
        tuple[str, ...], Positional, tyro.conf.arg(metavar="QUESTION [QUESTION ...]", help_behavior_hint="")
    ],
    *,
    client: Annotated[int | None, UNSET] = None,
    view: Literal["aggregated", "tuned"] = "aggregated",
    new_tokens: int = 64,
    plugins: Plugins = (),
) -> int:
    """Prints what a run's model answers to instructions.

    Args:
      run: the run's folder.
      instructions: one or more questions.
      client: whose model; default the server's.
      view: as after the last aggregation, or as the client left its own training.
      new_tokens: longest answer.
      plugins: as in `resume`.
    """
    if not instructions:
        raise ConfigurationError(
            "no question is asked: give one or more instructions in quotes, after the run's folder."
        )
    if new_tokens < 1 or (client is not None and client < 0):
        raise ConfigurationError(f"--new-tokens {new_tokens} must be at least 1, and --client at least 0.")
    _load_plugins(plugins)
    from fedjax_qp.runs.export import answer as answers_of
    from fedjax_qp.runs.export import client_params, language_of
    from fedjax_qp.runs.run import restore

    experiment, state = restore(run)
    params = client_params(experiment, state, client, view)
    template = experiment.config.text.template
    found = answers_of(language_of(experiment), params, instructions, template=template, new_tokens=new_tokens)
    for instruction, text in zip(instructions, found, strict=True):
        Console().print(f"[bold]{escape(instruction)}[/bold]\n{escape(text)}\n")
    return 0


def memory(
    config: File,
    overrides: Overrides = (),
    *,
    clients: Annotated[int | None, UNSET] = None,
    sequences_per_client: int = 1000,
) -> int:
    """Says how many bytes a run of a language model takes on each device; reads neither weights nor data.

    Args:
      config: YAML file; see configs/.
      overrides: settings to change, such as engine.model_devices=8.
      clients: number of clients in the federation; default the cohort.
      sequences_per_client: packed training sequences of each client.
    """
    (loaded,) = _configs(config, overrides, None)
    needed = loaded.engine.asked_devices * loaded.engine.model_devices
    if needed > MOST_DEVICES:
        raise ConfigurationError(
            f"engine.devices × engine.model_devices = {needed} is more than the {MOST_DEVICES} devices that memory is "
            "counted for: choose fewer."
        )
    if "jax" not in sys.modules:  # the mesh is made of host devices, whatever this machine has
        # Nothing is run, so the machine code need not be good; which arrays live when is settled before it is made.
        flags = (f"--xla_force_host_platform_device_count={needed}", "--xla_backend_optimization_level=0")
        os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
        os.environ["JAX_PLATFORMS"] = "cpu"
    _check_names(loaded)
    from fedjax_qp.runs.footprint import measure, memory_table

    clients = loaded.participation.cohort if clients is None else clients
    found = measure(loaded, clients=clients, sequences_per_client=sequences_per_client)
    console = Console()
    console.print(memory_table(loaded, found))
    console.print(
        f"{clients} clients with {sequences_per_client} sequences each; one more takes {found.per_client:,} bytes.\n"
        f"Trainable entries of a client: {found.trainable_entries:,} (before any mask).\n"
        "Temporaries are those of the CPU compiler: on another device only an estimate. "
        f"Compiled in {found.seconds:.0f} s."
    )
    return 0


def list_parts(
    what: Annotated[str, Positional, tyro.conf.arg(metavar="WHAT")] = "all", *, plugins: Plugins = ()
) -> int:
    """Lists algorithms, data sources, partitions and models with their options and defaults; or explains one of them.

    Args:
      what: algorithms, data, partitions, models, all; a name such as fedavg; or a group of settings that belong to none of
        them, such as local, engine or evaluation.
      plugins: files or modules whose parts are listed too.
    """
    _load_plugins(plugins)
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
