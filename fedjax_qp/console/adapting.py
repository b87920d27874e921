"""The commands for language models: adapters, answer, memory."""

import os
import sys
from typing import Annotated, Literal

from rich.console import Console
from rich.markup import escape

from fedjax_qp import config as configuration
from fedjax_qp.console.options import (
    UNSET,
    File,
    Output,
    Overrides,
    Plugins,
    Questions,
    Run,
    check_config,
    load_plugins,
)
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder

MOST_DEVICES = 1024  # that memory is counted for: this host stands in for them all


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
    load_plugins(plugins)
    from fedjax_qp.runs.export import export_clients
    from fedjax_qp.runs.run import restore

    experiment, state = restore(run)
    written = export_clients(experiment, state, output or RunFolder(run).adapters, view)
    Console().print(f"{len(written)} adapters: {written[0].parent}", markup=False)
    return 0


def answer(
    run: Run,
    instructions: Questions,
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
    load_plugins(plugins)
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
    loaded = configuration.load(config, list(overrides))
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
    check_config(loaded)
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
