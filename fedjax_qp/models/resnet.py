"""ResNet-18 for small images."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.convolution import Form
from fedjax_qp.models.layers import Convolution, Dense, Network
from fedjax_qp.models.normalisation import Normalisation, normalisation_layer
from fedjax_qp.models.pooling import global_average_pool
from fedjax_qp.models.registry import models, require_size

STAGE_CHANNELS = (64, 128, 256, 512)
BLOCKS_IN_STAGE = 2


class ResidualBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut, which is projected where the shape changes."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int, normalisation: Normalisation, form: Form, rngs: nnx.Rngs
    ):
        self.conv1 = Convolution(inputs, outputs, 3, stride=stride, padding=1, bias=False, form=form, rngs=rngs)
        self.norm1 = normalisation_layer(normalisation, outputs)
        self.conv2 = Convolution(outputs, outputs, 3, padding=1, bias=False, form=form, rngs=rngs)
        self.norm2 = normalisation_layer(normalisation, outputs)
        self.projected = stride > 1 or inputs != outputs
        if self.projected:
            self.shortcut = Convolution(inputs, outputs, 1, stride=stride, bias=False, form=form, rngs=rngs)
            self.shortcut_norm = normalisation_layer(normalisation, outputs)

    def __call__(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B h w O"]:
        outputs = jax.nn.relu(self.norm1(self.conv1(inputs), mask, train=train))
        outputs = self.norm2(self.conv2(outputs), mask, train=train)
        if self.projected:
            inputs = self.shortcut_norm(self.shortcut(inputs), mask, train=train)
        return jax.nn.relu(outputs + inputs)


class ResNet(Network):
    """3×3 stem without pooling, four stages of basic blocks, global average pooling, one dense layer."""

    def __init__(self, channels: int, classes: int, *, normalisation: Normalisation, form: Form, rngs: nnx.Rngs):
        self.conv = Convolution(channels, STAGE_CHANNELS[0], 3, padding=1, bias=False, form=form, rngs=rngs)
        self.norm = normalisation_layer(normalisation, STAGE_CHANNELS[0])
        before, names = STAGE_CHANNELS[0], []
        for stage, outputs in enumerate(STAGE_CHANNELS, start=1):
            for number in range(1, BLOCKS_IN_STAGE + 1):
                stride = 2 if stage > 1 and number == 1 else 1
                block = ResidualBlock(before, outputs, stride=stride, normalisation=normalisation, form=form, rngs=rngs)
                names.append(f"stage{stage}_block{number}")
                setattr(self, names[-1], block)
                before = outputs
        self.blocks = tuple(names)
        self.dense = Dense(before, classes, rngs=rngs)

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = jax.nn.relu(self.norm(self.conv(inputs), mask, train=train))
        for name in self.blocks:
            outputs = getattr(self, name)(outputs, mask, train=train)
        return global_average_pool(outputs)

    @property
    def last(self) -> Dense:
        return self.dense


@models.register("images")
def resnet18(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    normalisation: Normalisation = "batch",
    convolution: Form = "auto",
) -> Callable[[nnx.Rngs], nnx.Module]:
    """ResNet-18 with a 3×3 stem and no max-pooling: 11,173,962 parameters for CIFAR-10.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016; FedMut (AAAI 2024).

    Args:
      input_shape: height, width, channels; at least 8×8.
      classes: number of classes.
      normalisation: after each convolution.
      convolution: how convolutions are computed; the result is the same.

    Raises:
      ConfigurationError: the images are too small.
    """
    require_size("resnet18", input_shape, 8, "use the model 'mlp' or larger images")
    return lambda rngs: ResNet(input_shape[2], classes, normalisation=normalisation, form=convolution, rngs=rngs)
