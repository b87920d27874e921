"""Runs in their folders: begun, continued from their checkpoints, or kept where they have ended. One run is a list of one."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.data import print_table, summary
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import Experiment, build, differing_settings, first_state, resolve
from fedjax_qp.federated import FederatedState
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import processes
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.open_run import begin_folder, lock_run
from fedjax_qp.runs.programs import Program, groups, kept_layout, moved, note_program, programs, remembered_programs
from fedjax_qp.runs.provenance import Provenance, check_beside, provenance
from fedjax_qp.runs.startup import Startup
from fedjax_qp.runs.trackers import check_trackers
from fedjax_qp.runs.training import Outcome, Stop, train
from fedjax_qp.settings import plugins


class Member(NamedTuple):
    """A run that is to be begun or continued."""

    config: Config  # resolved
    folder: RunFolder  # need not be where the configuration says: it may have been moved


Check = Callable[[Member], None]
"""Raises a ConfigurationError where a member cannot be begun or continued; asked before its data are read, and again under
its lock: another process may have come first."""


def run(config: Config, console: Console | None = None) -> Outcome:
    """Starts a run in a new folder.

    Raises:
      ConfigurationError: the configuration cannot work, or the folder already holds a run.
      NonFiniteLoss: its training left the finite numbers.
    """
    config = resolve(config)  # what is misspelt comes before what is in the way
    return _alone(Member(config, RunFolder(config.run_folder)), _refuse_held, console)


def resume(folder: Path, overrides: Sequence[str] = (), console: Console | None = None) -> Outcome:
    """Continues a run from its newest checkpoint, with the configuration in its folder.

    Args:
      overrides: settings to change, for example `rounds=200`. Only settings that leave the past of the run valid may be
        changed; each one is reported.

    Raises:
      ConfigurationError: no run in the folder, or a change that would make the run inconsistent with its past.
      NonFiniteLoss: its training left the finite numbers.
    """
    kept = RunFolder(folder)
    config = kept.config(overrides)
    plugins.load_of_run(kept.plugins, config.plugins)
    return _alone(Member(resolve(config), kept), _check_resumed, console)


def run_all(
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
    console, configs = console or processes.console(), [resolve(config) for config in configs]
    members = [Member(config, RunFolder(config.run_folder)) for config in configs]
    with processes.in_common():
        _check_distinct(members)
        for member in members:
            _check_same_settings(member)
            check_trackers(member.config)
        outcomes = {index: ended for index, member in enumerate(members) if (ended := _ended(member)) is not None}
    beside = list(dict.fromkeys([*beside, *(member.folder.path for member in members)]))
    for group in groups(configs):
        waiting = [index for index in group if index not in outcomes]
        if _interrupted(outcomes.values()):
            outcomes |= {index: Outcome(members[index].folder.path, 0, "interrupted") for index in waiting}
        elif waiting:
            own = _Group(
                [members[index] for index in group],
                {place: outcomes[index] for place, index in enumerate(group) if index in outcomes},
                _check_same_settings,
                console,
                _chosen(stop, group),
                beside,
            )
            outcomes |= {group[place]: outcome for place, outcome in own.run().items()}
    return [outcomes[index] for index in range(len(configs))]


def restore(folder: Path) -> tuple[Experiment, FederatedState]:
    """Reads a run and its newest checkpoint.

    Raises:
      ConfigurationError: no run in the folder, no checkpoint yet, or its data or weights are no longer the same.
    """
    kept = RunFolder(folder)
    config = kept.config()
    plugins.load_of_run(kept.plugins, config.plugins)
    experiment = build(config)
    (made_of,) = provenance([experiment])
    made_of.check(kept, warnings.warn)
    with kept.checkpoints(keep=experiment.config.checkpoints.keep) as checkpoints:
        state = checkpoints.restore(first_state(experiment))
    if state is None:
        raise ConfigurationError(f"{folder} has no checkpoint yet: let it run, or `fedjax-qp resume {folder}`.")
    return experiment, state


def _alone(member: Member, check: Check, console: Console | None) -> Outcome:
    with processes.in_common():
        check(member)
        check_trackers(member.config)
    group = _Group([member], {}, check, console or processes.console())
    outcome = group.run()[0]
    if outcome.error is not None:
        raise outcome.error
    return outcome


class _Group:
    """Runs that can share a program: their folders are locked, their data read, their programs found and trained."""

    def __init__(
        self,
        members: Sequence[Member],
        ended: Mapping[int, Outcome],
        check: Check,
        console: Console,
        stop: Stop = lambda run, history: None,
        beside: Sequence[Path] = (),
    ):
        """Args: ended: the members, by position, that go no further; they may have a place in a program that goes on."""
        self.members, self.ended, self.check, self.console, self.stop = members, ended, check, console, stop
        self.beside = beside
        self.folders = [member.folder for member in members]
        self.waiting = [index for index in range(len(members)) if index not in ended]
        self.rearranged: set[RunFolder] = set()  # whose settings of the engine have changed
        self.experiments: dict[int, Experiment] = {}
        self.made_of: dict[int, Provenance] = {}

    def run(self) -> dict[int, Outcome]:
        """How each member ended that had not, by position."""
        startup = Startup()
        remembered = remembered_programs(self.folders)
        shared = [members for members in remembered if len(members) > 1 and not self.ended.keys() >= set(members)]
        with contextlib.ExitStack() as stack:
            begun = [index for index in self.waiting if self.folders[index].holds_run()]
            for index in begun:
                stack.enter_context(lock_run(self.folders[index]))
            self._build(sorted({*self.waiting, *(index for members in shared for index in members)}))
            for index in self.waiting:
                if index not in begun:
                    stack.enter_context(lock_run(self.folders[index]))
            with processes.in_common():
                for index in self.waiting:
                    self.check(self.members[index])
                    if self.folders[index].holds_run():
                        self._check_provenance(index)
            startup.done("data")
            found = programs(
                self.experiments, dict(enumerate(self.folders)), shared, frozenset(self.ended), self.console
            )
            self._adopt_settings()
            return self._one_after_another(found, startup)

    def _build(self, positions: Sequence[int]) -> None:
        with processes.in_common(), self.console.status("reading the data"):
            for index in positions:
                first = next(iter(self.experiments.values()), None)
                self.experiments[index] = build(self.members[index].config, first)
            self.made_of = dict(zip(positions, provenance(list(self.experiments.values())), strict=True))
            check_beside([self.made_of[index] for index in self.waiting], self.beside)
            for index in self.waiting:
                self.folders[index].make()

    def _check_provenance(self, index: int) -> None:
        """Refuses to go on with other data or weights than a run began with; notes them where that was not yet done."""
        say = partial(self.console.print, markup=False, highlight=False)
        if not self.made_of[index].check(self.folders[index], say) and processes.first():
            self.made_of[index].write(self.folders[index])

    def _one_after_another(self, found: Sequence[Program], startup: Startup) -> dict[int, Outcome]:
        """How each run of the programs ended; after an interruption no further program begins."""
        outcomes: dict[int, Outcome] = {}
        for program in found:
            if _interrupted(outcomes.values()):
                for index, state in zip(program.members, program.states, strict=True):
                    outcomes[index] = Outcome(self.folders[index].path, int(state.round), "interrupted")
            else:
                outcomes |= self._run_program(program, startup)
            startup = Startup()
        return {index: outcome for index, outcome in outcomes.items() if index not in self.ended}

    def _run_program(self, program: Program, startup: Startup) -> dict[int, Outcome]:
        members, done = program.members, int(program.states[0].round)
        experiments = [self.experiments[index] for index in members]
        folders = [self.folders[index] for index in members]
        over = {place: self.ended[index] for place, index in enumerate(members) if index in self.ended}
        try:
            layout = self._lay_out(experiments, folders, startup, 0 < done < experiments[0].config.rounds)
            self._begin([index for index in members if index not in self.ended])
            outcomes = train(
                experiments,
                layout,
                folders,
                program.states,
                self.console,
                startup,
                _chosen(self.stop, members),
                over,
            )
            return dict(zip(members, outcomes, strict=True))
        except jax.errors.ConcretizationTypeError as error:
            if len(members) == 1:
                raise
            names = ", ".join(differing_settings([experiment.config for experiment in experiments]))
            self.console.print(
                f"one program cannot hold different {names} of this method ({error.args[0].splitlines()[0]})"
            )
        for folder in folders:
            folder.layout.remove()
        alone = [Program([index], [state]) for index, state in zip(members, program.states, strict=True)]
        return self._one_after_another([one for one in alone if one.members[0] not in self.ended], Startup())

    def _lay_out(
        self, experiments: Sequence[Experiment], folders: Sequence[RunFolder], startup: Startup, continued: bool
    ) -> Layout:
        """The layout that the runs had together, or one that is chosen now; see `programs`."""
        with processes.in_common():
            kept = None if self.rearranged.intersection(folders) else kept_layout(folders)
        if kept is not None:
            return kept
        with self.console.status("measuring lanes"):
            choice = choose_layout(experiments)
        if choice.trials:
            startup.done("lanes")
            sharing = f"{len(folders)} runs in one program; " if len(folders) > 1 else ""
            self.console.print(f"{sharing}{choice}")
        with processes.in_common():
            if continued and (elsewhere := moved(folders, choice.layout)):
                self.console.print(
                    f"{len(elsewhere)} run(s) go on in another program or layout than before: from here on their numbers "
                    "equal those of an uninterrupted run up to rounding, not to the last bit"
                )
        with processes.in_common():
            if processes.first():
                note_program(folders, choice)
        return choice.layout

    def _adopt_settings(self) -> None:
        """Notes in the folders of runs that go on what their settings are from now on."""
        for index in self.waiting:
            config, folder = self.members[index]
            with processes.in_common():
                held = folder.config() if folder.holds_run() else config
            config = dataclasses.replace(config, folder=held.folder)
            if not (changed := _changes(held, config)):
                continue
            self.console.print("going on with changed settings: " + "; ".join(changed), markup=False)
            if held.engine != config.engine:
                self.rearranged.add(folder)
            with processes.in_common():
                if processes.first():
                    folder.save_config(config)

    def _begin(self, positions: Sequence[int]) -> None:
        """Begins the folders of new runs."""
        for index in positions:
            if not self.folders[index].holds_run():
                if len(self.members) == 1:
                    self._introduce(self.experiments[index])
                with processes.in_common():
                    if processes.first():
                        begin_folder(self.experiments[index], self.made_of[index])

    def _introduce(self, experiment: Experiment) -> None:
        print_table(summary(experiment.task.counts), console=self.console)
        for note in experiment.task.notes:
            self.console.print(note)


# --- what may be begun, continued and changed -------------------------------------------------------------------------

_MAY_CHANGE = ("rounds", "plugins:", "engine.", "evaluation.", "checkpoints.", "tracking.")
"""Settings that do not touch what has already been computed."""


def _refuse_held(member: Member) -> None:
    config, folder = member
    if not folder.holds_run():
        return
    held = folder.config().algorithm.name
    if held != config.algorithm.name:
        raise ConfigurationError(
            f"{folder} already holds a run of another algorithm ({held}): choose another name, for example "
            f"name={config.name}-{config.algorithm.name}, or continue it with `fedjax-qp resume {folder}`."
        )
    raise ConfigurationError(
        f"{folder} already holds a run: continue it with `fedjax-qp resume {folder}`, or choose another name, seed or folder."
    )


def _check_resumed(member: Member) -> None:
    config, folder = member
    refused = [change for change in _changes(folder.config(), config) if not change.startswith(_MAY_CHANGE)]
    if refused:
        raise ConfigurationError(
            f"resuming cannot change {'; '.join(refused)}: the rounds already run would not belong to the same run. "
            f"Allowed: {', '.join(name.rstrip('.:') for name in _MAY_CHANGE)}. Start a new run for the rest."
        )
    lines = folder.records(missing_ok=True)
    if lines and config.rounds < lines[-1]["round"]:
        raise ConfigurationError(
            f"rounds = {config.rounds} is less than the {lines[-1]['round']} that are in {folder}: choose at least those."
        )


def _check_same_settings(member: Member) -> None:
    """A run that is begun again goes on, so it must be the same; only its length and its place on devices may change."""
    config, folder = member
    if not folder.holds_run():
        return
    changed = [
        line
        for line in _changes(folder.config(), config)
        if not line.startswith(("rounds", "plugins", "engine.", "folder"))
    ]
    if changed:
        raise ConfigurationError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): choose another name or folder."
        )


def _changes(held: Config, config: Config) -> list[str]:
    return configuration.differences(configuration.to_dict(resolve(held)), configuration.to_dict(config))


def _check_distinct(members: Sequence[Member]) -> None:
    folders: set[Path] = set()
    for _, folder in members:
        if folder.path in folders:
            raise ConfigurationError(f"two runs have the folder {folder}: give each its own name or seed.")
        folders.add(folder.path)


def _ended(member: Member) -> Outcome | None:
    """How a run ended, if it has."""
    found = member.folder.ended()
    if found is None or (found[0] == "finished" and found[1] < member.config.rounds):
        return None
    return Outcome(member.folder.path, found[1], found[0])


def _chosen(stop: Stop, positions: Sequence[int]) -> Stop:
    return lambda run, history: stop(positions[run], history)


def _interrupted(outcomes: Iterable[Outcome]) -> bool:
    return any(outcome.reason == "interrupted" for outcome in outcomes)
