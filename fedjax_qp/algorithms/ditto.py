"""Ditto: a global model by federated averaging, and beside it a personal one that is pulled towards it.

Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", algorithm 1: on every batch the
client also steps its personal model v_k along ∇F_k(v_k) + λ(v_k − w), with w the global model as it was dispatched. That is
twice the gradient work of FedAvg. Works for any model; on a language model the models are its adapters.

Deviations: v_k takes as many local steps as the global model, on the same batches; it starts from w in the first round that
the client takes part in; any local optimizer, with a fresh state every round. Both views of a client, "personal" and "tuned",
are v_k (aggregation does not change it); a client that never took part is served w.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import entry_metrics
from fedjax_qp.algorithms.averaging import Server, averaging
from fedjax_qp.algorithms.local import LocalState, Weighting, local_training, mean_loss
from fedjax_qp.federated import Algorithm, Batch, Client, Model, Params
from fedjax_qp.models.language import lora


class DittoMemory(NamedTuple):
    params: Params  # v_k
    rounds: Int[Array, ""]  # number of rounds it took part in


class DittoState(NamedTuple):
    """A client in training."""

    shared: LocalState  # the global model
    personal: LocalState


@algorithms.register
def ditto(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    proximal: Annotated[float, Field(ge=0)] = 0.1,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedAvg, and besides it a personal model of every client that is held near the global one (Ditto).

    Args:
      proximal: λ; 0 is local training of v_k, and the paper chooses it by validation.
    """
    average = averaging(model, optimizer, optax.sgd(1.0), weighting=weighting)
    training = local_training(model, optimizer)

    def personal(shared: Params, memory: DittoMemory) -> Params:
        return jax.tree.map(lambda v, w: jnp.where(memory.rounds > 0, v, w), memory.params, shared)

    def start(shared: Params, own: tuple, memory: DittoMemory, key: Any) -> DittoState:
        return DittoState(average.start(shared, own, (), key), training.start(personal(shared, memory)))

    def step(frozen: PyTree, shared: Params, carry: DittoState, batch: Batch, key: Any) -> DittoState:
        def pull(trainable: PyTree) -> PyTree:
            return jax.tree.map(lambda v, w: proximal * (v - w), trainable, shared.trainable)

        moved = training.step(frozen, carry.personal, batch, key, pull)
        return DittoState(average.step(frozen, shared, carry.shared, batch, key), moved)

    def finish(shared: Params, carry: DittoState, client: Client) -> tuple:
        upload, _, metrics = average.finish(shared, carry.shared, client)
        metrics |= {"client/personal_loss": mean_loss(carry.personal)}
        sent = int(lora.count(shared))
        # v_k's entries: the global model's are as many again.
        metrics |= entry_metrics(lora.count(shared.trainable), sent=sent, received=sent, most=sent)
        return upload, DittoMemory(carry.personal.params, client.memory.rounds + 1), metrics

    def serve(server: Server, memory: DittoMemory | tuple) -> Params:
        return personal(server.params, memory) if isinstance(memory, DittoMemory) else server.params

    return average._replace(
        init_client=lambda params: DittoMemory(params, jnp.zeros((), jnp.int32)),
        start=start,
        step=step,
        finish=finish,
        serve=serve,
        tuned=serve,
    )
