"""`engine.lanes: auto`: measures a step at several numbers of lanes and picks the one with the shortest round.

More lanes share a step's fixed costs and fill a wide device; fewer lanes waste less time waiting for the longest client.
With `engine.devices: auto` the lanes are also tried on all devices, which on a CPU are its cores. Which wins depends on the
net, the device and the partition, so it is measured. The choice is written into the run folder: a resumed run does not
measure again.

A number of lanes whose program would not fit the device's memory, by the compiler's own count, is never run.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from fedjax_qp.config import Engine as EngineSettings
from fedjax_qp.engine import Layout, bytes_needed
from fedjax_qp.engine.layout import open_layouts
from fedjax_qp.engine.plan import Plan, Workload, longest_lane, plan_chunk, sample_cohort
from fedjax_qp.experiment import Experiment, first_state, start_engine
from fedjax_qp.federated import FederatedState
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import processes

SHARE = 0.8  # of a device's memory; the rest is for copies on their way, and for what the compiler does not count
_SHORT, _LONG = 4, 24  # steps of two trial rounds, whose difference is free of a round's fixed costs
_REPEATS = 5
_LONG_SECONDS = 1.0  # a long round of slow steps has fewer of them
_ALL_SECONDS = 6.0  # and is repeated less often
_WORSE = 1.3  # times the best round: a trial beyond it is the last of its number of devices
_HOPELESS = 1.1  # times the best round: more lanes of which this much is expected are not tried
_SEARCH = 0.2  # of the time that all rounds take: what the search for a layout may cost
_COHORTS = 50  # sampled cohorts over which the round's length is averaged


class LaneTrial(NamedTuple):
    """What was measured for one layout."""

    layout: Layout
    step_seconds: float  # all lanes together
    steps: float  # mean steps of a round
    use: float  # share of lane-steps that train a client
    bytes: int  # that a run's program takes on each device

    @property
    def round_seconds(self) -> float:
        return self.step_seconds * self.steps

    def __str__(self) -> str:
        said = f"{self.layout}: {self.round_seconds:.2f} s at {self.use:.0%} use"
        return f"{said}, {_gigabytes(self.bytes)}"


class Budget(NamedTuple):
    """Memory of each device that may be planned with."""

    bytes: int
    source: str  # where the number comes from

    def __str__(self) -> str:
        return f"{_gigabytes(self.bytes)} ({self.source})"


class TooLarge(NamedTuple):
    """A program that was compiled but not run, since it does not fit."""

    layout: Layout
    bytes: int
    budget: Budget
    skipped: list[int]  # more lanes still: not even compiled

    def __str__(self) -> str:
        more = f", nor {', '.join(map(str, self.skipped))}" if self.skipped else ""
        return f"{self.layout}, which takes {_gigabytes(self.bytes)} of {self.budget}{more}"


class LayoutChoice(NamedTuple):
    """The layout, and what the choice rests on; no trials where the settings left nothing open."""

    layout: Layout
    trials: list[LaneTrial]
    too_large: list[TooLarge]

    def __str__(self) -> str:
        said = f"lanes: {self.layout} (predicted round {', '.join(map(str, self.trials))})"
        return "; not tried: ".join([said, *map(str, self.too_large)])

    def facts(self) -> dict[str, Any]:
        """All of it as plain JSON, for the run's folder."""
        trials = [
            {**trial._asdict(), "layout": trial.layout._asdict(), "round_seconds": trial.round_seconds}
            for trial in self.trials
        ]
        too_large = [
            {**found._asdict(), "layout": found.layout._asdict(), "budget": found.budget._asdict()}
            for found in self.too_large
        ]
        return {**self.layout._asdict(), "trials": trials, "too_large": too_large}


def memory_budget(settings: EngineSettings, layout: Layout) -> Budget:
    """What a program may take on each device: as configured, or `SHARE` of the device's memory.

    A CPU is a device without memory of its own: its host devices share what the machine has left. (A container's limit is
    not looked for; there `engine.memory_gigabytes` says it.)
    """
    if settings.memory_gigabytes is not None:
        return Budget(int(settings.memory_gigabytes * 2**30), "engine.memory_gigabytes")
    here = jax.local_devices()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in here]
    if all(limits):
        return Budget(int(SHARE * min(limit for limit in limits if limit)), f"{SHARE:.0%} of the device's memory")
    used = min(len(here), layout.devices * layout.model_devices)
    free = psutil.virtual_memory().available
    return Budget(int(SHARE * free / used), f"{SHARE:.0%} of the machine's free memory for {used} device(s)")


