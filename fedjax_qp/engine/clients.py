"""The parallel work of cohorts: clients in lanes, one after another in each lane, all lanes a step at a time.

The cohorts of X runs of M clients stand one after another: slot s is client s mod M of run s div M. `shared` and uploads'
sums have the runs as their leading axis, what belongs to a client ("of all") has [X·M].
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from fedjax_qp.engine.arrays import gather, put, select, sum_over_devices, take, zeros
from fedjax_qp.engine.plan import IDLE, Lanes, Preparations
from fedjax_qp.federated import PREPARATION, Algorithm, Batch, Client, Cohort, client_key


class LoopState(NamedTuple):
    """What the step loop carries."""

    carry: PyTree  # [L, ...] the clients in training
    collected: PyTree  # sums of uploads [X, ...], or uploads [X·M, ...]
    memories: PyTree  # [X·M, ...]; zero where the client has not reported on this device
    reported: Bool[Array, "XM"]
    metrics: dict[str, Array]  # [X·M]


class RoundWork(NamedTuple):
    """What all clients of a round have in common."""

    method: Callable  # (settings of one run) -> Algorithm
    settings: PyTree  # [X] each
    frozen: PyTree
    examples: PyTree  # training set, arrays [N, ...]
    cohort: Cohort  # of all, arrays [X·M]
    axis: str | None  # name of the device axis; None on one device


class Slots(NamedTuple):
    """What is known about the client in a slot."""

    work: RoundWork
    shared: PyTree
    own: PyTree  # of all
    memories: PyTree  # of all
    keys: Key[Array, "X"]

    def run(self, slot: Int[Array, ""] | int) -> Int[Array, ""] | int:
        """Which run a slot belongs to; a constant where there is one run, so that nothing is gathered for it."""
        runs = len(self.keys)
        return 0 if runs == 1 else slot // (len(self.work.cohort.clients) // runs)

    def algorithm(self, slot: Int[Array, ""] | int) -> Algorithm:
        return self.work.method(take(self.work.settings, self.run(slot)))

    def facts(self, slot: Int[Array, ""] | int) -> tuple[PyTree, PyTree, PyTree]:
        """(shared, own, memory)"""
        return take(self.shared, self.run(slot)), take(self.own, slot), take(self.memories, slot)

    def key(self, slot: Int[Array, ""] | int, local_step: Int[Array, ""] | int) -> Key[Array, ""]:
        return client_key(self.keys[self.run(slot)], self.work.cohort.clients[slot], local_step)


def run_clients(
    work: RoundWork, lanes: Lanes, shared: PyTree, own: PyTree, memories: PyTree, keys: Key[Array, "X"]
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Trains the cohorts of one round.

    Args:
      lanes: this round's work of this device's lanes: arrays [L, S], examples [L, S, B], steps [L].
      shared: from `dispatch`, [X, ...].
      own: from `dispatch`, [X, M, ...].
      memories: from the client store, [X, M, ...].

    Returns:
      The sums of the uploads [X, ...] (or all of them, [X, M, ...], for `combine_each`), the new memories [X, M, ...],
      metrics [X, M].
    """
    cohort = work.cohort
    slots = Slots(work, shared, _flat(own), _flat(memories), keys)
    runs, everyone = len(keys), len(cohort.clients)
    stacked = slots.algorithm(0).combine_each is not None

    def start(slot: Int[Array, ""]) -> PyTree:
        return slots.algorithm(slot).start(*slots.facts(slot), slots.key(slot, 0))

    def step(carry: PyTree, slot: Array, local_step: Array, indices: Int[Array, "B"]) -> PyTree:
        batch = Batch(gather(work.examples, indices), indices != IDLE)
        return slots.algorithm(slot).step(
            work.frozen, slots.facts(slot)[0], carry, batch, slots.key(slot, local_step + 1)
        )

    def finish(slot: Int[Array, ""], carry: PyTree) -> tuple[PyTree, PyTree, dict]:
        shared, own, memory = slots.facts(slot)
        return slots.algorithm(slot).finish(shared, carry, Client(*take(cohort, slot), own=own, memory=memory))

    def load(begins: Bool[Array, "L"], lane_slots: Int[Array, "L"], carry: PyTree) -> PyTree:
        return select(begins, jax.vmap(start)(lane_slots), carry)

    def collect(
        collected: PyTree, ends: Bool[Array, "L"], lane_slots: Int[Array, "L"], target: Int[Array, "L"], uploads: PyTree
    ) -> PyTree:
        if stacked:
            return put(collected, target, uploads)
        ended = select(ends, uploads, jax.tree.map(jnp.zeros_like, uploads))
        if runs == 1:
            return jax.tree.map(lambda total, new: total + new.sum(0), collected, ended)
        return jax.tree.map(lambda total, new: total.at[slots.run(lane_slots)].add(new), collected, ended)

    def report(ends: Bool[Array, "L"], lane_slots: Int[Array, "L"], state: LoopState) -> LoopState:
        uploads, new_memories, metrics = jax.vmap(finish)(lane_slots, state.carry)
        target = jnp.where(ends, lane_slots, everyone)  # out of range = dropped
        return LoopState(
            state.carry,
            collect(state.collected, ends, lane_slots, target, uploads),
            put(state.memories, target, new_memories),
            state.reported.at[target].set(True, mode="drop"),
            put(state.metrics, target, metrics),
        )

    def body(index: Int[Array, ""], state: LoopState) -> LoopState:
        lane_slots, local_steps, indices = (jnp.asarray(leaf)[:, index] for leaf in lanes[:3])
        active, lane_slots = lane_slots != IDLE, jnp.maximum(lane_slots, 0)
        begins = active & (local_steps == 0)
        carry = jax.lax.cond(begins.any(), partial(load, begins, lane_slots), lambda carry: carry, state.carry)
        carry = jax.vmap(step)(carry, lane_slots, local_steps, indices)
        state = state._replace(carry=carry)
        ends = active & (local_steps == cohort.steps[lane_slots] - 1)
        return jax.lax.cond(ends.any(), partial(report, ends, lane_slots), lambda state: state, state)

    one_carry = jax.eval_shape(start, 0)
    one_upload, _, one_metrics = jax.eval_shape(finish, 0, one_carry)
    empty = LoopState(
        zeros(one_carry, len(lanes.slots)),
        zeros(one_upload, everyone if stacked else runs),
        jax.tree.map(jnp.zeros_like, slots.memories),
        jnp.zeros(everyone, bool),
        zeros(one_metrics, everyone),
    )
    final = jax.lax.fori_loop(0, lanes.steps.max(), body, empty)
    collected, new, reported, metrics = sum_over_devices(
        work.axis, (final.collected, final.memories, final.reported, final.metrics)
    )
    by_run = partial(_by_run, runs)
    return by_run(collected) if stacked else collected, by_run(select(reported, new, slots.memories)), by_run(metrics)


