"""LeNet, the small convolutional network of FedMut's experiments."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.convolution import Form
from fedjax_qp.models.layers import Convolution, Dense, Network
from fedjax_qp.models.normalisation import Normalisation, normalisation_layer
from fedjax_qp.models.pooling import max_pool
from fedjax_qp.models.registry import models, require_size


class LeNet(Network):
    """conv 5×5 (6), pool, conv 5×5 (16), pool, dense 120, dense 84, classes; ReLU throughout."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        *,
        normalisation: Normalisation,
        form: Form,
        rngs: nnx.Rngs,
    ):
        height, width = (((size - 4) // 2 - 4) // 2 for size in input_shape[:2])
        self.conv1 = Convolution(input_shape[2], 6, 5, form=form, rngs=rngs)
        self.norm1 = normalisation_layer(normalisation, 6)
        self.conv2 = Convolution(6, 16, 5, form=form, rngs=rngs)
        self.norm2 = normalisation_layer(normalisation, 16)
        self.dense1 = Dense(16 * height * width, 120, rngs=rngs)
        self.dense2 = Dense(120, 84, rngs=rngs)
        self.dense3 = Dense(84, classes, rngs=rngs)
        # Without a normalisation in between, convolution, ReLU and pooling are one operation.
        self.plain = normalisation == "none"

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = inputs
        for convolution, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            if self.plain:
                outputs = convolution.relu_pool(outputs)
            else:
                outputs = max_pool(jax.nn.relu(norm(convolution(outputs), mask, train=train)))
        outputs = outputs.reshape(outputs.shape[0], -1)
        outputs = jax.nn.relu(self.dense1(outputs))
        return jax.nn.relu(self.dense2(outputs))

    @property
    def last(self) -> Dense:
        return self.dense3


@models.register("images")
def lenet(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    normalisation: Normalisation = "none",
    convolution: Form = "auto",
) -> Callable[[nnx.Rngs], nnx.Module]:
    """LeNet: 62,006 parameters for CIFAR-10.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, with ReLU and max-pooling;
    FedMut (AAAI 2024), "CNN".

    Args:
      input_shape: height, width, channels; at least 16×16.
      classes: number of classes.
      normalisation: after each convolution.
      convolution: how convolutions are computed; the result is the same.

    Raises:
      ConfigurationError: the images are too small.
    """
    require_size("lenet", input_shape, 16, "use the model 'mlp' or larger images")
    return lambda rngs: LeNet(input_shape, classes, normalisation=normalisation, form=convolution, rngs=rngs)