def choose_layout(experiments: Sequence[Experiment]) -> LayoutChoice:
    """The layout that the settings name, or the best of those that they leave open, by measurement.

    Compiles one small program for each candidate. For each number of devices it goes upwards in lanes. It ends where a
    program exceeds the memory, where a round took `_WORSE` times as long as the best so far, or where the next is expected
    to be worse: more lanes never make a step's time grow more slowly than before, since a device that is full stays full.
    Short runs end the search early too: it may take no more than `_SEARCH` of what all rounds take with the best so far.

    Args:
      experiments: the runs that will share the lanes; one for a run alone.

    Raises:
      ConfigurationError: not even the fewest lanes fit the memory.
    """
    config = experiments[0].config
    options = open_layouts(config.engine, len(experiments) * config.participation.cohort)
    if config.engine.lanes != "auto":
        return LayoutChoice(options[0][0], [], [])
    started = time.perf_counter()
    cohorts = sampled_steps(experiments)
    trials: list[LaneTrial] = []
    too_large: list[TooLarge] = []

    def worthwhile() -> bool:
        spent = float(processes.of_first(time.perf_counter() - started))
        return not trials or spent < _SEARCH * config.rounds * _best(trials).round_seconds

    for layouts in options:
        budget = memory_budget(config.engine, layouts[0])
        budget = budget._replace(bytes=int(processes.of_first(budget.bytes)))
        here: list[LaneTrial] = []
        for place, layout in enumerate(layouts):
            if not worthwhile():
                break
            if (
                len(here) > 1
                and _expected_seconds(cohorts, here, layout.lanes) > _HOPELESS * _best(trials).round_seconds
            ):
                break
            timer = LaneTimer(experiments, layout)
            if timer.bytes > budget.bytes:
                skipped = [more.lanes for more in layouts[place + 1 :]]
                too_large.append(TooLarge(layout, timer.bytes, budget, skipped))
                break
            here.append(timer.trial(cohorts))
            trials.append(here[-1])
            del timer  # and its data on the device
            if here[-1].round_seconds > _WORSE * _best(trials).round_seconds:
                break
    if not trials:
        raise _nothing_fits(too_large[-1])
    return LayoutChoice(_best(trials).layout, trials, too_large)


def sampled_steps(experiments: Sequence[Experiment]) -> list[np.ndarray]:
    """Steps of each client of some rounds, sampled uniformly, since there are no client memories yet."""
    works = [experiment.work._replace(sampling=None) for experiment in experiments]
    return [np.concatenate([sample_cohort(work, round).steps for work in works]) for round in range(_COHORTS)]


def _expected_seconds(cohorts: Sequence[np.ndarray], trials: Sequence[LaneTrial], lanes: int) -> float:
    """The least that a round with more lanes will take, if a step's time grows as between the last two trials."""
    before, last = trials[-2:]
    growth = (last.step_seconds - before.step_seconds) / (last.layout.lanes - before.layout.lanes)
    return (last.step_seconds + max(growth, 0) * (lanes - last.layout.lanes)) * _round_steps(cohorts, lanes)[0]


def _round_steps(cohorts: Sequence[np.ndarray], lanes: int) -> tuple[float, float]:
    """Mean steps of a round, and the share of lane-steps that train a client."""
    steps = float(np.mean([longest_lane(cohort, lanes) for cohort in cohorts]))
    return steps, float(np.mean([cohort.sum() for cohort in cohorts])) / (steps * lanes)


def _best(trials: Sequence[LaneTrial]) -> LaneTrial:
    return min(trials, key=lambda trial: trial.round_seconds)


