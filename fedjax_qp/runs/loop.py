"""The loop over chunks: plan on the host, run on the device, hand back the records. For notebooks and for `run`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from fedjax_qp.engine import Engine, Layout, host_copy
from fedjax_qp.engine.plan import Plan, of_run, plan_chunk, taken_part
from fedjax_qp.experiment import Experiment, first_state, start_engine
from fedjax_qp.federated import FederatedState
from fedjax_qp.runs.autotune import choose_layout
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


def chunk_plan(experiments: Sequence[Experiment], lanes: int, first_round: int, rounds: int) -> Plan:
    """The plan of one chunk of experiments that share a program."""
    config = experiments[0].config
    return plan_chunk(
        [experiment.work for experiment in experiments],
        first_round,
        rounds,
        capacity=config.engine.rounds_per_chunk,
        lanes=lanes,
        evaluate_every=config.evaluation.every,
        last_round=config.rounds,
    )


def simulate(
    experiments: Sequence[Experiment],
    states: Sequence[FederatedState | None] | None = None,
    layout: Layout | None = None,
    stopped: Set[int] = frozenset(),
    started: Callable[[], None] = lambda: None,
    gone: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[list[Chunk | NonFiniteLoss | None]]:
    """Runs X experiments in one program to their last round; one experiment is X = 1. See `programs`.

    Args:
      states: as handed back by earlier chunks; None, also for a single one, starts at the beginning. All must have finished
        equally many rounds.
      layout: None measures what the settings leave open.
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
    config, runs = experiments[0].config, len(experiments)
    states = [None] * runs if states is None else states
    broken: set[int] = set()
    layout = choose_layout(experiments).layout if layout is None else layout
    pairs = zip(experiments, states, strict=True)
    host = [first_state(experiment) if state is None else host_copy(state) for experiment, state in pairs]
    engine = start_engine(experiments, layout)
    bounds = chunk_bounds(int(host[0].round), config.rounds, config.engine.rounds_per_chunk)
    if config.engine.client_store == "host":
        store: ClientStore = HostStore(host, config.engine.rounds_per_chunk * config.participation.cohort)
    else:
        store = ClientStore()

    waits = any(map(waits_for_memories, experiments))

    def plan_of(first_round: int, rounds: int, states: Sequence[FederatedState]) -> Plan:
        ended = stopped | broken | {run for run, since in gone.items() if first_round >= since}
        planned = []
        for run, (experiment, state) in enumerate(zip(experiments, states, strict=True)):
            work = experiment.work._replace(stopped=run in ended, memories=state.clients if waits else None)
            planned.append(experiment._replace(work=work))
        return chunk_plan(planned, layout.lanes, first_round, rounds)

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
    device_state, metrics = launch(engine.place_states(store.take_out(host)), plan)
    started()
    for (first_round, _), following in zip(bounds, [*bounds[1:], None], strict=True):
        next_plan = plan_of(*following, host) if following and not waits else None  # while the device works
        found = engine.metrics(metrics)
        finished = store.put_back(engine, device_state, plan)
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


def of_one_run(chunks: Iterable[list[Chunk | NonFiniteLoss | None]]) -> Iterator[Chunk]:
    """The chunks of a run alone.

    Raises:
      NonFiniteLoss: some client's training loss was not finite; that chunk is not handed back.
    """
    for (chunk,) in chunks:
        if isinstance(chunk, NonFiniteLoss):
            raise chunk
        assert chunk is not None
        yield chunk


def _nonfinite(experiment: Experiment, round: int, clients: list[int]) -> NonFiniteLoss:
    lengths = ["local.momentum", *(f"algorithm.{option}" for option in experiment.algorithm.step_sizes)]
    return NonFiniteLoss(
        f"the training loss is not finite in round {round}, clients {clients}: lower local.learning_rate (now "
        f"{experiment.config.local.learning_rate}) or {' or '.join(lengths)}, or set local.clip_norm."
    )


class ClientStore:
    """Client memories stay on the device, all of them."""

    def take_out(self, states: Sequence[FederatedState]) -> Sequence[FederatedState]:
        """The part of each run's state that lies on the device between chunks."""
        return states

    def load(self, engine: Engine, state: FederatedState, plan: Plan) -> tuple[FederatedState, Plan]:
        """Adds the memories that a plan needs."""
        return state, plan

    def put_back(self, engine: Engine, state: FederatedState, plan: Plan) -> list[FederatedState]:
        """The whole state of each run on the host, after the plan was run."""
        return engine.states(state)


class HostStore(ClientStore):
    """Client memories stay on the host; the device sees only the rows that a chunk uses."""

    def __init__(self, states: Sequence[FederatedState], most_rows: int):
        self.memories = [state.clients for state in states]
        clients = [len(leaf) for leaf in jax.tree.leaves(self.memories)]
        self.capacity = min([most_rows, *clients])

    def take_out(self, states: Sequence[FederatedState]) -> Sequence[FederatedState]:
        nothing = np.zeros(self.capacity, np.int64)
        return [state._replace(clients=_rows(state.clients, nothing)) for state in states]

    def load(self, engine: Engine, state: FederatedState, plan: Plan) -> tuple[FederatedState, Plan]:
        used = self._used(plan)
        fixed_number = [
            np.resize(clients, self.capacity) for clients in used
        ]  # repeats rows: shapes must not depend on the plan
        placed = engine.place_states(list(map(_rows, self.memories, fixed_number)))
        runs = len(used)
        # A round that is not in use names clients that are not there; they stay within the rows.
        rows = [
            np.minimum(np.searchsorted(clients, of_run(plan, run, runs).cohorts.clients), len(clients) - 1)
            for run, clients in enumerate(used)
        ]
        return state._replace(clients=placed), plan._replace(rows=np.concatenate(rows, axis=1).astype(np.int32))

    def put_back(self, engine: Engine, state: FederatedState, plan: Plan) -> list[FederatedState]:
        found = engine.states(state)
        for memories, run, used in zip(self.memories, found, self._used(plan), strict=True):
            for whole, rows in zip(jax.tree.leaves(memories), jax.tree.leaves(run.clients), strict=True):
                whole[used] = rows[: len(used)]
        return [host_copy(run._replace(clients=own)) for run, own in zip(found, self.memories, strict=True)]

    def _used(self, plan: Plan) -> list[Int[np.ndarray, "U"]]:
        """The clients of each run in a plan."""
        runs = len(self.memories)
        cohorts = [of_run(plan, run, runs).cohorts.clients for run in range(runs)]
        return [np.unique(clients[: int(plan.rounds)]) for clients in cohorts]


def _rows(memories: PyTree, clients: Int[np.ndarray, "U"]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[clients], memories)
