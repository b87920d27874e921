"""Host side of a round: which clients take part, which examples each step sees, and which client runs on which lane.

Everything here is numpy and a function of (seed, round): a plan does not depend on earlier rounds, so a resumed run makes
the same plans, and the host makes the next chunk's plan while the device runs the present one.

Clients of one cohort differ widely in size, so they are packed into L lanes, longest first into the emptiest lane, and a
lane runs its clients one after another. The number of steps of a round is then about total/L instead of the longest.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from fedjax_qp.config import Local, Participation
from fedjax_qp.federated import Cohort, Preparation, Sampling
from fedjax_qp.streams import Stream, generator

IDLE = -1  # a lane without a client, and a padded example


class Lanes(NamedTuple):
    """The work of L lanes over R rounds of at most S steps with batches of B. Lanes come first: devices split that axis."""

    slots: Int[Array | np.ndarray, "L R S"]  # position in the cohort, or IDLE
    local_steps: Int[Array | np.ndarray, "L R S"]  # the client's own step count; 0 is where it starts
    examples: Int[Array | np.ndarray, "L R S B"]  # indices of training examples; IDLE is padding
    steps: Int[Array | np.ndarray, "L R"]  # steps in use


class Preparations(NamedTuple):
    """Who prepares in which round: U turns of one client a lane, each with P batches. U = 0 where nobody ever does."""

    slots: Int[Array | np.ndarray, "L R U"]  # position in the cohort, or IDLE
    examples: Int[Array | np.ndarray, "L R U P B"]  # indices of training examples; IDLE is padding
    turns: Int[Array | np.ndarray, "L R"]  # turns in use


class Plan(NamedTuple):
    """One chunk of R rounds, ready for the device."""

    cohorts: Cohort  # arrays [R, M]
    rows: Int[Array | np.ndarray, "R M"]  # where the cohort's memories lie in the client store
    lanes: Lanes
    preparations: Preparations
    evaluate: Bool[Array | np.ndarray, "R"]
    rounds: Int[Array | np.ndarray, ""]  # rounds in use, ≤ R


class Workload(NamedTuple):
    """What is fixed over a run: the clients' examples and the rules of local work."""

    parts: list[np.ndarray]  # per client, indices of its training examples
    participation: Participation
    local: Local
    seed: int
    sizes: list[int] | None = None  # per client, its weight by size; None = its number of training examples
    preparation: Preparation | None = None  # of methods that prepare their clients
    sampling: Sampling | None = None  # of methods that draw their own cohorts
    memories: PyTree = None  # [K, ...] on the host, for a method that draws by them
    stopped: bool = False  # takes no further part in a program that it shares with others; nobody works