def _nothing_fits(fewest: TooLarge) -> ConfigurationError:
    return ConfigurationError(
        f"engine.lanes = 'auto': {fewest.layout.lanes} lane(s), the fewest there can be, take {_gigabytes(fewest.bytes)} of "
        f"{fewest.budget}. Choose a smaller local.batch_size, evaluation.batch_size or model, "
        f"engine.client_store = 'host' for large client memories, or engine.memory_gigabytes of at least "
        f"{fewest.bytes / 2**30:.2g}."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


class LaneTimer:
    """Times a step of `lanes` clients: the difference of a long and a short trial round is free of a round's fixed costs."""

    def __init__(self, experiments: Sequence[Experiment], layout: Layout):
        self.experiments, self.layout, self.lanes = experiments, layout, layout.lanes
        self.engine = start_engine(experiments, layout)
        states = [_first_state(experiment, self._members()) for experiment in experiments]
        self.state = self.engine.place_states(states)
        self.plans = {_SHORT: self.engine.place_plan(self._plan(_SHORT))}  # `trial` adds a long one
        compiled = self.engine.compiled(self.state, self.plans[_SHORT])
        self.bytes = bytes_needed(compiled) + sum(map(self._left_out, experiments))

    def __call__(self) -> float:
        """Seconds of one step, measured once; after `trial` has chosen the long round."""
        (few, short), (many, long) = ((steps, self._seconds(steps)) for steps in self.plans)
        # Noise can exceed the steps of a tiny net; then the whole of the long round is at least no underestimate.
        return (long - short) / (many - few) if long > short else long / many

    def trial(self, cohorts: Sequence[np.ndarray]) -> LaneTrial:
        """The median step, and the steps of a round with clients as in `sampled_steps`."""
        steps, use = _round_steps(cohorts, self.lanes)
        repeats = self._add_long_plan()
        seconds = processes.of_first(float(np.median([self() for _ in range(repeats)])))
        return LaneTrial(self.layout, seconds, steps, use, self.bytes)

    def _seconds(self, steps: int) -> float:
        started = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.engine.run(self.state, self.plans[steps]))
        return time.perf_counter() - started

    def _add_long_plan(self) -> int:
        """Of fewer steps where they are slow, and noise matters less; returns how often to repeat."""
        self._seconds(_SHORT)  # warm-up: the first call has one-off costs
        step = float(processes.of_first(self._seconds(_SHORT))) / _SHORT
        many = _SHORT + min(max(int(_LONG_SECONDS / step), 2), _LONG - _SHORT)
        self.plans = {_SHORT: self.plans[_SHORT], many: self.engine.place_plan(self._plan(many))}
        return min(max(int(_ALL_SECONDS / (step * (_SHORT + many))), 1), _REPEATS)

    def _members(self) -> int:
        """Clients of a run that the trial needs: several devices may want more lanes than there are clients."""
        return max(-(-self.lanes // len(self.experiments)), self.experiments[0].work.participation.cohort)

    def _left_out(self, experiment: Experiment) -> int:
        """Bytes of the client memories that a run has on each device beyond those of the trial."""
        settings, clients = experiment.config.engine, len(experiment.work.parts)
        if settings.client_store == "host":
            clients = min(clients, settings.rounds_per_chunk * experiment.config.participation.cohort)
        memory = jax.eval_shape(lambda: experiment.algorithm.init_client(experiment.model.init(jax.random.key(0))))
        one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
        return max(clients - self._members(), 0) * one

    def _plan(self, steps: int) -> Plan:
        """One round in which every lane trains one of the largest clients for `steps` full batches, without evaluation."""
        lanes = self.lanes
        works = [_trial_work(experiment.work, self._members()) for experiment in self.experiments]
        plan = plan_chunk(works, 0, 1, capacity=1, lanes=lanes, evaluate_every=2, last_round=2)
        nobody = plan.preparations._replace(turns=np.zeros((lanes, 1), np.int32))  # a round's preparation is no step
        return plan._replace(lanes=plan.lanes._replace(steps=np.full((lanes, 1), steps, np.int32)), preparations=nobody)


def _first_state(experiment: Experiment, members: int) -> FederatedState:
    """With no more client memories than the trial needs."""
    state = first_state(experiment)
    return state._replace(clients=jax.tree.map(lambda leaf: leaf[np.arange(members) % len(leaf)], state.clients))


def _trial_work(work: Workload, members: int) -> Workload:
    """Clients of `_LONG` steps, with examples of the largest ones."""
    longest = sorted(range(len(work.parts)), key=lambda client: -len(work.parts[client]))[:members]
    parts = [np.resize(work.parts[client], work.local.batch_size * _LONG) for client in longest]
    parts += [parts[0]] * (members - len(parts))
    return work._replace(
        parts=parts,
        participation=dataclasses.replace(work.participation, dropout=0.0, stragglers=0.0, cohort=members),
        local=dataclasses.replace(work.local, epochs=1, maximum_steps=_LONG),
        sizes=None,
        sampling=None,
        preparation=work.preparation and work.preparation._replace(charged=0),
    )
