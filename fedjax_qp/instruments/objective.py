"""The mean loss over fixed examples as a function of the trainable arrays, with its gradient and Hessian products.

Examples go through in batches and only sums are kept, so memory does not grow with their number. Differentiation happens
batch by batch, inside the loop: differentiating the loop itself would store what every batch leaves behind.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from fedjax_qp.engine.arrays import take, zeros
from fedjax_qp.engine.evaluation import TestSet, evaluate
from fedjax_qp.federated import Batch, Model, Params
from fedjax_qp.quadratic import full_precision


class Objective(NamedTuple):
    """What the loss depends on besides the trainable arrays; all of it stays fixed."""

    frozen: PyTree
    statistics: PyTree  # batch norm's running estimates, which evaluation mode uses
    points: TestSet


def loss(model: Model, objective: Objective, trainable: PyTree) -> Float[Array, ""]:
    """Mean loss."""
    points = jax.tree.map(jnp.asarray, objective.points)
    sums = evaluate(model, objective.frozen, Params(trainable, objective.statistics), points, None)
    return sums["loss"] / sums["count"].sum()


def gradient(model: Model, objective: Objective, trainable: PyTree) -> PyTree:
    """Gradient of the mean loss."""
    return _mean(model, objective, trainable, lambda batch: jax.grad(_batch_loss(model, objective, batch))(trainable))


def hessian_product(model: Model, objective: Objective, trainable: PyTree, vector: PyTree) -> PyTree:
    """Hessian of the mean loss times a vector: the gradient's derivative along it (Pearlmutter 1994)."""

    def product(batch: Batch) -> PyTree:
        return jax.jvp(jax.grad(_batch_loss(model, objective, batch)), (trainable,), (vector,))[1]

    return _mean(model, objective, trainable, product)


@partial(jax.jit, static_argnums=(0, 4))
@full_precision
def losses_at(
    model: Model,
    objective: Objective,
    trainable: PyTree,
    moves: tuple[PyTree, Float[np.ndarray | Array, "N D"]],
    lanes: int,
) -> Float[Array, "N"]:
    """Mean losses at points trainable + Σ_d c_nd direction_d, `lanes` models side by side.

    Args:
      moves: directions, a tree with leading axis [D], and coefficients c [N, D].
    """
    directions, coefficients = moves

    def at_point(row: Float[Array, "D"]) -> Float[Array, ""]:
        moved = jax.tree.map(lambda leaf, ways: leaf + jnp.tensordot(row, ways, axes=1), trainable, directions)
        return loss(model, objective, moved)

    return jax.lax.map(at_point, jnp.asarray(coefficients), batch_size=lanes)


def flat(tree: PyTree) -> Float[Array, "P"]:
    """All entries in one vector."""
    return ravel_pytree(tree)[0]


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of a tree."""
    return jnp.linalg.norm(flat(tree))


def scaled(tree: PyTree, factor: Float[Array, ""] | float) -> PyTree:
    """Product of a tree with a number."""
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def _batch_loss(model: Model, objective: Objective, batch: Batch) -> Callable[[PyTree], Float[Array, ""]]:
    """The sum of a batch's losses as a function of the trainable arrays."""
    return lambda trainable: model.evaluate(objective.frozen, Params(trainable, objective.statistics), batch)["loss"]


def _mean(model: Model, objective: Objective, trainable: PyTree, function: Callable[[Batch], PyTree]) -> PyTree:
    """The sum of `function` over all batches, divided by what the loss's mean is divided by."""
    params = Params(trainable, objective.statistics)

    def of_batch(batch: Batch) -> tuple[PyTree, Float[Array, ""]]:
        count = model.evaluate(objective.frozen, params, batch)["count"].sum()
        return function(batch), count.astype(jnp.float32)

    def add(total: PyTree, batch: TestSet) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, of_batch(Batch(batch.examples, jnp.asarray(batch.mask)))), None

    points = jax.tree.map(jnp.asarray, objective.points)
    first = jax.eval_shape(of_batch, Batch(*take(points, 0)))
    (total, count), _ = jax.lax.scan(add, zeros(first), points)
    return scaled(total, 1 / count)
