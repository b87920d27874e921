"""Runs and sweeps started from Python: settings as keyword arguments, one name for each as in a configuration file."""

import contextlib
import dataclasses
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.config import Checkpoints, Config, Engine, Evaluation, Local, Part, Participation, Text, Tracking
from fedjax_qp.library.parts import Arrays
from fedjax_qp.library.progress import Progress
from fedjax_qp.library.results import Runs, load
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings import plugins
from fedjax_qp.settings.values import shown

if TYPE_CHECKING:
    from fedjax_qp.runs.loop import Chunk

PartLike = Part | str | Mapping[str, Any]  # as in YAML, a name alone or a mapping does too


class Settings(TypedDict, total=False):
    """The settings of a run that have defaults, see `config.Config`."""

    plugins: Sequence[str | Path]
    rounds: int
    precision: str
    local: Local
    text: Text
    participation: Participation
    engine: Engine
    evaluation: Evaluation
    checkpoints: Checkpoints
    tracking: Tracking


def run(
    *,
    data: PartLike | Arrays,
    partition: PartLike,
    model: PartLike,
    methods: Mapping[str, PartLike] | Part,
    seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Unpack[Settings],
) -> Runs:
    """Trains every method with every seed, and returns what came of it.

    Runs that differ only in numbers that keep shapes share a program, as on the command line with --seeds; with the same
    settings, seeds and layout (`engine`) the records are the same to the bit. A run that diverges is warned of and does not
    disturb the others. An interrupt finishes the chunk of rounds; what there is by then is returned.

    Args:
      data: `fq.mnist5k()` or another source; or arrays, see `fq.Arrays`.
      partition: which client gets what, such as `fq.dirichlet(clients=20, beta=0.3)`.
      model: such as `fq.mlp()`.
      methods: by the names that tables and figures are to show; or one alone.
      seeds: each method runs once with each.
      folder: where the run folders go, as on the command line, to be continued (by the same call, or `fedjax-qp resume`) and
        kept. Default: a temporary folder, which goes away with the returned object; the records are then in memory only.
      progress: shows how far the runs are, in a notebook or a terminal.
      **settings: `plugins`, `rounds`, `precision` and the groups `local`, `text`, `participation`, `engine`, `evaluation`,
        `checkpoints`, `tracking`, such as `local=fq.Local(learning_rate=0.05)`. Those that are left out have the defaults
        of a configuration file, but nothing is tracked where no folder is named.

    Raises:
      ConfigurationError: a setting is unknown or cannot work; before anything is trained.

    Examples:
      >>> runs = fq.run(
      ...     data=fq.mnist5k(), partition=fq.dirichlet(clients=20, beta=0.3, minimum=5), model=fq.mlp(),
      ...     methods={"FedAvg": fq.fedavg(weighting="uniform"), "FedQP": fq.fedqp(form="nearest", alpha=1.0)},
      ...     local=fq.Local(learning_rate=0.05, momentum=0.0, epochs=1, batch_size=20), rounds=3, seeds=[0, 1],
      ... )
      >>> runs.compare(baseline="FedAvg")
    """
    home = Path(tempfile.mkdtemp(prefix="fedjax_qp-")) if folder is None else Path(folder).expanduser()
    try:
        if folder is None:
            settings.setdefault("tracking", Tracking(tensorboard=False))
        named = {methods.name: methods} if isinstance(methods, Part) else methods
        source = data.write(home) if isinstance(data, Arrays) else data
        parts = {"data": source, "partition": partition, "model": model}
        configs = [
            _config(name=name, seed=seed, folder=str(home), algorithm=method, **parts, **settings)
            for name, method in named.items()
            for seed in _each_once(seeds)
        ]
        if not configs:
            raise ConfigurationError("methods = {} is empty: give one or more, such as {'FedAvg': fq.fedavg()}.")
        return _trained(configs, progress, temporary=home if folder is None else None)
    except BaseException:
        if folder is None:
            shutil.rmtree(home, ignore_errors=True)
        raise


