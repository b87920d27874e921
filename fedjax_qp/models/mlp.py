"""Multilayer perceptron.

Source: McMahan et al., "Communication-efficient learning of deep networks", AISTATS 2017: the "2NN", 200 + 200 hidden.
"""

import math
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.layers import Dense, Network
from fedjax_qp.models.registry import models
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown

MOST_UNITS, MOST_LAYERS = 1_000_000, 100


class Perceptron(Network):
    """Dense layers with ReLU between them."""

    def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = len(sizes) - 1
        for number in range(1, self.layers + 1):
            setattr(self, f"dense{number}", Dense(sizes[number - 1], sizes[number], rngs=rngs))

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = inputs.reshape(inputs.shape[0], -1)
        for number in range(1, self.layers):
            outputs = jax.nn.relu(getattr(self, f"dense{number}")(outputs))
        return outputs

    @property
    def last(self) -> Dense:
        return getattr(self, f"dense{self.layers}")


@models.register("images", "rows")
def mlp(
    input_shape: tuple[int, ...], classes: int, *, hidden: tuple[int, ...] = (200, 200)
) -> Callable[[nnx.Rngs], nnx.Module]:
    """Multilayer perceptron on the flattened input.

    Args:
      input_shape: height, width, channels; or any other.
      classes: number of classes, labels or numbers to predict.
      hidden: sizes of the hidden layers; () is logistic regression.

    Raises:
      ConfigurationError: a layer has no units, or there are far too many.
    """
    if len(hidden) > MOST_LAYERS:
        raise ConfigurationError(f"model 'mlp': hidden has {len(hidden)} layers; at most {MOST_LAYERS} are possible.")
    if not all(1 <= size <= MOST_UNITS for size in hidden):
        raise ConfigurationError(
            f"model 'mlp': hidden = {shown(hidden)}; every size must be between 1 and {MOST_UNITS}. Leave a layer "
            "without units out."
        )
    return lambda rngs: Perceptron((math.prod(input_shape), *hidden, classes), rngs=rngs)


@models.register("images", "rows")
def linear(input_shape: tuple[int, ...], classes: int) -> Callable[[nnx.Rngs], nnx.Module]:
    """One dense layer on the flattened input: logistic regression, or linear regression of numbers.

    Args:
      input_shape: any.
      classes: number of classes, labels or numbers to predict.
    """
    return mlp(input_shape, classes, hidden=())
