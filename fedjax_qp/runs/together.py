"""Several runs in one program: what a sweep's many small runs need to fill a device, and to be compiled once.

Runs can share a program where their arrays have the same shapes and their arithmetic is the same but for some numbers. Such
are seeds, learning rates, the methods' float options (α, τ, μ, …), epochs, dropouts, a partition's concentration. A lane
then trains a client of any of the runs, and uploads are summed by run (`engine`). Each run keeps a folder of its own with its
own records and checkpoints, so it may be continued alone, and a run alone may be continued together with others.
"""

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.experiment import (
    Experiment,
    build,
    differing_settings,
    first_state,
    kind_of,
    resolve,
    traced_settings,
    with_layout,
)
from fedjax_qp.federated import FederatedState
from fedjax_qp.files import read_mark, write_json
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.checkpoint import Checkpoints
from fedjax_qp.runs.folder import (
    SHARED,
    begin_folder,
    lock_run,
    make_folder,
    read_ended,
    restorable,
    shared_its_program,
)
from fedjax_qp.runs.provenance import Provenance, check_beside, provenance
from fedjax_qp.runs.run import Outcome, check_provenance, continue_runs, newest_state
from fedjax_qp.runs.startup import Startup
from fedjax_qp.runs.trackers import check_trackers

Stop = Callable[[int, list[dict]], str | None]

