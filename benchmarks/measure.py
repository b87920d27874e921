"""What the benchmark scripts share: timing rounds of several engines in turn, and writing rows with their circumstances."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jax
import numpy as np

from fedjax_qp.engine import Engine
from fedjax_qp.experiment import Experiment, environment, first_state, start_engine
from fedjax_qp.plan import Plan
from fedjax_qp.simulate import chunk_plan


class TimedRounds:
    """One engine and its plans of single rounds without evaluation; compiles on creation."""

    def __init__(self, experiment: Experiment, lanes: int, rounds: int):
        self.engine: Engine = start_engine(experiment)
        self.plans: list[Plan] = [self._plan(experiment, lanes, round) for round in range(rounds)]
        self.steps = sum(int(np.max(plan.lanes.steps)) for plan in self.plans)
        self.client_steps = sum(int(np.sum(plan.lanes.steps)) for plan in self.plans)
        self.longest = sum(int(np.max(plan.cohorts.steps)) for plan in self.plans)
        self.plans = [self.engine.place_plan(plan) for plan in self.plans]
        self.state = self.engine.place_state(first_state(experiment))
        started = time.perf_counter()
        self()  # also gives mutating methods an update to mutate along
        self.compile_seconds = time.perf_counter() - started

    @staticmethod
    def _plan(experiment: Experiment, lanes: int, round: int) -> Plan:
        plan = chunk_plan(experiment, lanes, round, 1)
        return plan._replace(evaluate=np.zeros_like(plan.evaluate))

    def __call__(self) -> None:
        for plan in self.plans:
            self.state, _ = jax.block_until_ready(self.engine.run(self.state, plan))


def in_turn(candidates: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every candidate, measured A B C A B C …, so that a slow minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def paired_ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Median and spread of the ratio within each turn."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def write_rows(rows: list[dict], file: Path) -> None:
    """One JSON object a line; every row says where it was measured."""
    circumstances = environment()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({**row, "environment": circumstances}) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row))