def prepare_clients(
    work: RoundWork, due: Preparations, shared: PyTree, own: PyTree, memories: PyTree, keys: Key[Array, "X"]
) -> PyTree:
    """Runs `prepare` for the members who are due: one client per lane at a time, and no turn if nobody needs it.

    Args:
      due: this round's preparations on this device: slots [L, U], examples [L, U, P, B], turns [L].

    Returns:
      The memories [X, M, ...], new for those who prepared.
    """
    slots = Slots(work, shared, _flat(own), _flat(memories), keys)
    everyone = len(work.cohort.clients)

    def prepare(slot: Int[Array, ""], indices: Int[Array, "P B"]) -> PyTree:
        batches = Batch(gather(work.examples, indices), indices != IDLE)
        function = slots.algorithm(slot).prepare
        assert function is not None
        return function(work.frozen, *slots.facts(slot), batches, slots.key(slot, PREPARATION))

    def turn(index: Int[Array, ""], state: tuple) -> tuple:
        new, prepared = state
        lane_slots = jnp.asarray(due.slots)[:, index]
        rows = jax.vmap(prepare)(jnp.maximum(lane_slots, 0), jnp.asarray(due.examples)[:, index])
        target = jnp.where(lane_slots == IDLE, everyone, lane_slots)
        return put(new, target, rows), prepared.at[target].set(True, mode="drop")

    nobody = (jax.tree.map(jnp.zeros_like, slots.memories), jnp.zeros(everyone, bool))
    new, prepared = sum_over_devices(work.axis, jax.lax.fori_loop(0, due.turns.max(), turn, nobody))
    return _by_run(len(keys), select(prepared, new, slots.memories))


def _flat(tree: PyTree) -> PyTree:
    """[X, M, ...] → [X·M, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), tree)


def _by_run(runs: int, tree: PyTree) -> PyTree:
    """[X·M, ...] → [X, M, ...]"""
    return jax.tree.map(lambda leaf: leaf.reshape(runs, len(leaf) // runs, *leaf.shape[1:]), tree)
