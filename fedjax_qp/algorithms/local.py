"""What nearly all methods share: a client trains a model for some steps and uploads a weighted difference."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fedjax_qp.federated import Batch, Client, Model, Params, Parts
from fedjax_qp.registry import ConfigurationError

Weighting = Literal["size", "uniform"]


class LocalState(NamedTuple):
    """A client in training."""

    params: Params
    optimizer_state: PyTree
    loss_sum: Float[Array, ""]  # over all that was counted
    counted: Int[Array, ""]  # examples of the steps so far (target tokens of a language model)


class Upload(NamedTuple):
    """A client's report. All fields are summed over the cohort, so the weight is inside."""

    weight: Float[Array, ""]
    update: Params  # weight · (trained model − reference model)
    direction: PyTree  # the client's progress scaled to norm 1: the sum's norm tells how far clients agree
    reporters: Float[Array, ""]  # 1; the sum counts who reported


def parts_of(model: Model, method: str) -> Parts:
    """The parts of a classifier.

    Raises:
      ConfigurationError: the model has none.
    """
    if model.parts is None:
        raise ConfigurationError(
            f"algorithm {method!r} works on what a classifier's last layer sees, and this model has no such parts: choose "
            "a model of images with hidden layers (lenet, mlp, resnet18, …), or another algorithm."
        )
    return model.parts


class LocalTraining(NamedTuple):
    """Plain local training as the functions an `Algorithm` is made of."""

    start: Callable[[Params], LocalState]
    step: Callable[..., LocalState]


def local_training(model: Model, optimizer: optax.GradientTransformation) -> LocalTraining:
    """Stochastic gradient steps on a model's loss, with an optax optimizer whose state is fresh in every round.

    Returns:
      `start(params)` and `step(frozen, state, batch, key, penalty_gradient=None)`, where `penalty_gradient(trainable)`
      is added to the loss's gradient.
    """

    def start(params: Params) -> LocalState:
        return LocalState(params, optimizer.init(params.trainable), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def step(
        frozen: PyTree, state: LocalState, batch: Batch, key: Any, penalty_gradient: Callable | None = None
    ) -> LocalState:
        found = loss_gradient(model.loss, frozen, state.params, batch, key)
        if penalty_gradient is not None:
            found = found._replace(gradient=add(found.gradient, penalty_gradient(state.params.trainable)))
        return moved(optimizer, state, found, counted(model, batch))

    return LocalTraining(start, step)


class LossGradient(NamedTuple):
    """A loss at some weights, on some batch."""

    value: Float[Array, ""]
    statistics: PyTree  # the new ones
    gradient: PyTree


def loss_gradient(loss: Callable, frozen: PyTree, params: Params, batch: Batch, key: Any) -> LossGradient:
    """Differentiates `loss(frozen, Params, Batch, key) -> (loss, statistics)` by the trainable arrays."""

    def objective(trainable: PyTree) -> tuple[Array, PyTree]:
        return loss(frozen, params._replace(trainable=trainable), batch, key)

    (value, statistics), gradient = jax.value_and_grad(objective, has_aux=True)(params.trainable)
    return LossGradient(value, statistics, gradient)


def counted(model: Model, batch: Batch) -> Int[Array, ""]:
    """How many examples, or what else, the loss of a batch is the mean of."""
    return batch.mask.sum() if model.counted is None else model.counted(batch)


def moved(
    optimizer: optax.GradientTransformation, state: LocalState, found: LossGradient, count: Int[Array, ""]
) -> LocalState:
    """The client after one step of its optimizer, on a loss that is the mean of `count` of them."""
    trainable = state.params.trainable
    updates, optimizer_state = optimizer.update(found.gradient, state.optimizer_state, trainable)
    params = state.params._replace(trainable=optax.apply_updates(trainable, updates), statistics=found.statistics)
    return LocalState(params, optimizer_state, state.loss_sum + count * found.value, state.counted + count)


def mean_loss(state: LocalState) -> Float[Array, ""]:
    """Over the examples (target tokens) of all steps, however they were cut into batches."""
    return state.loss_sum / jnp.maximum(state.counted, 1)


def loss_metrics(state: LocalState) -> dict[str, Array]:
    """How a client's training went, and the weight of that in a mean over clients."""
    return {"client/loss": mean_loss(state), "client/counted": state.counted}


def client_weight(weighting: Weighting, client: Client) -> Float[Array, ""]:
    """Weight of a client in the average: its number of examples, or 1."""
    return client.size if weighting == "size" else jnp.ones(())


def report(
    state: LocalState, begun: PyTree, reference: Params, client: Client, weighting: Weighting
) -> tuple[Upload, dict[str, Array]]:
    """Makes a client's upload and metrics.

    Args:
      state: the client after its last step.
      begun: the trainable arrays it started from; its progress is measured from there.
      reference: the model that the upload is a difference to (the global one).
    """
    weight = client_weight(weighting, client)
    difference = jax.tree.map(jnp.subtract, state.params, reference)
    progress = jax.tree.map(jnp.subtract, state.params.trainable, begun)
    norm = optax.tree.norm(progress)
    direction = jax.tree.map(lambda leaf: leaf / jnp.maximum(norm, jnp.finfo(leaf.dtype).tiny), progress)
    upload = Upload(weight, jax.tree.map(lambda leaf: weight * leaf, difference), direction, jnp.ones(()))
    return upload, loss_metrics(state) | {"client/update_norm": norm}


def mean_update(total: Upload) -> tuple[Params, dict[str, Array]]:
    """The weighted mean of the clients' differences (zero when nobody reported), its norm, and how far the clients agree.

    What a server makes of the mean, by momentum or a rate of its own, is not in that norm. The mean cosine between the
    progress of two reports (a client that was drawn twice reports twice) follows from the sum of M unit vectors u_i alone:
    ‖Σu_i‖² = M + Σ_{i≠j} cos(u_i, u_j).
    """
    mean = jax.tree.map(lambda leaf: leaf / jnp.where(total.weight > 0, total.weight, 1), total.update)
    pairs = total.reporters * (total.reporters - 1)
    agreement = (optax.tree.norm(total.direction, squared=True) - total.reporters) / jnp.where(pairs > 0, pairs, 1)
    return mean, {"update/cosine_between_clients": agreement, "update/norm": optax.tree.norm(mean.trainable)}


def add(first: PyTree, second: PyTree) -> PyTree:
    """Sum of two trees."""
    return jax.tree.map(jnp.add, first, second)
