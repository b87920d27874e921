"""Which runs share a program, and where each program begins: what a sweep's many small runs need to fill a device.

Runs can share a program where their arrays have the same shapes and their arithmetic is the same but for some numbers. Such
are seeds, learning rates, the methods' float options (α, τ, μ, …), epochs, dropouts, a partition's concentration. A lane
then trains a client of any of the runs, and uploads are summed by run (`engine`). Each run keeps a folder of its own with its
own records and checkpoints, so it may be continued alone, and a run alone may be continued together with others.

Beside its layout a folder names the program that its run was in, and its place there: continued runs then share it again, do
the same sums in the same order, and end with the same bits.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import Experiment, first_state, kind_of, resolve, traced_settings
from fedjax_qp.federated import FederatedState
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import processes
from fedjax_qp.runs.autotune import LayoutChoice
from fedjax_qp.runs.checkpoint import Checkpoints
from fedjax_qp.runs.folder import RunFolder, SharedProgram

# Settings that reach only the plan, the records or the files of a run.
_FREE = (
    *("name", "folder", "local.epochs", "local.maximum_steps"),
    *("participation.dropout", "participation.stragglers", "participation.straggler_work"),
    *("evaluation.target_accuracy", "evaluation.stop_at_target", "evaluation.patience"),
    "checkpoints.keep",
)


class Program(NamedTuple):
    """Runs that share a program, and where they begin."""

    members: list[int]  # positions in the group
    states: list[FederatedState]  # one for each


def groups(configs: Sequence[Config]) -> list[list[int]]:
    """Positions of the configurations that can share a program, in order; reads no data.

    Raises:
      ConfigurationError: an option is unknown or ill-typed.
    """
    found: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        key = json.dumps(_fixed_settings(resolve(config)), sort_keys=True)
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


# --- what the folders remember ----------------------------------------------------------------------------------------


def remembered_programs(folders: Sequence[RunFolder]) -> list[list[int]]:
    """The programs that runs were last in: the positions of each one's runs, in its order.

    Only those of which all runs are among the folders.
    """
    found: dict[str, dict[int, int]] = {}
    sizes: dict[str, int] = {}
    for index, folder in enumerate(folders):
        program = folder.program()
        if program is not None:
            found.setdefault(program.id, {})[program.place] = index
            sizes[program.id] = program.runs
    return [
        [places[place] for place in range(sizes[program])]
        for program, places in found.items()
        if places.keys() == set(range(sizes[program]))
    ]


def kept_layout(folders: Sequence[RunFolder]) -> Layout | None:
    """The layout that the runs had in one program, in this order; None where they had none, or its devices are gone."""
    if remembered_programs(folders) != [list(range(len(folders)))]:
        return None
    layout = layout_of(folders[0])
    there = layout is not None and layout.devices * layout.model_devices <= jax.device_count()
    return layout if there else None


def layout_of(folder: RunFolder) -> Layout | None:
    """The layout that a run was last computed with; None where none is noted, or the note is damaged."""
    found = {name: (folder.layout.read() or {}).get(name) for name in Layout._fields}
    numbers = [found["lanes"], found["devices"], found["model_devices"]]
    sound = all(type(number) is int and number >= 1 for number in numbers) and isinstance(found["parallel"], str)
    return Layout(**found) if sound else None  # pyright: ignore[reportArgumentType]


def note_program(folders: Sequence[RunFolder], choice: LayoutChoice) -> None:
    """Leaves in each folder the layout, and which program its run is in: their common times are not those of one run."""
    program = uuid.uuid4().hex
    for place, folder in enumerate(folders):
        shared = SharedProgram(id=program, runs=len(folders), place=place)
        folder.layout.write({**choice.facts(), "program": shared.model_dump()})


# --- where programs begin ---------------------------------------------------------------------------------------------


def programs(
    experiments: Mapping[int, Experiment],
    folders: Mapping[int, RunFolder],
    shared: Sequence[list[int]],
    ended: frozenset[int],
    console: Console,
) -> list[Program]:
    """How runs go on: those that shared a program do so again, the others with those of equally many finished rounds.

    Args:
      experiments: of the group, by position.
      shared: the remembered programs.
      ended: positions of runs that only hold their places.
    """
    found = []
    for members in shared:
        places = [(experiments[index], folders[index], index in ended) for index in members]
        states = _common_states(*zip(*places, strict=True))
        if states is not None:
            found.append(Program(members, states))
        else:
            console.print(
                f"{len(members)} runs that shared a program have no checkpoint of one round: each goes on from its own"
            )
    placed = {index for program in found for index in program.members}
    levels: dict[int, Program] = {}
    for index, experiment in experiments.items():
        if index not in placed and index not in ended:
            state = newest_state(experiment, folders[index], console)
            level = levels.setdefault(int(state.round), Program([], []))
            level.members.append(index)
            level.states.append(state)
    return [*found, *(levels[level] for level in sorted(levels))]


def newest_state(experiment: Experiment, folder: RunFolder, console: Console) -> FederatedState:
    """The state that a run goes on from; what has to be computed again is said."""
    like = first_state(experiment)
    if not folder.holds_run():
        return like
    with folder.checkpoints(keep=experiment.config.checkpoints.keep) as checkpoints:
        with processes.in_common():
            covered = folder.restorable()
            state = checkpoints.restore(like, covered)
            back = bool(covered) and covered[0] != checkpoints.rounds()[-1]
        with processes.in_common():
            if back and processes.first():
                checkpoints.discard_after(int(covered[0]))
    if state is None:
        recorded = len(folder.records(missing_ok=True))
        again = f"; the {recorded} recorded rounds are computed again" if recorded else ""
        console.print(f"no checkpoint yet: starting from round 1{again}")
        return like
    if back:
        console.print(
            f"{folder.records_file.name} is not complete: going back to round {covered[0]}, up to which it is"
        )
    return state


def _common_states(
    experiments: Sequence[Experiment], folders: Sequence[RunFolder], ended: Sequence[bool]
) -> list[FederatedState] | None:
    """The states after the last round of which all runs that have not ended have a sound checkpoint; None without one.

    Later checkpoints are removed. What a run that has ended computes is not looked at, so its state may be any.
    """
    with contextlib.ExitStack() as stack:
        stores = [
            stack.enter_context(folder.checkpoints(keep=experiment.config.checkpoints.keep))
            for folder, experiment in zip(folders, experiments, strict=True)
        ]
        running = [place for place, over in enumerate(ended) if not over]
        with processes.in_common():
            sound = {place: folders[place].restorable() for place in running}
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
                with processes.in_common():
                    for place in running if processes.first() else ():
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


def moved(folders: Sequence[RunFolder], layout: Layout) -> list[RunFolder]:
    """The runs of a program whose last rounds were computed in another one, or in another layout.

    Their numbers go on as those of uninterrupted runs up to rounding, not to the last bit.
    """
    same = remembered_programs(folders) == [list(range(len(folders)))]
    return [
        folder
        for folder in folders
        if (folder.program() is not None and not same) or layout_of(folder) not in (None, layout)
    ]
