"""Normalisation layers; batch normalisation honours the mask of padded examples."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

Normalisation = Literal["batch", "group", "none"]


class BatchNormalisation(nnx.Module):
    """Normalises each channel over the valid examples of the batch and all positions.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015. Running estimates as in PyTorch: weight 0.1 for the new
    batch, unbiased variance.
    """

    def __init__(self, channels: int, *, momentum: float = 0.9, epsilon: float = 1e-5):
        self.momentum, self.epsilon = momentum, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))

    def __call__(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B H W C"]:
        """Normalises; in training also moves the running estimates, unless no example is valid.

        Args:
          inputs: [B, H, W, C].
          mask: [B], False for padded examples; None where all are valid.
          train: batch statistics if true, running ones otherwise.
        """
        if train:
            mean, variance = self._observe(inputs, mask)
        else:
            mean, variance = self.mean[...], self.variance[...]
        scale = self.scale[...] / jnp.sqrt(variance + self.epsilon)
        return inputs * scale + (self.bias[...] - mean * scale)

    def _observe(self, inputs: Array, mask: Array | None) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
        if mask is None:
            mask = jnp.ones(inputs.shape[0], bool)
        valid = mask[:, None, None, None]
        count = mask.sum() * (inputs.shape[1] * inputs.shape[2])
        # Two passes and `where`, not a product with the mask: exact for large means, and inert even for padded NaNs.
        mean = jnp.where(valid, inputs, 0).sum((0, 1, 2)) / jnp.maximum(count, 1)
        deviation = jnp.where(valid, inputs - mean, 0)
        squares = (deviation**2).sum((0, 1, 2))
        self.mean.set_value(self._moved(self.mean[...], mean, count))
        self.variance.set_value(self._moved(self.variance[...], squares / jnp.maximum(count - 1, 1), count))
        return mean, squares / jnp.maximum(count, 1)

    def _moved(self, running: Array, observed: Array, count: Array) -> Array:
        return jnp.where(count > 0, self.momentum * running + (1 - self.momentum) * observed, running)


class GroupNormalisation(nnx.Module):
    """Normalises each example over all positions and the channels of a group; keeps no statistics.

    Source: Wu and He, "Group Normalization", ECCV 2018. 32 groups, or the largest divisor of the channels below that.
    """

    def __init__(self, channels: int, *, epsilon: float = 1e-5):
        self.groups = max(groups for groups in range(1, min(32, channels) + 1) if channels % groups == 0)
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B H W C"]:
        """Normalises; mask and mode make no difference, they are there for the common signature."""
        grouped = inputs.reshape(*inputs.shape[:3], self.groups, -1)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
        normal = (grouped - mean) / jnp.sqrt(variance + self.epsilon)
        return normal.reshape(inputs.shape) * self.scale[...] + self.bias[...]


class NoNormalisation(nnx.Module):
    """The identity."""

    def __call__(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B H W C"]:
        return inputs


def normalisation_layer(kind: Normalisation, channels: int) -> nnx.Module:
    """Returns the layer of this kind."""
    if kind == "none":
        return NoNormalisation()
    return {"batch": BatchNormalisation, "group": GroupNormalisation}[kind](channels)
