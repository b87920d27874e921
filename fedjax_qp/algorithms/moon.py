"""MOON: a client's features are pulled towards the global model's and pushed away from its own last ones.

Source: Li, He and Song 2021, "Model-Contrastive Federated Learning" (CVPR), algorithm 1 and equation 3. With an example's
features z under the model in training, z_glob under the global model and z_prev under the model that the client left in its
last round, the loss is the cross-entropy plus μ times
−log exp(sim(z, z_glob)/τ) / (exp(sim(z, z_glob)/τ) + exp(sim(z, z_prev)/τ)), sim being the cosine.

Deviations: features are what the model's last layer sees; the paper puts a projection head of two layers before that layer,
which would be another model. z_glob and z_prev are computed as in a test (batch norm by running statistics). Until a client
has taken part, its last model is the initial global one; in the published code it is another random one, of the client's own.
`client/loss` contains both terms.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import Server, averaging
from fedjax_qp.algorithms.local import LocalState, Weighting, local_training, parts_of
from fedjax_qp.federated import Algorithm, Batch, Client, Model, Params
from fedjax_qp.models.classifier import mean_cross_entropy


class MoonState(NamedTuple):
    """A client in training."""

    local: LocalState
    previous: Params  # as the client left it in its last round


def cosine(first: Float[Array, "B F"], second: Float[Array, "B F"]) -> Float[Array, "B"]:
    """Of each pair of rows; 0, with gradient 0, where one of them is zero (all of its ReLUs off)."""

    def unit(rows: Float[Array, "B F"]) -> Float[Array, "B F"]:
        squares = (rows**2).sum(-1, keepdims=True)
        return rows / jnp.sqrt(jnp.where(squares > 0, squares, 1))

    return (unit(first) * unit(second)).sum(-1)


def contrast(
    features: Float[Array, "B F"],
    towards: Float[Array, "B F"],
    away: Float[Array, "B F"],
    temperature: float | Float[Array, ""],
) -> Float[Array, "B"]:
    """The model-contrastive loss of each example: ln 2 where the features are equally far from both, below 0 never."""
    return jax.nn.softplus((cosine(features, away) - cosine(features, towards)) / temperature)


@algorithms.register
def moon(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    contrastive: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Annotated[float, Field(gt=0)] = 0.5,
    weighting: Weighting = "size",
) -> Algorithm:
    """A contrastive loss draws features to the global model's and away from the client's last ones (MOON).

    Args:
      contrastive: μ; 0 is FedAvg. The paper chooses 1 for CIFAR-100 and Tiny-ImageNet, 5 for CIFAR-10, of 0.1, 1, 5 and 10.
      temperature: τ.
    """
    average = averaging(model, optimizer, optax.sgd(1.0), weighting=weighting)

    def init_server(params: Params, clients: int) -> Server:
        parts_of(model, "moon")
        return average.init_server(params, clients)

    def start(shared: Params, own: tuple, memory: Params, key: Any) -> MoonState:
        return MoonState(average.start(shared, own, (), key), memory)

    def step(frozen: PyTree, shared: Params, carry: MoonState, batch: Batch, key: Any) -> MoonState:
        parts = parts_of(model, "moon")
        towards, _ = parts.features(shared, batch, train=False)
        away, _ = parts.features(carry.previous, batch, train=False)

        def loss(frozen: PyTree, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], PyTree]:
            features, statistics = parts.features(params, batch, train=True)
            supervised = mean_cross_entropy(parts.classify(params, features), batch)
            contrasts = jnp.where(batch.mask, contrast(features, towards, away, temperature), 0)
            return supervised + contrastive * contrasts.sum() / jnp.maximum(batch.mask.sum(), 1), statistics

        training = local_training(model._replace(loss=loss), optimizer)
        return carry._replace(local=training.step(frozen, carry.local, batch, key))

    def finish(shared: Params, carry: MoonState, client: Client) -> tuple:
        upload, _, metrics = average.finish(shared, carry.local, client)
        return upload, carry.local.params, metrics

    return average._replace(
        init_server=init_server, init_client=lambda params: params, start=start, step=step, finish=finish
    )
