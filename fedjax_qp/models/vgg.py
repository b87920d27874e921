"""VGG-16 for small images."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.convolution import Form
from fedjax_qp.models.layers import Convolution, Dense, Network
from fedjax_qp.models.normalisation import Normalisation, normalisation_layer
from fedjax_qp.models.pooling import global_average_pool, max_pool
from fedjax_qp.models.registry import models, require_size

# Channels of the convolutions between two poolings (configuration D of the paper).
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(Network):
    """Thirteen 3×3 convolutions in five stages, each followed by max-pooling; one dense layer."""

    def __init__(self, channels: int, classes: int, *, normalisation: Normalisation, form: Form, rngs: nnx.Rngs):
        before = channels
        for stage, sizes in enumerate(STAGES, start=1):
            for number, outputs in enumerate(sizes, start=1):
                conv = Convolution(before, outputs, 3, padding=1, form=form, rngs=rngs)
                setattr(self, f"conv{stage}_{number}", conv)
                setattr(self, f"norm{stage}_{number}", normalisation_layer(normalisation, outputs))
                before = outputs
        self.dense = Dense(before, classes, rngs=rngs)

    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        outputs = inputs
        for stage, sizes in enumerate(STAGES, start=1):
            for number in range(1, len(sizes) + 1):
                outputs = getattr(self, f"conv{stage}_{number}")(outputs)
                outputs = jax.nn.relu(getattr(self, f"norm{stage}_{number}")(outputs, mask, train=train))
            outputs = max_pool(outputs)
        return global_average_pool(outputs)

    @property
    def last(self) -> Dense:
        return self.dense


@models.register("images")
def vgg16(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    normalisation: Normalisation = "batch",
    convolution: Form = "auto",
) -> Callable[[nnx.Rngs], nnx.Module]:
    """VGG-16 with batch norm and a single dense layer 512 → classes: 14,728,266 parameters for CIFAR-10.

    Source: Simonyan and Zisserman, "Very deep convolutional networks", ICLR 2015, configuration D; the three dense
    layers are replaced by one, as is usual for 32×32 images.

    Args:
      input_shape: height, width, channels; at least 32×32.
      classes: number of classes.
      normalisation: after each convolution.
      convolution: how convolutions are computed; the result is the same.

    Raises:
      ConfigurationError: the images are too small.
    """
    require_size("vgg16", input_shape, 32, "use 'resnet18' or 'lenet', or larger images")
    return lambda rngs: VGG(input_shape[2], classes, normalisation=normalisation, form=convolution, rngs=rngs)
