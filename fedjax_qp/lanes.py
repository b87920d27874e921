"""`engine.lanes: auto`: measures a step at several numbers of lanes and picks the one with the shortest round.

More lanes share a step's fixed costs and fill a wide device; fewer lanes waste less time waiting for the longest client.
Which wins depends on the net, the device and the partition, so it is measured. The choice is written into the run folder:
a resumed run does not measure again.
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np

from fedjax_qp.experiment import Experiment, first_state, start_engine
from fedjax_qp.plan import Plan, longest_lane, plan_chunk, sample_cohort

_STEPS = (4, 24)  # two trial lengths; their difference is free of a round's fixed costs
_REPEATS = 5
_COHORTS = 50  # sampled cohorts over which the round's length is averaged


class LaneTrial(NamedTuple):
    """What was measured for one number of lanes."""

    lanes: int
    step_seconds: float  # all lanes together
    steps: float  # mean steps of a round
    use: float  # share of lane-steps that train a client

    @property
    def round_seconds(self) -> float:
        return self.step_seconds * self.steps


def candidates(cohort: int, devices: int) -> list[int]:
    """1, 2, 3, 5, 10, 20, … up to the cohort, and one for each member, as multiples of the number of devices."""
    numbers = {base * 10**power for base in (1, 2, 3, 5) for power in range(5)} | {cohort}
    return sorted({-(-number // devices) * devices for number in numbers if number <= cohort})


def choose_lanes(experiment: Experiment) -> tuple[int, list[LaneTrial]]:
    """Measures the candidates (compiling one small program for each) and returns the best and all trials."""
    config = experiment.config
    trials = [measure_lanes(experiment, n) for n in candidates(config.participation.cohort, config.engine.devices)]
    return min(trials, key=lambda trial: trial.round_seconds).lanes, trials


def measure_lanes(experiment: Experiment, lanes: int) -> LaneTrial:
    """Times a step of `lanes` clients and averages the number of steps over sampled cohorts."""
    work = experiment.work
    cohorts = [sample_cohort(work, round).steps for round in range(_COHORTS)]
    steps = float(np.mean([longest_lane(cohort, lanes) for cohort in cohorts]))
    use = float(np.mean([cohort.sum() for cohort in cohorts])) / (steps * lanes)
    return LaneTrial(lanes, _step_seconds(experiment, lanes), steps, use)


def _step_seconds(experiment: Experiment, lanes: int) -> float:
    engine = start_engine(experiment)
    state = first_state(experiment)
    members = max(lanes, experiment.work.participation.cohort)  # the trial needs no more client memories
    memories = jax.tree.map(lambda leaf: leaf[np.arange(members) % len(leaf)], state.clients)
    state = engine.place_state(state._replace(clients=memories))
    plans = [engine.place_plan(_trial_plan(experiment, lanes, steps)) for steps in _STEPS]
    durations = np.zeros((_REPEATS + 1, len(plans)))
    for repeat in range(_REPEATS + 1):
        for index, plan in enumerate(plans):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(engine.run(state, plan))
            durations[repeat, index] = time.perf_counter() - started
    short, long = np.median(durations[1:], axis=0)  # the first repeat compiles
    return max(float(long - short), 1e-9) / (_STEPS[1] - _STEPS[0])


def _trial_plan(experiment: Experiment, lanes: int, steps: int) -> Plan:
    """One round in which every lane trains one of the largest clients for `steps` full batches, without evaluation."""
    work = experiment.work
    longest = sorted(range(len(work.parts)), key=lambda client: -len(work.parts[client]))[:lanes]
    parts = [np.resize(work.parts[client], work.local.batch_size * max(_STEPS)) for client in longest]
    parts += [parts[0]] * (max(lanes, work.participation.cohort) - len(parts))
    trial = work._replace(
        parts=parts,
        participation=dataclasses.replace(work.participation, dropout=0.0, stragglers=0.0, cohort=len(parts)),
        local=dataclasses.replace(work.local, epochs=1, maximum_steps=max(_STEPS)),
        sizes=None,
        preparation=work.preparation and work.preparation._replace(charged=0),
    )
    plan = plan_chunk(trial, 0, 1, capacity=1, lanes=lanes, evaluate_every=2, last_round=2)
    nobody = plan.preparations._replace(turns=np.zeros((lanes, 1), np.int32))  # a round's preparation is no step
    return plan._replace(lanes=plan.lanes._replace(steps=np.full((lanes, 1), steps, np.int32)), preparations=nobody)
