"""fedjax_qp on a workload: the program and the loop of `simulate`, without records and checkpoints.

Plans are made while the device runs, as in `simulate`, and count in the time. The number of lanes is what `lanes: auto`
picks, except where its trials would take many minutes on a CPU and the workload names a number; the choice is kept in the
exchange folder, so that further peers are compared with the same program.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from exchange import Block, Workload, serve

from fedjax_qp import config as configuration
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import Experiment, build, first_state, start_engine
from fedjax_qp.federated import FederatedState
from fedjax_qp.runs.autotune import choose_layout
from fedjax_qp.runs.environment import environment
from fedjax_qp.runs.loop import chunk_bounds, chunk_plan


def pick_layout(experiment: Experiment) -> dict[str, Any]:
    """The workload's numbers of lanes and devices, or those picked before, or `auto`'s; with what is known of the choice."""
    kept = Path(sys.argv[1]) / "layout.json"
    if not kept.exists():
        started = time.perf_counter()
        choice = choose_layout([experiment])
        trials = [[*trial.layout[:2], trial.round_seconds] for trial in choice.trials]
        facts = {**choice.layout._asdict(), "trials": trials}
        kept.write_text(json.dumps({**facts, "trial_seconds": time.perf_counter() - started}))
    return json.loads(kept.read_text())


def prepare(workload: Workload) -> tuple[Any, dict[str, Any]]:
    experiment = build(configuration.from_dict(workload.settings["config"]))
    facts = pick_layout(experiment)
    layout = Layout(*(facts[name] for name in Layout._fields))
    engine, first = start_engine([experiment], layout), first_state(experiment)
    bounds = chunk_bounds(0, workload.settings["rounds"], experiment.config.engine.rounds_per_chunk)

    def run_block() -> Block:
        state, plan, found = engine.place_states([first]), chunk_plan([experiment], layout.lanes, *bounds[0]), []
        for (_, rounds), following in zip(bounds, [*bounds[1:], None], strict=True):
            state, metrics = engine.run(state, engine.place_plan(plan))
            plan = chunk_plan([experiment], layout.lanes, *following) if following else plan  # while the device works
            found.append(jax.device_get(metrics)["client/loss"][:rounds])
        losses = np.concatenate(found).mean(1, dtype=np.float64).tolist()
        return Block(losses, _moved(jax.device_get(state)))

    def _moved(state: FederatedState) -> float:
        last, begun = (experiment.algorithm.serve(one.server, ()).trainable for one in (state, first))
        squares = jax.tree.map(lambda a, b: float(((np.asarray(a) - np.asarray(b)) ** 2).sum()), last, begun)
        return float(np.sqrt(sum(jax.tree.leaves(squares))))

    return run_block, {**facts, "environment": environment()}


if __name__ == "__main__":
    serve(prepare)
