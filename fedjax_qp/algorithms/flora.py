"""FLoRA: the exact weighted sum of the clients' products is merged into the base, and everybody starts afresh.

Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024: the server stacks the adapters, whose product is then Σ_k p_k A_k B_k without the cross terms of averaged
factors; clients merge it into their base and draw new adapters.

The change of the base travels as `Params.statistics`, one dense matrix for each adapted one: the model adds it to its
kernels. A client's model as it left it ("tuned") is the base before the last aggregation plus its adapters, and is known for
those who took part in the last round; others are given the present global model.
Deviations: all clients have the same rank and draw the same A. A download is counted as the stack of the round before, also
for clients who missed earlier ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import AdapterMemory, Expansion, bytes_of, entry_metrics, training_metrics
from fedjax_qp.algorithms.local import LocalState, Weighting, client_weight, local_training
from fedjax_qp.algorithms.ranks import stacked
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params
from fedjax_qp.models.language import lora


class FloraServer(NamedTuple):
    deltas: PyTree  # {"q_proj": [layers, inputs, outputs], …} what has been merged into the base so far
    previous: PyTree  # the same before the last aggregation
    start: PyTree  # adapters of round 0, for their shapes
    reporters: Int[Array, ""]  # adapters in the last stack
    round: Int[Array, ""]


class FloraShared(NamedTuple):
    server: FloraServer
    fresh: PyTree  # this round's adapters, the same for all: a random, b = 0
    received: Array  # bytes of the last stack, which everybody gets


class FloraUpload(NamedTuple):
    weight: Float[Array, ""]  # 0 for those who did not report
    adapters: PyTree


def draw(like: PyTree, key: Any) -> PyTree:
    """New adapters as the model draws its own: a ~ U(±1/√inputs), b = 0."""
    keys = jax.random.split(key, len(like))

    def module(adapter: dict, one_key: Any) -> dict:
        a = adapter["a"]
        bound = a.shape[-2] ** -0.5
        new = jax.random.uniform(one_key, a.shape, a.dtype, minval=-bound, maxval=bound)
        return {"a": new, "b": jnp.zeros_like(adapter["b"])}

    return {name: module(adapter, one_key) for (name, adapter), one_key in zip(like.items(), keys, strict=True)}


@algorithms.register
def flora(
    model: Model, optimizer: optax.GradientTransformation, *, expansion: Expansion = 1, weighting: Weighting = "size"
) -> Algorithm:
    """Stacks the clients' LoRA adapters and merges them into the base in every round (FLoRA, with equal ranks).

    Args:
      expansion: e, factor on the model's rank (and its alpha, so that the scale stays).
    """
    training = local_training(model, optimizer)

    def merged(deltas: PyTree, adapters: PyTree) -> PyTree:
        assert model.merge is not None, "FLoRA needs a model with adapters"
        base = {"blocks": {name: {"kernel": delta} for name, delta in deltas.items()}}
        return {name: block["kernel"] for name, block in model.merge(base, adapters)["blocks"].items()}

    def dispatch(server: FloraServer, cohort: Cohort, key: Any) -> tuple[FloraShared, tuple, dict]:
        count = int(lora.count(server.start))
        stack = bytes_of(count, most=count * len(cohort.clients)) * server.reporters
        return FloraShared(server, draw(server.start, key), stack), (), {}

    def start(shared: FloraShared, own: tuple, memory: AdapterMemory, key: Any) -> LocalState:
        return training.start(Params(shared.fresh, ()))

    def step(frozen: PyTree, shared: FloraShared, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        # The dense matrices are the same for all clients, so they are no part of what each lane carries.
        complete = carry._replace(params=carry.params._replace(statistics=shared.server.deltas))
        after = training.step(frozen, complete, batch, key)
        return after._replace(params=after.params._replace(statistics=()))

    def finish(shared: FloraShared, carry: LocalState, client: Client) -> tuple:
        adapters = carry.params.trainable
        metrics = training_metrics(carry, shared.fresh)
        count = int(lora.count(adapters))
        metrics |= entry_metrics(count, sent=count, received=0, most=count)
        metrics["client/download_bytes"] = shared.received
        upload = FloraUpload(client_weight(weighting, client), adapters)
        return upload, AdapterMemory(adapters, shared.server.round + 1), metrics

    def combine_each(server: FloraServer, uploads: FloraUpload, cohort: Cohort, key: Any) -> tuple[FloraServer, dict]:
        total = uploads.weight.sum()
        stack = stacked(uploads.weight / jnp.where(total > 0, total, 1), uploads.adapters)
        deltas = merged(server.deltas, stack)
        update = jax.tree.map(jnp.subtract, deltas, server.deltas)
        reporters = (uploads.weight > 0).sum(dtype=jnp.int32)
        after = server._replace(deltas=deltas, previous=server.deltas, reporters=reporters, round=server.round + 1)
        return after, {"update/norm": optax.tree.norm(update)}

    def tuned(server: FloraServer, memory: AdapterMemory) -> Params:
        recent = (memory.trained > 0) & (memory.trained == server.round)
        adapters = jax.tree.map(lambda leaf: jnp.where(recent, leaf, 0), memory.adapters)
        deltas = jax.tree.map(lambda old, new: jnp.where(recent, old, new), server.previous, server.deltas)
        return Params(adapters, deltas)

    def init_server(params: Params, clients: int) -> FloraServer:
        deltas = {
            name: jnp.zeros((*adapter["a"].shape[:2], adapter["b"].shape[-1]), adapter["a"].dtype)
            for name, adapter in params.trainable.items()
        }
        number = jnp.zeros((), jnp.int32)
        return FloraServer(deltas, deltas, params.trainable, number, number)

    return Algorithm(
        init_server=init_server,
        init_client=lambda params: AdapterMemory(params.trainable, jnp.zeros((), jnp.int32)),
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine_each=combine_each,
        # No adapters: they were merged, and new ones change nothing before they are trained.
        serve=lambda server, memory: Params((), server.deltas),
        tuned=tuned,
        tunes_adapters=True,
        rank_factor=expansion,
    )
