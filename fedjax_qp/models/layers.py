"""Layers with PyTorch's initial weights, convolution and dense; and the form of the networks made of them."""

from abc import abstractmethod

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fedjax_qp.models.convolution import Form, Padding, convolution, convolution_relu_pool


class Network(nnx.Module):
    """A classifier of images: their features, and one dense layer on top."""

    @abstractmethod
    def features(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B F"]:
        """What the last layer sees."""

    @property
    @abstractmethod
    def last(self) -> "Dense":
        """The last layer."""

    def __call__(
        self, inputs: Float[Array, "B H W C"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B classes"]:
        return self.last(self.features(inputs, mask, train=train))


def uniform_fan_in(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Draws U(±1/√fan_in), for weights and biases alike.

    Source: PyTorch's default for convolution and dense layers, which FedMut's code uses.
    """
    bound = fan_in**-0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


@jax.custom_vjp
def product(inputs: Float[Array, "... inputs"], kernel: Float[Array, "inputs outputs"]) -> Float[Array, "... outputs"]:
    """inputs @ kernel, whose gradient by the kernel is computed in the kernel's own layout.

    JAX's rule computes its transpose: turning a large one round costs more than the product itself.
    """
    return inputs @ kernel


def _product_forward(inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return inputs @ kernel, (inputs, kernel)


def _product_backward(operands: tuple[Array, Array], gradient: Float[Array, "... outputs"]) -> tuple[Array, Array]:
    inputs, kernel = operands
    leading = tuple(range(inputs.ndim - 1))
    by_inputs = jax.lax.dot_general(gradient, kernel, (((inputs.ndim - 1,), (1,)), ((), ())))
    by_kernel = jax.lax.dot_general(inputs, gradient, ((leading, leading), ((), ())))
    return by_inputs, by_kernel


product.defvjp(_product_forward, _product_backward)


class Dense(nnx.Module):
    """y = x · kernel + bias; kernel [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = uniform_fan_in(rngs, (inputs, outputs), inputs)
        self.bias = uniform_fan_in(rngs, (outputs,), inputs)

    def __call__(self, inputs: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return product(inputs, self.kernel[...]) + self.bias[...]


class Convolution(nnx.Module):
    """Two-dimensional convolution; kernel [size, size, inputs, outputs]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding = "VALID",
        bias: bool = True,
        form: Form = "auto",
        rngs: nnx.Rngs,
    ):
        fan_in = size * size * inputs
        self.kernel = uniform_fan_in(rngs, (size, size, inputs, outputs), fan_in)
        self.bias = uniform_fan_in(rngs, (outputs,), fan_in) if bias else None
        self.stride = stride
        self.padding: Padding = padding
        self.form: Form = form

    def __call__(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        outputs = convolution(inputs, self.kernel[...], stride=self.stride, padding=self.padding, form=self.form)
        return outputs if self.bias is None else outputs + self.bias[...]

    def relu_pool(self, inputs: Float[Array, "B H W C"]) -> Float[Array, "B h w O"]:
        """Convolution, ReLU and 2 × 2 max-pooling, faster than one after the other; needs stride 1 and a bias."""
        assert self.bias is not None
        return convolution_relu_pool(inputs, self.kernel[...], self.bias[...], padding=self.padding, form=self.form)
