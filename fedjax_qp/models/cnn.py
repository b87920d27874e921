"""Two small convolutional networks that other simulators are benchmarked with."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.convolution import Form
from fedjax_qp.models.layers import Convolution, Dense, Network
from fedjax_qp.models.registry import models, require_size


class FemnistCNN(Network):
    """conv 5×5 (32), pool, conv 5×5 (64), pool, dense 512, classes; ReLU throughout, zero padding keeps the size."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, *, form: Form, rngs: nnx.Rngs):
        height, width, channels = input_shape
        self.conv1 = Convolution(channels, 32, 5, padding=2, form=form, rngs=rngs)
        self.conv2 = Convolution(32, 64, 5, padding=2, form=form, rngs=rngs)
        self.dense1 = Dense(64 * (height // 4) * (width // 4), 512, rngs=rngs)
        self.dense2 = Dense(512, classes, rngs=rngs)

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = self.conv2.relu_pool(self.conv1.relu_pool(inputs))
        return jax.nn.relu(self.dense1(outputs.reshape(outputs.shape[0], -1)))

    @property
    def last(self) -> Dense:
        return self.dense2


@models.register("images")
def femnist_cnn(
    input_shape: tuple[int, int, int], classes: int, *, convolution: Form = "auto"
) -> Callable[[nnx.Rngs], nnx.Module]:
    """The network of FEMNIST benchmarks: 1,690,046 parameters for 28×28 images and 62 classes.

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, the
    CNN; Caldas et al., "LEAF", arXiv 1812.01097, 2018, takes it for FEMNIST (with a wider dense layer).

    Args:
      input_shape: height, width, channels; at least 4×4.
      classes: number of classes.
      convolution: how convolutions are computed; the result is the same.

    Raises:
      ConfigurationError: the images are too small.
    """
    require_size("femnist_cnn", input_shape, 4, "use the model 'mlp' or larger images")
    return lambda rngs: FemnistCNN(input_shape, classes, form=convolution, rngs=rngs)


class SimpleCNN(Network):
    """conv 3×3 (32), conv 3×3 (64), pool, dense 128, classes; ReLU throughout."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, *, form: Form, rngs: nnx.Rngs):
        height, width, channels = input_shape
        self.conv1 = Convolution(channels, 32, 3, form=form, rngs=rngs)
        self.conv2 = Convolution(32, 64, 3, form=form, rngs=rngs)
        self.dense1 = Dense(64 * ((height - 4) // 2) * ((width - 4) // 2), 128, rngs=rngs)
        self.dense2 = Dense(128, classes, rngs=rngs)

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = self.conv2.relu_pool(jax.nn.relu(self.conv1(inputs)))
        return jax.nn.relu(self.dense1(outputs.reshape(outputs.shape[0], -1)))

    @property
    def last(self) -> Dense:
        return self.dense2


@models.register("images")
def simple_cnn(
    input_shape: tuple[int, int, int], classes: int, *, convolution: Form = "auto"
) -> Callable[[nnx.Rngs], nnx.Module]:
    """The CNN of pfl-research's CIFAR-10 benchmark, without dropout: 1,626,442 parameters.

    Source: Granqvist et al., "pfl-research: simulation framework for accelerating research in private federated learning",
    NeurIPS Datasets and Benchmarks 2024; after Reddi et al., "Adaptive federated optimization", ICLR 2021.

    Args:
      input_shape: height, width, channels; at least 6×6.
      classes: number of classes.
      convolution: how convolutions are computed; the result is the same.

    Raises:
      ConfigurationError: the images are too small.
    """
    require_size("simple_cnn", input_shape, 6, "use the model 'mlp' or larger images")
    return lambda rngs: SimpleCNN(input_shape, classes, form=convolution, rngs=rngs)
