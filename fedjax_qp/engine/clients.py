"""The parallel work of a cohort: clients in lanes, one after another in each lane, all lanes a step at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from fedjax_qp.engine.arrays import across, gather, of, put, select, zeros
from fedjax_qp.federated import PREPARATION, Algorithm, Batch, Client, Cohort, client_key
from fedjax_qp.plan import IDLE, Lanes, Preparations


class LoopState(NamedTuple):
    """What the step loop carries."""

    carry: PyTree  # [L, ...] the clients in training
    collected: PyTree  # sum of uploads, or uploads [M, ...]
    memories: PyTree  # [M, ...]; zero where the client has not reported on this device
    reported: Bool[Array, "M"]
    metrics: dict[str, Array]  # [M]


def run_clients(
    algorithm: Algorithm,
    frozen: PyTree,
    examples: PyTree,
    lanes: Lanes,
    cohort: Cohort,
    axis: str | None,
    shared: PyTree,
    own: PyTree,
    memories: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Trains one cohort.

    Args:
      examples: training set, arrays [N, ...].
      lanes: this round's work of this device's lanes: arrays [L, S], examples [L, S, B], steps [L].
      axis: name of the device axis, or None on one device.
      shared, own, memories: from `dispatch` and the client store; `own` and memories have leading axis M.

    Returns:
      The sum of the uploads (or all of them, [M, ...], for `combine_each`), the new memories [M, ...], metrics [M].
    """
    members = len(cohort.clients)
    stacked = algorithm.combine_each is not None

    def start(slot: Int[Array, ""]) -> PyTree:
        return algorithm.start(shared, of(own, slot), of(memories, slot), client_key(key, cohort.clients[slot], 0))

    def step(carry: PyTree, slot: Array, local_step: Array, indices: Int[Array, "B"]) -> PyTree:
        batch = Batch(gather(examples, indices), indices != IDLE)
        return algorithm.step(frozen, shared, carry, batch, client_key(key, cohort.clients[slot], local_step + 1))

    def finish(slot: Int[Array, ""], carry: PyTree) -> tuple[PyTree, PyTree, dict]:
        client = Client(*of(cohort, slot))
        return algorithm.finish(shared, of(own, slot), carry, of(memories, slot), client)

    def load(begins: Bool[Array, "L"], slots: Int[Array, "L"], carry: PyTree) -> PyTree:
        return select(begins, jax.vmap(start)(slots), carry)

    def report(ends: Bool[Array, "L"], slots: Int[Array, "L"], state: LoopState) -> LoopState:
        uploads, new_memories, metrics = jax.vmap(finish)(slots, state.carry)
        target = jnp.where(ends, slots, members)  # out of range = dropped

        if stacked:
            collected = put(state.collected, target, uploads)
        else:
            ended = select(ends, uploads, jax.tree.map(jnp.zeros_like, uploads))
            collected = jax.tree.map(lambda total, new: total + new.sum(0), state.collected, ended)
        return LoopState(
            state.carry,
            collected,
            put(state.memories, target, new_memories),
            state.reported.at[target].set(True, mode="drop"),
            put(state.metrics, target, metrics),
        )

    def body(index: Int[Array, ""], state: LoopState) -> LoopState:
        slots, local_steps, indices = (jnp.asarray(leaf)[:, index] for leaf in lanes[:3])
        active, slots = slots != IDLE, jnp.maximum(slots, 0)
        begins = active & (local_steps == 0)
        carry = jax.lax.cond(begins.any(), partial(load, begins, slots), lambda carry: carry, state.carry)
        carry = jax.vmap(step)(carry, slots, local_steps, indices)
        state = state._replace(carry=carry)
        ends = active & (local_steps == cohort.steps[slots] - 1)
        return jax.lax.cond(ends.any(), partial(report, ends, slots), lambda state: state, state)

    one_carry = jax.eval_shape(start, 0)
    one_upload, _, one_metrics = jax.eval_shape(finish, 0, one_carry)
    empty = LoopState(
        zeros(one_carry, len(lanes.slots)),
        zeros(one_upload, members) if stacked else zeros(one_upload),
        jax.tree.map(jnp.zeros_like, memories),
        jnp.zeros(members, bool),
        zeros(one_metrics, members),
    )
    final = jax.lax.fori_loop(0, lanes.steps.max(), body, empty)
    collected, new, reported, metrics = across(axis, (final.collected, final.memories, final.reported, final.metrics))
    memories = select(reported, new, memories)
    return collected, memories, metrics


def prepare_clients(
    algorithm: Algorithm,
    frozen: PyTree,
    examples: PyTree,
    work: Preparations,
    cohort: Cohort,
    axis: str | None,
    shared: PyTree,
    own: PyTree,
    memories: PyTree,
    key: Key[Array, ""],
) -> PyTree:
    """Runs `prepare` for the members of a cohort who are due: in turns of one client a lane, none where nobody is due.

    Args:
      work: this round's preparations on this device: slots [L, U], examples [L, U, P, B], turns [L].

    Returns:
      The memories [M, ...], new for those who prepared.
    """
    members = len(cohort.clients)

    def prepare(slot: Int[Array, ""], indices: Int[Array, "P B"]) -> PyTree:
        batches = Batch(gather(examples, indices), indices != IDLE)
        one_key = client_key(key, cohort.clients[slot], PREPARATION)
        assert algorithm.prepare is not None
        return algorithm.prepare(frozen, shared, of(own, slot), of(memories, slot), batches, one_key)

    def turn(index: Int[Array, ""], state: tuple) -> tuple:
        new, prepared = state
        slots = jnp.asarray(work.slots)[:, index]
        rows = jax.vmap(prepare)(jnp.maximum(slots, 0), jnp.asarray(work.examples)[:, index])
        target = jnp.where(slots == IDLE, members, slots)
        return put(new, target, rows), prepared.at[target].set(True, mode="drop")

    nobody = (jax.tree.map(jnp.zeros_like, memories), jnp.zeros(members, bool))
    new, prepared = across(axis, jax.lax.fori_loop(0, work.turns.max(), turn, nobody))
    return select(prepared, new, memories)
