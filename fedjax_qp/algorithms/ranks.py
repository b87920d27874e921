"""Clients of different ranks: client k trains the first r_k ranks of the server's adapters. HetLoRA and FlexLoRA share it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedjax_qp.algorithms.adapters import entry_metrics, training_metrics
from fedjax_qp.algorithms.local import LocalState
from fedjax_qp.algorithms.sparse import check_levels, masked_training
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params
from fedjax_qp.models.language import lora


class RankServer(NamedTuple):
    adapters: PyTree  # of the expanded rank
    round: Int[Array, ""]


class RankMemory(NamedTuple):
    """What a client keeps between rounds."""

    adapters: PyTree  # as the client left them; 0 behind its rank
    rank: Int[Array, ""]  # r_k
    trained: Int[Array, ""]  # number of the last round it took part in, from 1; 0 = never


def full_rank(adapters: PyTree) -> int:
    """The rank that adapters have room for."""
    return next(iter(adapters.values()))["b"].shape[-2]


def holds(adapters: PyTree, rank: Int[Array, ""] | int) -> Bool[Array, "r"]:
    """Which ranks a client has: the first."""
    return jnp.arange(full_rank(adapters)) < rank


def rank_masks(adapters: PyTree, rank: Int[Array, ""] | int) -> PyTree:
    """Masks of the first ranks."""
    held = holds(adapters, rank)

    def module(adapter: dict) -> dict:
        return {
            "a": jnp.broadcast_to(held, adapter["a"].shape),
            "b": jnp.broadcast_to(held[:, None], adapter["b"].shape),
        }

    return {name: module(adapter) for name, adapter in adapters.items()}


def client_ranks(levels: tuple[float, ...], rank: int, expansion: int) -> list[int]:
    """r_k of each level, from the expanded rank: level · rank / expansion, at least 1."""
    return [max(1, round(level * rank / expansion)) for level in levels]


def stacked(weights: Float[Array, "M"], adapters: PyTree) -> PyTree:
    """The adapters whose product is Σ_i w_i A_i B_i, without any dense matrix: the clients' ranks side by side.

    Args:
      adapters: a [M, layers, inputs, r] and b [M, layers, r, outputs].

    Returns:
      a [layers, inputs, M·r] and b [layers, M·r, outputs].
    """

    def module(adapter: dict) -> dict:
        members, layers, inputs, rank = adapter["a"].shape
        weighted = weights[:, None, None, None] * adapter["a"]
        return {
            "a": jnp.moveaxis(weighted, 0, 2).reshape(layers, inputs, members * rank),
            "b": jnp.moveaxis(adapter["b"], 0, 1).reshape(layers, members * rank, -1),
        }

    return {name: module(adapter) for name, adapter in adapters.items()}


def ranked(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: int,
    levels: tuple[float, ...],
    upload: Callable,
    combine: Callable | None = None,
    combine_each: Callable | None = None,
) -> Algorithm:
    """Truncates the server's adapters to each client's rank and trains them there.

    Args:
      expansion: e, factor on the model's rank.
      levels: client k's rank is level_k times the rank before expansion, with level k modulo their number.
      upload: `(adapters, rank, Client) -> upload`.
      combine: `(RankServer, total, ...) -> adapters`, the new ones of the server.
      combine_each: likewise from all uploads, in its place.

    Raises:
      ConfigurationError: a level above the expansion.
    """
    check_levels(levels, expansion)
    training = masked_training(model, optimizer)

    def truncated(server: RankServer, rank: Int[Array, ""]) -> Params:
        masks = rank_masks(server.adapters, rank)
        return Params(lora.apply_masks(server.adapters, masks), (), masks)

    def dispatch(server: RankServer, cohort: Cohort, key: Any) -> tuple[RankServer, Int[Array, "M"], dict]:
        ranks = jnp.array(client_ranks(levels, full_rank(server.adapters), expansion))
        return server, ranks[jnp.asarray(cohort.clients) % len(levels)], {}

    def start(shared: RankServer, own: Int[Array, ""], memory: RankMemory, key: Any) -> LocalState:
        return training.start(truncated(shared, own))

    def step(frozen: PyTree, shared: RankServer, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        return training.step(frozen, carry, batch, key)

    def finish(shared: RankServer, carry: LocalState, client: Client) -> tuple[Any, RankMemory, dict]:
        adapters, masks = carry.params.trainable, carry.params.masks
        metrics = training_metrics(carry, truncated(shared, client.own).trainable)
        count = lora.count(masks)
        most = int(lora.count(adapters))
        metrics |= entry_metrics(count, sent=count, received=count, most=most)
        return upload(adapters, client.own, client), RankMemory(adapters, client.own, shared.round + 1), metrics

    def moved(server: RankServer, adapters: PyTree) -> tuple[RankServer, dict[str, Array]]:
        update = jax.tree.map(jnp.subtract, adapters, server.adapters)
        return RankServer(adapters, server.round + 1), {"update/norm": optax.tree.norm(update)}

    def view(server: RankServer, memory: RankMemory, own: bool) -> Params:
        """A client's model; all of the server's adapters for one that never took part, whose rank is not known."""
        never = memory.trained == 0
        masks = rank_masks(server.adapters, jnp.where(never, full_rank(server.adapters), memory.rank))
        adapters = server.adapters
        if own:
            adapters = jax.tree.map(lambda all_, mine: jnp.where(never, all_, mine), adapters, memory.adapters)
        return Params(lora.apply_masks(adapters, masks), (), masks)

    def serve(server: RankServer, memory: RankMemory | tuple) -> Params:
        return view(server, memory, own=False) if isinstance(memory, RankMemory) else Params(server.adapters, ())

    number = jnp.zeros((), jnp.int32)
    return Algorithm(
        init_server=lambda params, clients: RankServer(params.trainable, number),
        init_client=lambda params: RankMemory(params.trainable, number, number),
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine=combine and (lambda server, total, key: moved(server, combine(server, total))),
        combine_each=combine_each
        and (lambda server, uploads, cohort, key: moved(server, combine_each(server, uploads))),
        serve=serve,
        tuned=lambda server, memory: view(server, memory, own=True),
        tunes_adapters=True,
        rank_factor=expansion,
    )
