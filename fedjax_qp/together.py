"""Several runs in one program: what a sweep's many small runs need to fill a device, and to be compiled once.

Runs can share a program where their arrays have the same shapes and their arithmetic is the same but for some numbers. Such
are seeds, learning rates, the methods' float options (α, τ, μ, …), epochs, dropouts, a partition's concentration. A lane
then trains a client of any of the runs, and uploads are summed by run (`engine`). Each run keeps a folder of its own with its
own records and checkpoints, so it may be continued alone, and a run alone may be continued together with others.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.checkpoint import Checkpoints
from fedjax_qp.config import Config
from fedjax_qp.experiment import (
    Experiment,
    build,
    differing_settings,
    first_state,
    of_language_model,
    resolve,
    traced_settings,
    with_layout,
)
from fedjax_qp.federated import FederatedState
from fedjax_qp.lanes import choose_layout
from fedjax_qp.records import ENDED
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.run import Outcome, continue_runs
from fedjax_qp.run_folder import begin_folder, lock_run, make_folder
from fedjax_qp.startup import Startup
from fedjax_qp.trackers import check_trackers

Stop = Callable[[int, list[dict]], str | None]
SHARED = "together.json"  # in the folder of a run that shares its program: how

# Settings that reach only the plan, the records or the files of a run.
_FREE = (
    *("name", "folder", "local.epochs", "local.maximum_steps"),
    *("participation.dropout", "participation.stragglers", "participation.straggler_work"),
    *("evaluation.target_accuracy", "evaluation.stop_at_target", "evaluation.patience"),
    *("checkpoints.every_chunks", "checkpoints.keep"),
)


_MEASURED = ("engine.lanes:", "engine.devices:", "engine.parallel:")  # by each run itself, where they are auto


def groups(configs: Sequence[Config]) -> list[list[int]]:
    """Positions of the configurations that can share a program, in order; reads no data.

    Raises:
      ConfigurationError: an option is unknown or ill-typed.
    """
    found: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        resolved = resolve(config)
        alone = resolved.engine.client_store == "host"  # ships the rows of one run
        key = json.dumps([_fixed_settings(resolved), index if alone else None], sort_keys=True)
        found.setdefault(key, []).append(index)
    return list(found.values())


def _fixed_settings(config: Config) -> dict:
    """What must be the same in runs that share a program: their clients' own tests, for one, and all that these depend on.

    Language tasks also cut other sequences from another seed's split.
    """
    flat = configuration.flat(configuration.to_dict(config) | {"tracking": "free"})
    free = {*_FREE, *traced_settings(config)}
    if not of_language_model(config) and config.partition.options["test"] == "common":
        floats = {name for name, value in flat.items() if name.startswith("partition.") and isinstance(value, float)}
        free |= {"seed", *floats}
    return {name: "free" if name in free else value for name, value in flat.items()}


def run_together(
    configs: Sequence[Config], console: Console | None = None, *, stop: Stop = lambda run, history: None
) -> list[Outcome]:
    """Runs each configuration in its folder: starts it, continues it from its checkpoint, or keeps it if it has ended.

    Those that can share a program do; where a method turns out not to trace with its options as arrays, they run one after
    another.

    Args:
      stop: `(position, records so far) -> reason` to end a run early, or None; asked at the ends of chunks.

    Returns:
      How each run ended. A run that diverged is among them (reason "diverged") and does not disturb the others. After an
      interruption the runs that never began have the reason "interrupted" too.

    Raises:
      ConfigurationError: a configuration cannot work, two runs have the same folder, or a folder holds another run.
    """
    console, configs = console or Console(), [resolve(config) for config in configs]
    _check_folders(configs)
    for config in configs:
        check_trackers(config)
    outcomes = {index: ended for index, config in enumerate(configs) if (ended := _ended(config)) is not None}
    for group in groups(configs):
        waiting = [index for index in group if index not in outcomes]
        if _interrupted(outcomes.values()):
            outcomes |= {index: Outcome(configs[index].run_folder, 0, "interrupted") for index in waiting}
        elif waiting:
            found = _run_group([configs[index] for index in waiting], console, _chosen(stop, waiting))
            outcomes |= dict(zip(waiting, found, strict=True))
    return [outcomes[index] for index in range(len(configs))]


def _chosen(stop: Stop, positions: Sequence[int]) -> Stop:
    return lambda run, history: stop(positions[run], history)


def _run_group(configs: Sequence[Config], console: Console, stop: Stop) -> list[Outcome]:
    """Runs that can share a program do, if they have finished equally many rounds."""
    experiments: list[Experiment] = []
    startup = Startup()
    for config in configs:
        experiments.append(build(config, experiments[0] if experiments else None))
    states = [_begin(experiment) for experiment in experiments]
    startup.done("data")
    rounds = [int(state.round) for state in states]
    levels = [[run for run, done in enumerate(rounds) if done == level] for level in sorted(set(rounds))]
    outcomes = _one_after_another(experiments, states, levels, console, startup, stop)
    return [outcomes[run] for run in range(len(configs))]


def _one_after_another(
    experiments: Sequence[Experiment],
    states: Sequence[FederatedState],
    levels: Sequence[list[int]],
    console: Console,
    startup: Startup,
    stop: Stop,
) -> dict[int, Outcome]:
    """How each run of the levels ended, by position; after an interruption no further level begins."""
    outcomes: dict[int, Outcome] = {}
    for level in levels:
        if _interrupted(outcomes.values()):
            found = [
                Outcome(experiments[run].config.run_folder, int(states[run].round), "interrupted") for run in level
            ]
        else:
            found = _run_level(experiments, states, level, console, startup, stop)
        outcomes |= dict(zip(level, found, strict=True))
        startup = Startup()
    return outcomes


def _interrupted(outcomes: Iterable[Outcome]) -> bool:
    return any(outcome.reason == "interrupted" for outcome in outcomes)


def _run_level(
    experiments: Sequence[Experiment],
    states: Sequence[FederatedState],
    level: list[int],
    console: Console,
    startup: Startup,
    stop: Stop,
) -> list[Outcome]:
    together = [experiments[run] for run in level]
    try:
        together = _with_shared_lanes(together, console)
        startup.done("lanes")
        return continue_runs(
            together,
            [experiment.config.run_folder for experiment in together],
            [states[run] for run in level],
            console,
            startup,
            _chosen(stop, level),
        )
    except jax.errors.ConcretizationTypeError as error:
        if len(level) == 1:
            raise
        names = ", ".join(differing_settings([experiment.config for experiment in together]))
        console.print(f"one program cannot hold different {names} of this method ({error.args[0].splitlines()[0]})")
    outcomes = _one_after_another(experiments, states, [[run] for run in level], console, Startup(), stop)
    return [outcomes[run] for run in level]


def _with_shared_lanes(experiments: Sequence[Experiment], console: Console) -> list[Experiment]:
    """Measures the lanes once for all, and remembers them: continued runs then do the same sums in the same order."""
    folders = [experiment.config.run_folder for experiment in experiments]
    engine = experiments[0].config.engine
    if engine.lanes != "auto":
        if len(experiments) > 1:  # so that nobody takes their common times for those of one run
            for folder in folders:
                _note_sharing(folder, {"runs": len(experiments), "lanes": engine.lanes, "devices": engine.devices})
        return list(experiments)
    remembered = [json.loads((folder / SHARED).read_text()) for folder in folders if (folder / SHARED).exists()]
    wanted = {"runs": len(experiments), "lanes": None, "devices": None}
    if remembered:
        wanted |= {name: remembered[0].get(name) for name in ("lanes", "devices")}
    if len(remembered) < len(folders) or any(found != wanted for found in remembered):
        choice = choose_layout(experiments)
        wanted |= {"lanes": choice.lanes, "devices": choice.devices}
        sharing = f"{len(experiments)} runs in one program; " if len(experiments) > 1 else ""
        console.print(f"{sharing}{choice}")
        for folder in folders:
            choice.write(folder)
            _note_sharing(folder, wanted)
    return [with_layout(experiment, wanted["lanes"], wanted["devices"]) for experiment in experiments]


def _note_sharing(folder: Path, how: dict) -> None:
    (folder / SHARED).write_text(json.dumps(how))


def _begin(experiment: Experiment) -> FederatedState:
    """The state to go on from; makes the folder of a new run, and notes in an old one how many rounds it is to have."""
    folder, state = experiment.config.run_folder, first_state(experiment)
    if not (folder / "config.yaml").exists():
        make_folder(folder)
        begin_folder(experiment)
        return state
    held = configuration.load(folder / "config.yaml")
    if held.rounds != experiment.config.rounds:
        with lock_run(folder):
            configuration.save(dataclasses.replace(held, rounds=experiment.config.rounds), folder / "config.yaml")
    with Checkpoints(folder / "checkpoints", keep=experiment.config.checkpoints.keep) as checkpoints:
        return checkpoints.restore(state) or state


def _ended(config: Config) -> Outcome | None:
    """How a run ended, if it has."""
    mark = config.run_folder / ENDED
    if not mark.exists():
        return None
    found = json.loads(mark.read_text())
    if found["reason"] == "finished" and found["round"] < config.rounds:
        return None
    return Outcome(config.run_folder, found["round"], found["reason"])


def _check_folders(configs: Sequence[Config]) -> None:
    folders: dict[Path, int] = {}
    for index, config in enumerate(configs):
        folder = config.run_folder
        if folder in folders:
            raise ConfigurationError(f"two runs have the folder {folder}: give each its own name or seed.")
        folders[folder] = index
        if (folder / "config.yaml").exists():
            there = configuration.to_dict(resolve(configuration.load(folder / "config.yaml")))
            changed = configuration.differences(there, configuration.to_dict(config))
            changed = [change for change in changed if not change.startswith((*_MEASURED, "rounds:"))]
            if changed:
                raise ConfigurationError(
                    f"{folder} holds a run with other settings ({'; '.join(changed)}): choose another name or folder."
                )
