"""The loop over chunks: plan on the host, run on the device, hand back the records. For notebooks and for `run`."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from fedjax_qp.engine import Engine
from fedjax_qp.engine.plan import Plan, of_run, plan_together, taken_part
from fedjax_qp.experiment import Experiment, first_state, host_copy, join_states, start_shared_engine
from fedjax_qp.federated import FederatedState
from fedjax_qp.runs.autotune import definite_layout
from fedjax_qp.runs.records import chunk_records, nonfinite_clients


class NonFiniteLoss(RuntimeError):
    """Training left the finite numbers; the message names the round and the clients."""


class Chunk(NamedTuple):
    """What the loop hands back after each chunk of rounds."""

    state: FederatedState  # on the host; a copy of the caller's own
    records: list[dict]  # one per round, see `records.chunk_records`


def chunk_bounds(first_round: int, rounds: int, rounds_per_chunk: int) -> list[tuple[int, int]]:
    """(first round, rounds) of each chunk.

    Chunks end at multiples of `rounds_per_chunk`, wherever a run starts. All of them run the same program with a dynamic
    number of rounds, so where they end does not change a bit of the result.
    """
    ends = [*range(rounds_per_chunk, rounds, rounds_per_chunk), rounds]
    starts = [first_round, *(end for end in ends if end > first_round)]
    return [(start, end - start) for start, end in zip(starts[:-1], starts[1:], strict=True)]


def planned_without(experiment: Experiment, ended: int, diverged: bool) -> int:
    """The first round that is planned without a run that has ended after a chunk: the device is a chunk ahead.

    Args:
      ended: rounds that it finished.
      diverged: in the chunk after those, which is another one ahead unless the host has to wait for it.
    """
    config = experiment.config
    ends = [start + rounds for start, rounds in chunk_bounds(ended, config.rounds, config.engine.rounds_per_chunk)]
    return [*ends, config.rounds, config.rounds][int(diverged and not waits_for_memories(experiment))]


def waits_for_memories(experiment: Experiment) -> bool:
    """Whether a cohort depends on the round before: the host then cannot plan while the device works."""
    sampling = experiment.work.sampling
    return sampling is not None and sampling.reads_memories


def chunk_plan(experiments: Experiment | Sequence[Experiment], lanes: int, first_round: int, rounds: int) -> Plan:
    """The plan of one chunk of an experiment, or of several that share a program."""
    together = [experiments] if isinstance(experiments, Experiment) else experiments
    config = together[0].config
    return plan_together(
        [experiment.work for experiment in together],
        first_round,
        rounds,
        capacity=config.engine.rounds_per_chunk,
        lanes=lanes,
        evaluate_every=config.evaluation.every,
        last_round=config.rounds,
    )


def simulate(experiment: Experiment, state: FederatedState | None = None) -> Iterator[Chunk]:
    """Runs an experiment from `state` (default: from the beginning) to its last round.

    Args:
      experiment: what to run; with `engine.lanes: auto` the number of lanes is measured first.
      state: as handed back by an earlier chunk.

    Yields:
      One `Chunk` per program call.

    Raises:
      NonFiniteLoss: some client's training loss was not finite; the chunk is not handed back.
    """
    for (chunk,) in simulate_together([experiment], [state]):
        if isinstance(chunk, NonFiniteLoss):
            raise chunk
        assert chunk is not None
        yield chunk


def simulate_together(
    experiments: Sequence[Experiment],
    states: Sequence[FederatedState | None],
    stopped: Set[int] = frozenset(),
    started: Callable[[], None] = lambda: None,
    gone: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[list[Chunk | NonFiniteLoss | None]]:
    """Runs several experiments in one program; see `together`.

    Args:
      states: None starts at the beginning; all must have finished equally many rounds.
      stopped: positions of experiments that go no further. The caller may add to it between chunks, which takes effect
        with the next chunk but one: the device is a chunk ahead.
      gone: positions of experiments that ended in an earlier process, with the first round that is planned without them.
        Until then the others share their lanes with them, as they did when the end was not yet known. Nothing of theirs is
        handed back.
      started: called when the program is compiled and the device begins with the first round.

    Yields:
      Per program call and experiment a `Chunk`; None once it is in `stopped`; and the error, once, where its training has
      left the finite numbers, after which it is stopped too.
    """
    experiments = definite_layout(experiments)
    config, broken, lanes = experiments[0].config, set(), experiments[0].config.engine.lanes
    assert lanes != "auto"
    pairs = zip(experiments, states, strict=True)
    host = [first_state(experiment) if state is None else host_copy(state) for experiment, state in pairs]
    runs, engine = len(experiments), start_shared_engine(experiments)
    bounds = chunk_bounds(int(host[0].round), config.rounds, config.engine.rounds_per_chunk)
    if config.engine.client_store == "host":
        store: ClientStore = HostStore(host[0].clients, config.engine.rounds_per_chunk * config.participation.cohort)
    else:
        store = ClientStore()

    waits = any(map(waits_for_memories, experiments))

    def plan_of(first_round: int, rounds: int, states: Sequence[FederatedState]) -> Plan:
        ended = stopped | broken | {run for run, since in gone.items() if first_round >= since}
        planned = []
        for run, (experiment, state) in enumerate(zip(experiments, states, strict=True)):
            work = experiment.work._replace(stopped=run in ended, memories=state.clients if waits else None)
            planned.append(experiment._replace(work=work))
        return chunk_plan(planned, lanes, first_round, rounds)

    def launch(device_state: FederatedState, plan: Plan) -> tuple[FederatedState, dict]:
        device_state, local_plan = store.load(engine, device_state, plan)
        return engine.run(device_state, engine.place_plan(local_plan))

    def chunk_of(run: int, state: FederatedState, metrics: dict, plan: Plan, first_round: int) -> Chunk | NonFiniteLoss:
        experiment = experiments[run]
        clients = nonfinite_clients(metrics, plan, first_round)
        if clients is not None:
            broken.add(run)
            return _nonfinite(experiment, *clients)
        # Only clients' own tests are reported by it.
        seen = taken_part(experiment.work, 0, first_round) if experiment.task.personal is not None else set()
        return Chunk(
            state, chunk_records(metrics, plan, first_round, experiment.task.shares, seen, experiment.model.scores)
        )

    if not bounds:
        return
    plan = plan_of(*bounds[0], host)
    device_state, metrics = launch(engine.place_state(store.take_out(join_states(host))), plan)
    started()
    for (first_round, _), following in zip(bounds, [*bounds[1:], None], strict=True):
        next_plan = plan_of(*following, host) if following and not waits else None  # while the device works
        found = _separate(jax.device_get(metrics), runs, axis=1)
        finished = _separate(store.put_back(device_state, plan), runs, axis=0)
        ended = stopped | broken | gone.keys()
        chunks = [
            None if run in ended else chunk_of(run, finished[run], found[run], of_run(plan, run, runs), first_round)
            for run in range(runs)
        ]
        if following and waits:
            next_plan = plan_of(*following, finished)
        if len(broken | gone.keys()) == runs:
            next_plan = None
        if next_plan is not None:  # the device goes on while the caller writes records and checkpoints
            device_state, metrics = launch(device_state, next_plan)
            plan = next_plan
        yield chunks
        if len(stopped | broken | gone.keys()) == runs:
            return


def _nonfinite(experiment: Experiment, round: int, clients: list[int]) -> NonFiniteLoss:
    lengths = ["local.momentum", *(f"algorithm.{option}" for option in experiment.algorithm.step_sizes)]
    return NonFiniteLoss(
        f"the training loss is not finite in round {round}, clients {clients}: lower local.learning_rate (now "
        f"{experiment.config.local.learning_rate}) or {' or '.join(lengths)}, or set local.clip_norm."
    )


def _separate(tree: PyTree, runs: int, axis: int) -> list[PyTree]:
    """The parts of each run; a run alone has no axis of runs."""
    if runs == 1:
        return [tree]
    return [jax.tree.map(partial(np.take, indices=run, axis=axis), tree) for run in range(runs)]


class ClientStore:
    """Client memories stay on the device, all of them."""

    def take_out(self, state: FederatedState) -> FederatedState:
        """The part of a state that lies on the device between chunks."""
        return state

    def load(self, engine: Engine, state: FederatedState, plan: Plan) -> tuple[FederatedState, Plan]:
        """Adds the memories that a plan needs."""
        return state, plan

    def put_back(self, state: FederatedState, plan: Plan) -> FederatedState:
        """The whole state on the host, after the plan was run."""
        return host_copy(state)


class HostStore(ClientStore):
    """Client memories stay on the host; the device sees only the rows that a chunk uses."""

    def __init__(self, memories: PyTree, most_rows: int):
        self.memories = memories
        clients = [len(leaf) for leaf in jax.tree.leaves(memories)]
        self.capacity = min([most_rows, *clients])

    def take_out(self, state: FederatedState) -> FederatedState:
        return state._replace(clients=self._rows(np.zeros(self.capacity, np.int64)))

    def load(self, engine: Engine, state: FederatedState, plan: Plan) -> tuple[FederatedState, Plan]:
        used = self._used(plan)
        fixed_number = np.resize(used, self.capacity)  # repeats rows: shapes must not depend on the plan
        rows = np.searchsorted(used, plan.cohorts.clients).astype(np.int32)
        clients = engine.place_state(self._rows(fixed_number))
        return state._replace(clients=clients), plan._replace(rows=np.minimum(rows, len(used) - 1))

    def put_back(self, state: FederatedState, plan: Plan) -> FederatedState:
        used = self._used(plan)
        new = host_copy(state.clients)
        for whole, rows in zip(jax.tree.leaves(self.memories), jax.tree.leaves(new), strict=True):
            whole[used] = rows[: len(used)]
        return host_copy(state._replace(clients=self.memories))

    def _used(self, plan: Plan) -> Int[np.ndarray, "U"]:
        return np.unique(plan.cohorts.clients[: int(plan.rounds)])

    def _rows(self, clients: Int[np.ndarray, "U"]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[clients], self.memories)