def _trained(configs: Sequence[Config], progress: bool, temporary: Path | None) -> Runs:
    from fedjax_qp.files import keep_programs

    keep_programs()
    from fedjax_qp.runs.run import run_all

    with Progress(configs, shown=progress) as shown:
        outcomes = run_all(configs, Warner(shown.describe), stop=shown.note)
        for place, outcome in enumerate(outcomes):
            shown.note(place, RunFolder(outcome.folder).records(missing_ok=True))
    for outcome, config in zip(outcomes, configs, strict=True):
        if outcome.error is not None:
            warnings.warn(f"{config.name}, seed {config.seed}: {outcome.error}", stacklevel=3)
    begun = [outcome.folder for outcome in outcomes if RunFolder(outcome.folder).has_records()]
    if not begun:
        raise KeyboardInterrupt("no run has begun")
    runs = Runs(begun)
    if temporary is not None:
        weakref.finalize(runs, shutil.rmtree, temporary, ignore_errors=True)
    return runs


def simulate(
    *,
    data: PartLike,
    partition: PartLike,
    model: PartLike,
    method: PartLike,
    seed: int = 0,
    **settings: Unpack[Settings],
) -> "Iterator[Chunk]":
    """Keeps the loop open: hands back the state and the records after each chunk of rounds. Nothing is written.

    Args:
      data: as in `fq.run`, likewise `partition`, `model` and the settings. `fq.Engine(rounds_per_chunk=1)` stops after every
        round.
      method: such as `fq.fedqp(alpha=1)`.

    Yields:
      Chunks with `state` (on the host, see `federated.FederatedState`) and `records` (one for each round).

    Raises:
      ConfigurationError: a setting is unknown or cannot work.
      NonFiniteLoss: training left the finite numbers; the message names the round and the clients.

    Examples:
      >>> parts = {"data": fq.digits(), "partition": fq.iid(clients=10), "model": fq.mlp()}
      >>> for chunk in fq.simulate(**parts, method=fq.fedavg(), rounds=5):
      ...     print(chunk.records[-1]["test_accuracy"])
    """
    config = _config(
        name="simulated",
        seed=seed,
        data=data,
        partition=partition,
        model=model,
        algorithm=method,
        **settings,
    )
    from fedjax_qp.experiment import build
    from fedjax_qp.runs.loop import of_one_run
    from fedjax_qp.runs.loop import simulate as chunks

    return of_one_run(chunks([build(config)]))


def sweep(config: str | Path, *overrides: str) -> Runs:
    """Runs a sweep file, as `fedjax-qp sweep` does: again, it continues.

    Its trials are tasks on Dask, each worker a process that imports the calling script: in a script, call it under
    `if __name__ == "__main__":`.

    Args:
      config: the file, or a preset such as "@sweep_mnist_5k"; see `sweeps.space` for what it holds.
      *overrides: settings of the sweep or of its base, such as "workers=2" or "rounds=20".

    Returns:
      All runs of the sweep that have begun; tables and figures of the sweep are in its own folder.

    Raises:
      ConfigurationError: some trial cannot work; before anything is trained.

    Examples:
      >>> fq.sweep("@sweep_mnist_5k", "workers=2", "rounds=5").frame()
    """
    try:
        from fedjax_qp.sweeps.run import run_sweep
    except ImportError as error:
        raise ConfigurationError(f"sweeps need more packages ({error}): pip install 'fedjax_qp[sweep]'.") from None
    from fedjax_qp.sweeps.space import load as read_sweep

    return load(run_sweep(read_sweep(Path(config), list(overrides)), Warner()).folder)


class Warner(Console):
    """Prints nothing: warnings become Python's own, and what takes its time is passed on."""

    def __init__(self, describe: Callable[[str], None] = lambda phase: None):
        super().__init__(quiet=True)
        self._describe = describe

    @contextlib.contextmanager
    def status(self, status: Any, **_: Any) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Says what is being done while it is."""
        self._describe(str(status))
        yield
        self._describe("")

    def print(self, *objects: Any, **_: Any) -> None:
        """Passes on a line that begins with "warning: "."""
        text = str(objects[0]) if objects else ""
        if text.startswith("warning: "):
            warnings.warn(text.removeprefix("warning: "), stacklevel=2)


def _config(**settings: Any) -> Config:
    config = configuration.from_dict({key: _as_mapping(value) for key, value in settings.items()})
    plugins.load(config.plugins)
    return config


def _as_mapping(value: Any) -> Any:
    """A part or a group of settings as it stands in a configuration file."""
    if isinstance(value, Part):
        return {"name": value.name, **value.options}
    if isinstance(value, Mapping):
        return dict(value)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _each_once(seeds: Sequence[int]) -> list[int]:
    found = list(seeds)
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(f"seeds = {shown(found)}: give each seed once, for example [0, 1, 2].")
    return found