def client_steps(size: int, local: Local) -> int:
    """Local steps of a client: E·ceil(n/B), the last partial batch kept, cut at `local.maximum_steps`."""
    steps = local.epochs * -(-size // local.batch_size)
    return steps if local.maximum_steps is None else min(steps, local.maximum_steps)


def straggler_steps(steps: Int[np.ndarray, "M"], settings: Participation) -> Int[np.ndarray, "M"]:
    """What is left of local steps for clients that do only part of their work."""
    return np.maximum(1, np.ceil(steps * settings.straggler_work)).astype(steps.dtype)


def fewest_steps(work: Workload) -> tuple[int, int]:
    """The fewest local steps of any client that reports, as a straggler where there are any, and that client."""
    steps = np.array([client_steps(len(part), work.local) for part in work.parts])
    if work.participation.stragglers > 0:
        steps = straggler_steps(steps, work.participation)
    return int(steps.min()), int(steps.argmin())


def sample_cohort(work: Workload, round: int) -> Cohort:
    """Draws M clients without replacement, or as the method says, then which of them drop out or do only part of their work.

    A client that is drawn twice does the same work twice, and counts twice.

    Raises:
      ValueError: the method draws by the clients' memories, and there are none.
    """
    settings = work.participation
    numbers = generator(work.seed, Stream.COHORT, round=round)
    everyone = np.array([len(part) for part in work.parts] if work.sizes is None else work.sizes)
    if work.sampling is None:
        clients = numbers.choice(len(everyone), settings.cohort, replace=False)
    elif work.sampling.reads_memories and work.memories is None:
        raise ValueError("this method's cohorts depend on the client memories that the round before left")
    else:
        clients = np.asarray(work.sampling.draw(everyone, work.memories, settings.cohort, numbers))
    sizes = everyone[clients]
    steps = np.array([client_steps(len(work.parts[client]), work.local) for client in clients])
    _, first, places = np.unique(clients, return_index=True, return_inverse=True)
    drops, lags = numbers.random((2, settings.cohort))[:, first[places]]
    steps = np.where(lags < settings.stragglers, straggler_steps(steps, settings), steps)
    steps = np.where((drops < settings.dropout) | work.stopped, 0, steps)
    return Cohort(clients.astype(np.int32), sizes.astype(np.float32), steps.astype(np.int32))


def taken_part(work: Workload, first_round: int, end: int) -> set[int]:
    """Clients who reported in at least one of the rounds `first_round` … `end` − 1."""
    cohorts = [sample_cohort(work, round) for round in range(first_round, end)]
    return {int(client) for cohort in cohorts for client in cohort.clients[cohort.steps > 0]}


def _prepared(work: Workload, round: int) -> set[int]:
    """Clients who need no preparation in a round: they have taken part since preparations last began anew."""
    if work.preparation is None:
        return set()
    every = work.preparation.every
    return taken_part(work, 0 if every is None else round // every * every, round)


def client_batches(
    work: Workload, round: int, client: int, steps: int, stream: Stream = Stream.BATCHES
) -> Int[np.ndarray, "S B"]:
    """Indices of the examples of a client's first `steps` batches; each epoch is a new permutation."""
    part, size = work.parts[client], work.local.batch_size
    numbers = generator(work.seed, stream, round=round, client=client)
    per_epoch = -(-len(part) // size)
    epochs = -(-steps // per_epoch)
    batches = np.full((epochs, per_epoch * size), IDLE, np.int32)
    for epoch in range(epochs):
        batches[epoch, : len(part)] = numbers.permutation(part)
    return batches.reshape(-1, size)[:steps]


def pack(steps: Int[Array | np.ndarray, "M"], lanes: int) -> list[list[int]]:
    """Longest client first into the emptiest lane (Graham 1969, LPT).

    Returns:
      Per lane, the cohort slots it runs, in order. Clients without steps appear nowhere.
    """
    assigned: list[list[int]] = [[] for _ in range(lanes)]
    emptiest = [(0, lane) for lane in range(lanes)]
    for slot in np.argsort(-steps, kind="stable"):
        if steps[slot] > 0:
            load, lane = heapq.heappop(emptiest)
            assigned[lane].append(int(slot))
            heapq.heappush(emptiest, (load + int(steps[slot]), lane))
    return assigned


def longest_lane(steps: Int[Array | np.ndarray, "M"], lanes: int) -> int:
    """Steps that a round takes on the device."""
    return max(sum(int(steps[slot]) for slot in lane) for lane in pack(steps, lanes))


def steps_bound(works: Sequence[Workload], lanes: int) -> int:
    """The most steps any round can take, so that every chunk has the same shape and compiles once.

    List scheduling never exceeds total/L + (1 − 1/L)·longest (Graham 1969); the worst cohort is the M largest clients, or M
    times the largest where clients may be drawn more than once.
    """

    def worst_cohort(work: Workload) -> list[int]:
        steps = sorted(client_steps(len(part), work.local) for part in work.parts)
        return (steps if work.sampling is None else steps[-1:] * len(steps))[-work.participation.cohort :]

    worst = [steps for work in works for steps in worst_cohort(work)]
    return max(1, (sum(worst) + (lanes - 1) * max(worst)) // lanes)


def plan_bytes(work: Workload, rounds: int, lanes: int) -> int:
    """What the arrays of a plan of so many rounds take; see `plan_chunk`."""
    members, batch = work.participation.cohort, work.local.batch_size
    turns, batches = (-(-members // lanes), work.preparation.batches) if work.preparation is not None else (0, 0)
    of_lane = steps_bound([work], lanes) * (2 + batch) + turns * (1 + batches * batch)
    return 4 * rounds * (lanes * of_lane + 4 * members)


def plan_chunk(
    works: Sequence[Workload],
    first_round: int,
    rounds: int,
    *,
    capacity: int,
    lanes: int,
    evaluate_every: int,
    last_round: int,
) -> Plan:
    """Plans `rounds` rounds from `first_round` on, of X runs that share their lanes; one run is X = 1.

    All runs have cohorts of the same size M and batches of the same size. Their cohorts stand one after another: in the
    plan M is X·M, and slot s is client s mod M of run s div M.

    Args:
      capacity: R, the chunk's fixed number of rounds; `rounds` ≤ R.
      evaluate_every: evaluation after each round whose number (from 1) is a multiple of it, and after `last_round`.

    Returns:
      A plan whose shapes do not depend on the rounds. `rows` equals the clients (a store that holds all of them).
    """
    members, batch, bound = works[0].participation.cohort, works[0].local.batch_size, steps_bound(works, lanes)
    everyone = members * len(works)
    cohorts = Cohort(
        np.zeros((capacity, everyone), np.int32),
        np.zeros((capacity, everyone), np.float32),
        np.zeros((capacity, everyone), np.int32),
    )
    work_lanes = Lanes(
        np.full((lanes, capacity, bound), IDLE, np.int32),
        np.zeros((lanes, capacity, bound), np.int32),
        np.full((lanes, capacity, bound, batch), IDLE, np.int32),
        np.zeros((lanes, capacity), np.int32),
    )
    preparations = _no_preparations(works, capacity, lanes)
    # Kept up to date by `_cohort`, so that the cohorts before this chunk are drawn but once.
    prepared = [_prepared(work, first_round) for work in works]
    for index in range(rounds):
        round = first_round + index
        planned = [_cohort(work, round, before) for work, before in zip(works, prepared, strict=True)]
        for whole, parts in zip(cohorts, zip(*(cohort for cohort, _ in planned), strict=True), strict=True):
            whole[index] = np.concatenate(parts)
        prepares = np.concatenate([prepares for _, prepares in planned])
        _fill_preparations(preparations, works, cohorts.clients[index], prepares, round, index)
        _fill_lanes(work_lanes, works, cohorts, round, index)
    numbers = first_round + 1 + np.arange(capacity)
    evaluate = (numbers % evaluate_every == 0) | (numbers == last_round)
    return Plan(cohorts, cohorts.clients.copy(), work_lanes, preparations, evaluate, np.array(rounds, np.int32))


def of_run(plan: Plan, run: int, runs: int) -> Plan:
    """The part of a plan that records are made of, for one of its runs; lanes and preparations stay everybody's."""
    members = plan.cohorts.clients.shape[1] // runs
    mine = slice(run * members, (run + 1) * members)
    return plan._replace(cohorts=Cohort(*(leaf[:, mine] for leaf in plan.cohorts)), rows=plan.rows[:, mine])


def _cohort(work: Workload, round: int, prepared: set[int]) -> tuple[Cohort, Bool[np.ndarray, "M"]]:
    """The cohort of a round, and who of it prepares; what that counts for is taken off.

    Args:
      prepared: clients prepared before this round. Those who report are added.
    """
    cohort = sample_cohort(work, round)
    if work.preparation is None:
        return cohort, np.zeros(len(cohort.clients), bool)
    if work.preparation.every is not None and round % work.preparation.every == 0:
        prepared.clear()
    reports = np.asarray(cohort.steps > 0)
    prepares = reports & ~np.isin(cohort.clients, list(prepared))
    prepared.update(cohort.clients[reports].tolist())
    fewer = np.maximum(cohort.steps - work.preparation.charged, 1)
    return cohort._replace(steps=np.where(prepares, fewer, cohort.steps).astype(np.int32)), prepares


def _fill_lanes(lanes: Lanes, works: Sequence[Workload], cohorts: Cohort, round: int, index: int) -> None:
    members = works[0].participation.cohort
    for lane, slots in enumerate(pack(cohorts.steps[index], len(lanes.slots))):
        position = 0
        for slot in slots:
            steps, client = int(cohorts.steps[index, slot]), int(cohorts.clients[index, slot])
            span = slice(position, position + steps)
            lanes.slots[lane, index, span] = slot
            lanes.local_steps[lane, index, span] = np.arange(steps)
            lanes.examples[lane, index, span] = client_batches(works[slot // members], round, client, steps)
            position += steps
        lanes.steps[lane, index] = position


def _no_preparations(works: Sequence[Workload], capacity: int, lanes: int) -> Preparations:
    wanted, everyone = works[0].preparation, works[0].participation.cohort * len(works)
    turns = -(-everyone // lanes) if wanted is not None else 0
    batches = wanted.batches if wanted is not None else 0
    return Preparations(
        np.full((lanes, capacity, turns), IDLE, np.int32),
        np.full((lanes, capacity, turns, batches, works[0].local.batch_size), IDLE, np.int32),
        np.zeros((lanes, capacity), np.int32),
    )


def _fill_preparations(
    preparations: Preparations,
    works: Sequence[Workload],
    clients: Int[Array | np.ndarray, "XM"],
    prepares: Bool[np.ndarray, "XM"],
    round: int,
    index: int,
) -> None:
    lanes, _, _, batches, _ = preparations.examples.shape
    for position, slot in enumerate(np.flatnonzero(prepares)):
        turn, lane = divmod(position, lanes)
        work = works[int(slot) // works[0].participation.cohort]
        preparations.slots[lane, index, turn] = slot
        client = int(clients[slot])
        preparations.examples[lane, index, turn] = client_batches(work, round, client, batches, Stream.PREPARATION)
        preparations.turns[lane, index] = turn + 1
