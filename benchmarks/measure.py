"""What the benchmark scripts share: timing rounds of several engines in turn, and writing rows with their circumstances."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import jax
import numpy as np

from fedjax_qp.config import Config
from fedjax_qp.engine import Engine, Layout
from fedjax_qp.engine.plan import Plan
from fedjax_qp.experiment import Experiment, build, first_state, start_engine
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.environment import environment
from fedjax_qp.runs.loop import chunk_plan


class TimedRounds:
    """One engine and its plans of single rounds without evaluation; compiles on creation."""

    def __init__(self, experiment: Experiment, layout: Layout, rounds: int):
        self.engine: Engine = start_engine([experiment], layout)
        plans = [self._plan(experiment, layout.lanes, round) for round in range(rounds)]
        self.steps = sum(int(np.max(plan.lanes.steps)) for plan in plans)
        self.client_steps = sum(int(np.sum(plan.lanes.steps)) for plan in plans)
        self.longest = sum(int(np.max(plan.cohorts.steps)) for plan in plans)
        self.plans = [self.engine.place_plan(plan) for plan in plans]
        self.state = self.engine.place_states([first_state(experiment)])
        started = time.perf_counter()
        self()  # also gives mutating methods an update to mutate along
        self.compile_seconds = time.perf_counter() - started

    @staticmethod
    def _plan(experiment: Experiment, lanes: int, round: int) -> Plan:
        plan = chunk_plan([experiment], lanes, round, 1)
        return plan._replace(evaluate=np.zeros_like(plan.evaluate))

    def __call__(self) -> None:
        for plan in self.plans:
            self.state, _ = jax.block_until_ready(self.engine.run(self.state, plan))


class OtherProcess:
    """A process that measures one configuration by `answer_requests`; several are alive together and asked in turn."""

    def __init__(self, script: str, *arguments: str, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._ask, self._answers = self._process.stdin, self._process.stdout
        self.program: dict = self._answer()

    def seconds(self) -> float:
        """Of one chunk."""
        self._ask.write("\n")
        self._ask.flush()
        return self._answer()

    def peak_bytes(self) -> int:
        """Resident memory of the whole process, compilation included; ends it."""
        self._ask.close()
        return self._answer()

    def _answer(self):
        line = self._answers.readline()
        if not line:
            raise SystemExit("a process ended without an answer; see its message above")
        return json.loads(line)


def answer_requests(config: Config) -> None:
    """Such a process: says what was compiled for a chunk, then runs one for every line it reads."""
    experiment = build(config)
    layout = choose_layout([experiment]).layout
    engine = start_engine([experiment], layout)
    state = engine.place_states([first_state(experiment)])
    plan = engine.place_plan(chunk_plan([experiment], layout.lanes, 0, config.engine.rounds_per_chunk))
    found = engine.compiled(state, plan).memory_analysis()
    assert found is not None
    state, _ = jax.block_until_ready(engine.run(state, plan))
    program = {
        "temporary_bytes": found.temp_size_in_bytes,
        "argument_bytes": found.argument_size_in_bytes,
        "client_steps": int(plan.plan.lanes.steps.sum()),
    }
    print(json.dumps(program), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        state, _ = jax.block_until_ready(engine.run(state, plan))
        print(json.dumps(time.perf_counter() - started), flush=True)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024), flush=True)


def in_turn(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
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
    """One JSON object a line; every row says where it was measured, older ones what they said."""
    circumstances = environment()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"environment": circumstances, **row}) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row))