# Settings that reach only the plan, the records or the files of a run.
_FREE = (
    *("name", "folder", "local.epochs", "local.maximum_steps"),
    *("participation.dropout", "participation.stragglers", "participation.straggler_work"),
    *("evaluation.target_accuracy", "evaluation.stop_at_target", "evaluation.patience"),
    "checkpoints.keep",
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
    if not kind_of(config).clients_have_tests and config.partition.options["test"] == "common":
        floats = {name for name, value in flat.items() if name.startswith("partition.") and isinstance(value, float)}
        free |= {"seed", *floats}
    return {name: "free" if name in free else value for name, value in flat.items()}


def run_together(
    configs: Sequence[Config],
    console: Console | None = None,
    *,
    stop: Stop = lambda run, history: None,
    beside: Iterable[Path] = (),
) -> list[Outcome]:
    """Runs each configuration in its folder: starts it, continues it from its checkpoint, or keeps it if it has ended.

    Those that can share a program do; where a method turns out not to trace with its options as arrays, they run one after
    another. Runs that shared a program before a kill go back to the last round of which all of them have a checkpoint, and
    share the same program again, in which also those have their place that have ended: so they end with the same bits.

    Args:
      stop: `(position, records so far) -> reason` to end a run early, or None; asked at the ends of chunks.
      beside: folders of further runs that these will be compared with, and that must be of the same data.

    Returns:
      How each run ended. A run that diverged is among them (reason "diverged") and does not disturb the others. After an
      interruption the runs that never began have the reason "interrupted" too.

    Raises:
      ConfigurationError: a configuration cannot work, two runs have the same folder, a folder holds another run or one that
        another process continues, or data or weights are no longer those of the runs.
    """
    console, configs = console or Console(), [resolve(config) for config in configs]
    _check_folders(configs)
    for config in configs:
        check_trackers(config)
    beside = list(dict.fromkeys([*beside, *(config.run_folder for config in configs)]))
    outcomes = {index: ended for index, config in enumerate(configs) if (ended := _ended(config)) is not None}
    for group in groups(configs):
        waiting = [index for index in group if index not in outcomes]
        if _interrupted(outcomes.values()):
            outcomes |= {index: Outcome(configs[index].run_folder, 0, "interrupted") for index in waiting}
        elif waiting:
            ended = {place: outcomes[index] for place, index in enumerate(group) if index in outcomes}
            found = _run_group([configs[index] for index in group], ended, console, _chosen(stop, group), beside)
            outcomes |= {group[place]: outcome for place, outcome in found.items()}
    return [outcomes[index] for index in range(len(configs))]


def remembered_programs(folders: Sequence[Path]) -> list[list[int]]:
    """The programs that runs shared when they last ran: the positions of each one's runs, in its order.

    Only those of which all runs are among the folders.
    """
    found: dict[str, dict[int, int]] = {}
    sizes: dict[str, int] = {}
    for index, folder in enumerate(folders):
        how = read_mark(folder / SHARED) or {}
        if isinstance(how.get("program"), str) and type(how.get("place")) is int and type(how.get("runs")) is int:
            found.setdefault(how["program"], {})[how["place"]] = index
            sizes[how["program"]] = how["runs"]
    return [
        [places[place] for place in range(sizes[program])]
        for program, places in found.items()
        if places.keys() == set(range(sizes[program]))
    ]


class _Program(NamedTuple):
    """Runs that share a program, and where they begin."""

    members: list[int]  # positions in the group
    states: list[FederatedState]  # one for each


def _chosen(stop: Stop, positions: Sequence[int]) -> Stop:
    return lambda run, history: stop(positions[run], history)


def _run_group(
    configs: Sequence[Config], ended: dict[int, Outcome], console: Console, stop: Stop, beside: Sequence[Path]
) -> dict[int, Outcome]:
    """Runs what has not ended of a group whose members can share a program; how each of those ended, by position."""
    startup = Startup()
    waiting = [index for index in range(len(configs)) if index not in ended]
    remembered = remembered_programs([config.run_folder for config in configs])
    shared = [members for members in remembered if len(members) > 1 and not ended.keys() >= set(members)]
    needed = sorted({*waiting, *(index for members in shared for index in members)})
    experiments: dict[int, Experiment] = {}
    with contextlib.ExitStack() as stack:
        with console.status("reading the data"):
            for index in needed:
                first = next(iter(experiments.values()), None)
                experiments[index] = build(configs[index], first)
            made_of = dict(zip(needed, provenance(list(experiments.values())), strict=True))
        check_beside([made_of[index] for index in waiting], beside)
        for index in waiting:
            make_folder(configs[index].run_folder)
            stack.enter_context(lock_run(configs[index].run_folder))
        _check_folders([configs[index] for index in waiting])  # another process may have begun them meanwhile
        for index in needed:
            _begin(experiments[index], made_of[index], console)
        startup.done("data")
        programs = _programs(experiments, shared, ended, console)
        return _one_after_another(experiments, programs, ended, console, startup, stop)


def _programs(
    experiments: dict[int, Experiment], shared: Sequence[list[int]], ended: dict[int, Outcome], console: Console
) -> list[_Program]:
    """How runs go on: those that shared a program do so again, the others with those of equally many finished rounds."""
    found = []
    for members in shared:
        states = _common_states([experiments[index] for index in members], [index in ended for index in members])
        if states is not None:
            found.append(_Program(members, states))
        else:
            console.print(
                f"{len(members)} runs that shared a program have no checkpoint of one round: each goes on from its own, so "
                "that its numbers equal those of an uninterrupted run up to rounding"
            )
    placed = {index for program in found for index in program.members}
    levels: dict[int, _Program] = {}
    for index in experiments:
        if index not in placed and index not in ended:
            state = newest_state(experiments[index], experiments[index].config.run_folder, console)
            level = levels.setdefault(int(state.round), _Program([], []))
            level.members.append(index)
            level.states.append(state)
    told = {index for members in shared for index in members}
    for done, level in levels.items():
        moved = [
            index
            for index in level.members
            if len(level.members) > 1 or shared_its_program(experiments[index].config.run_folder)
        ]
        if done and not told.issuperset(moved):
            console.print(
                f"{len(moved)} runs go on from round {done} in another program than before: from here on their numbers equal "
                "those of uninterrupted runs up to rounding, not to the last bit"
            )
    return [*found, *(levels[level] for level in sorted(levels))]


def _common_states(experiments: Sequence[Experiment], ended: Sequence[bool]) -> list[FederatedState] | None:
    """The states after the last round of which all runs that have not ended have a sound checkpoint; None without one.

    Later checkpoints are removed. What a run that has ended computes is not looked at, so its state may be any.
    """
    with contextlib.ExitStack() as stack:
        stores = [
            stack.enter_context(Checkpoints(e.config.run_folder / "checkpoints", keep=e.config.checkpoints.keep))
            for e in experiments
        ]
        running = [place for place, over in enumerate(ended) if not over]
        sound = {place: restorable(experiments[place].config.run_folder, stores[place]) for place in running}
        likes = [first_state(experiment) for experiment in experiments]
        # Before the first save of the last of them: all begin anew, as long as no more is lost than that.
        begin = any(not rounds for rounds in sound.values()) and all(
            _may_begin_anew(experiments[place], rounds) for place, rounds in sound.items()
        )
        common = set.intersection(*map(set, sound.values()))
        for round in [*sorted(common, reverse=True), *([0] if begin else [])]:
            states = [
                likes[place] if round == 0 else _state_at(stores[place], likes[place], round, needed=place in running)
                for place in range(len(experiments))
            ]
            found = [state for state in states if state is not None]
            if len(found) == len(states):
                for place in running:
                    stores[place].discard_after(round)
                return found
    return None


def _may_begin_anew(experiment: Experiment, sound: Sequence[int]) -> bool:
    """Whether a run has no more than its first checkpoint, which the others may not yet have."""
    config = experiment.config
    return max(sound, default=0) <= config.checkpoints.every_chunks * config.engine.rounds_per_chunk


def _state_at(checkpoints: Checkpoints, like: FederatedState, round: int, *, needed: bool) -> FederatedState | None:
    """The state of a round; where it is not needed, any with that round in the place of one that is gone. None: damaged."""
    if round in checkpoints.rounds():
        with contextlib.suppress(ConfigurationError):  # a damaged one is warned of
            return checkpoints.restore_round(like, round)
    return None if needed else like._replace(round=np.full_like(like.round, round))


def _one_after_another(
    experiments: dict[int, Experiment],
    programs: Sequence[_Program],
    ended: dict[int, Outcome],
    console: Console,
    startup: Startup,
    stop: Stop,
) -> dict[int, Outcome]:
    """How each run of the programs ended, by position; after an interruption no further program begins."""
    outcomes: dict[int, Outcome] = {}
    for program in programs:
        if _interrupted(outcomes.values()):
            found = {
                index: Outcome(experiments[index].config.run_folder, int(state.round), "interrupted")
                for index, state in zip(program.members, program.states, strict=True)
                if index not in ended
            }
        else:
            found = _run_program(experiments, program, ended, console, startup, stop)
        outcomes |= found
        startup = Startup()
    return outcomes


def _interrupted(outcomes: Iterable[Outcome]) -> bool:
    return any(outcome.reason == "interrupted" for outcome in outcomes)


def _run_program(
    experiments: dict[int, Experiment],
    program: _Program,
    ended: dict[int, Outcome],
    console: Console,
    startup: Startup,
    stop: Stop,
) -> dict[int, Outcome]:
    members = program.members
    together = [experiments[index] for index in members]
    folders = [experiment.config.run_folder for experiment in together]
    over = {place: ended[index] for place, index in enumerate(members) if index in ended}
    try:
        together = _with_shared_lanes(together, console)
        startup.done("lanes")
        outcomes = continue_runs(together, folders, program.states, console, startup, _chosen(stop, members), over)
        return {index: outcome for index, outcome in zip(members, outcomes, strict=True) if index not in ended}
    except jax.errors.ConcretizationTypeError as error:
        if len(members) == 1:
            raise
        names = ", ".join(differing_settings([experiment.config for experiment in together]))
        console.print(f"one program cannot hold different {names} of this method ({error.args[0].splitlines()[0]})")
    for folder in folders:
        (folder / SHARED).unlink(missing_ok=True)
    alone = [
        _Program([index], [state]) for index, state in zip(members, program.states, strict=True) if index not in ended
    ]
    return _one_after_another(experiments, alone, ended, console, Startup(), stop)


def _with_shared_lanes(experiments: Sequence[Experiment], console: Console) -> list[Experiment]:
    """Measures the lanes once for all, and remembers the program: continued runs then do the same sums in the same order."""
    folders, engine = [experiment.config.run_folder for experiment in experiments], experiments[0].config.engine
    remembered = remembered_programs(folders) == [list(range(len(folders)))]
    before = _layout(read_mark(folders[0] / SHARED) or {}) if remembered else None
    if engine.lanes != "auto":
        assert engine.devices != "auto"
        layout = engine.lanes, engine.devices
    elif before is not None:
        layout = before
    else:
        with console.status("measuring lanes"):
            choice = choose_layout(experiments)
        layout = choice.lanes, choice.devices
        sharing = f"{len(experiments)} runs in one program; " if len(experiments) > 1 else ""
        console.print(f"{sharing}{choice}")
        for folder in folders:
            choice.write(folder)
    if layout != before and (len(folders) > 1 or engine.lanes == "auto"):
        _note_sharing(folders, *layout)
    return list(experiments) if engine.lanes != "auto" else [with_layout(one, *layout) for one in experiments]


def _layout(how: dict[str, Any]) -> tuple[int, int] | None:
    lanes, devices = how.get("lanes"), how.get("devices")
    return (lanes, devices) if isinstance(lanes, int) and isinstance(devices, int) else None


def _note_sharing(folders: Sequence[Path], lanes: int, devices: int) -> None:
    """Leaves in each folder which program its run is in, so that nobody takes their common times for those of one run."""
    program = uuid.uuid4().hex
    for place, folder in enumerate(folders):
        how = {"runs": len(folders), "lanes": lanes, "devices": devices, "program": program, "place": place}
        write_json(folder / SHARED, how)


def _begin(experiment: Experiment, made_of: Provenance, console: Console) -> None:
    """Begins the folder of a new run, and notes in an old one how many rounds it is to have."""
    folder = experiment.config.run_folder
    if not (folder / "config.yaml").exists():
        begin_folder(experiment, made_of)
        return
    check_provenance(made_of, folder, console)
    held = configuration.load(folder / "config.yaml")
    if held.rounds != experiment.config.rounds and _ended(experiment.config) is None:
        configuration.save(dataclasses.replace(held, rounds=experiment.config.rounds), folder / "config.yaml")


def _ended(config: Config) -> Outcome | None:
    """How a run ended, if it has."""
    found = read_ended(config.run_folder)
    if found is None or (found[0] == "finished" and found[1] < config.rounds):
        return None
    return Outcome(config.run_folder, found[1], found[0])


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
            changed = [
                change for change in changed if not change.startswith((*_MEASURED, "rounds:", "folder:", "plugins:"))
            ]
            if changed:
                raise ConfigurationError(
                    f"{folder} holds a run with other settings ({'; '.join(changed)}): choose another name or folder."
                )
