"""FedSAM: the clients of FedAvg seek flat minima, by taking each step's gradient at the worst point nearby.

Source: Qu et al. 2022, "Generalized Federated Learning via Sharpness Aware Minimization" (ICML), algorithm 1, and Caldarola
et al. 2022, "Improving Generalization in Federated Learning by Seeking Flat Minima" (ECCV), FedSAM and FedASAM; after Foret
et al. 2021 (SAM) and Kwon et al. 2021 (ASAM). With g = ∇F_k(w) on a batch, the step's gradient is the one at w + ε on the
same batch: ε = ρ g/‖g‖, or adaptively, with T = |w| + η for each weight, ε = ρ T²g/‖T g‖. Two gradients a step.

Deviations: the norm is the whole model's (as in SAM; FedASAM's published code scales weights only, ours biases too);
`client/loss` is the loss at w and batch-norm statistics come from there; clients are weighted by size (Qu et al.: uniformly,
`weighting: uniform`) and the server's learning rate is 1. ρ = 0 is FedAvg.
"""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import averaging
from fedjax_qp.algorithms.local import Weighting, add, loss_gradient
from fedjax_qp.federated import Algorithm, Batch, Model, Params


def sharpness_aware(loss: Callable, ascent: Callable[[PyTree, PyTree], PyTree]) -> Callable:
    """A loss with the same value and statistics, whose gradient is the one at the ascended point.

    Args:
      loss: `(frozen, Params, Batch, key) -> (loss, statistics)`.
      ascent: `(trainable, gradient) -> ε`.
    """

    def sharp(frozen: PyTree, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], PyTree]:
        here = params._replace(trainable=jax.lax.stop_gradient(params.trainable))
        found = loss_gradient(loss, frozen, here, batch, key)
        ascended = add(params.trainable, ascent(here.trainable, found.gradient))
        above, _ = loss(frozen, params._replace(trainable=ascended), batch, key)
        return above + jax.lax.stop_gradient(found.value - above), found.statistics

    return sharp


def ascent_of(radius: float, adaptive: bool, adaptivity: float) -> Callable[[PyTree, PyTree], PyTree]:
    """Returns ε as a function of weights and gradient; 0 where the gradient is."""

    def ascent(trainable: PyTree, gradient: PyTree) -> PyTree:
        scales = jax.tree.map(lambda leaf: jnp.abs(leaf) + adaptivity if adaptive else jnp.ones_like(leaf), trainable)
        scaled = jax.tree.map(jnp.multiply, scales, gradient)
        norm = optax.tree.norm(scaled)
        length = radius / jnp.where(norm > 0, norm, 1)
        return jax.tree.map(lambda scale, leaf: length * scale * leaf, scales, scaled)

    return ascent


@algorithms.register
def fedsam(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    radius: Annotated[float, Field(ge=0)] = 0.05,
    adaptive: bool = False,
    adaptivity: Annotated[float, Field(ge=0)] = 0.2,
    weighting: Weighting = "size",
) -> Algorithm:
    """Clients step by the gradient at the worst point nearby, for flat minima (FedSAM; adaptive: FedASAM).

    Args:
      radius: ρ. The default is SAM's; FedASAM's is larger (Caldarola et al. take up to 0.7).
      adaptive: FedASAM.
      adaptivity: η of FedASAM.
    """
    ascent = ascent_of(radius, adaptive, adaptivity)
    sharp = model._replace(loss=sharpness_aware(model.loss, ascent))
    algorithm = averaging(sharp, optimizer, optax.sgd(1.0), weighting=weighting)
    return algorithm if adaptive else algorithm._replace(unused=("adaptivity",))
