"""Recurrent network over characters: embedding, LSTM layers, and a prediction of the next character."""

from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8
from pydantic import Field

from fedjax_qp.models.layers import Dense, uniform_fan_in
from fedjax_qp.models.registry import models
from fedjax_qp.registry import ConfigurationError

MOST_UNITS, MOST_LAYERS = 100_000, 100


class LSTM(nnx.Module):
    """A layer of long short-term memory; gates in the order input, forget, cell, output.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997, with the forget gate of Gers et al., 2000. PyTorch's
    form: two biases that are added, all weights drawn from U(±1/√units).
    """

    def __init__(self, inputs: int, units: int, *, rngs: nnx.Rngs):
        self.input_kernel = uniform_fan_in(rngs, (inputs, 4 * units), units)
        self.hidden_kernel = uniform_fan_in(rngs, (units, 4 * units), units)
        self.input_bias = uniform_fan_in(rngs, (4 * units,), units)
        self.hidden_bias = uniform_fan_in(rngs, (4 * units,), units)

    def __call__(self, inputs: Float[Array, "T B inputs"]) -> Float[Array, "T B units"]:
        """The hidden states of all steps, from a state of zeros."""
        # The inputs of all steps in one product; only the recurrence itself goes step by step.
        projected = inputs @ self.input_kernel[...] + (self.input_bias[...] + self.hidden_bias[...])
        return recurrence(projected, self.hidden_kernel[...])


def _step(
    gates: Float[Array, "B 4*units"], cell: Float[Array, "B units"]
) -> tuple[Float[Array, "B units"], Float[Array, "B units"]]:
    """The new hidden state and cell."""
    taken, kept, new, shown = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(kept) * cell + jax.nn.sigmoid(taken) * jnp.tanh(new)
    return jax.nn.sigmoid(shown) * jnp.tanh(cell), cell


@jax.custom_vjp
def recurrence(
    projected: Float[Array, "T B 4*units"], kernel: Float[Array, "units 4*units"]
) -> Float[Array, "T B units"]:
    """The hidden states of an LSTM, from a state of zeros.

    Its gradient is written out so that the kernel's is one product over all steps: left to JAX, every step of the backward
    pass adds a product of its own to an array as large as the kernel.

    Args:
      projected: the gates' share of inputs and biases.
      kernel: the gates' share of the hidden state before.
    """
    return _forward(projected, kernel)[0]


def _forward(projected: Array, kernel: Array) -> tuple[Array, tuple]:
    start = jnp.zeros((projected.shape[1], kernel.shape[0]), projected.dtype)

    def step(state: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], tuple]:
        hidden, cell = state
        gates = share + hidden @ kernel
        new = _step(gates, cell)
        return new, (new[0], gates, cell)

    _, (hiddens, gates, cells) = jax.lax.scan(step, (start, start), projected)
    return hiddens, (hiddens, gates, cells, kernel)


def _backward(saved: tuple, gradients: Array) -> tuple[Array, Array]:
    hiddens, gates, cells, kernel = saved

    def step(later: tuple[Array, Array], at: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        of_hidden, of_cell = later
        gradient, gate, cell = at
        _, pull = jax.vjp(_step, gate, cell)
        of_gate, of_cell = pull((gradient + of_hidden, of_cell))
        return (of_gate @ kernel.T, of_cell), of_gate

    start = jnp.zeros_like(cells[0])
    _, of_gates = jax.lax.scan(step, (start, start), (gradients, gates, cells), reverse=True)
    # The first step's hidden state is zero and adds nothing.
    of_kernel = jnp.einsum("tbu,tbg->ug", hiddens[:-1], of_gates[1:])
    return of_gates, of_kernel


recurrence.defvjp(_forward, _backward)


class CharacterLSTM(nnx.Module):
    """Embedding, LSTM layers, dense; predicts the character after the window, in training after every position if asked."""

    def __init__(self, classes: int, *, embedding: int, hidden: int, layers: int, every: bool, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (classes, embedding)))
        self.layers = layers
        for number in range(1, layers + 1):
            setattr(self, f"lstm{number}", LSTM(embedding if number == 1 else hidden, hidden, rngs=rngs))
        self.dense = Dense(hidden, classes, rngs=rngs)
        self.every = every

    def __call__(
        self, inputs: UInt8[Array, "B T"], mask: Bool[Array, "B"] | None = None, *, train: bool
    ) -> Float[Array, "B classes"] | Float[Array, "B T classes"]:
        outputs = self.embedding[...][inputs.T]  # [T, B, embedding]
        for number in range(1, self.layers + 1):
            outputs = getattr(self, f"lstm{number}")(outputs)
        if self.every and train:
            return jnp.swapaxes(self.dense(outputs), 0, 1)
        return self.dense(outputs[-1])


@models.register("characters")
def char_lstm(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    embedding: int = 8,
    hidden: int = 256,
    layers: Annotated[int, Field(ge=1, le=100)] = 2,
    predict: Literal["last", "every"] = "last",
) -> Callable[[nnx.Rngs], nnx.Module]:
    """The character LSTM of FedMut and LEAF: embedding 8, two layers of 256 units, next character.

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017; Caldas
    et al., "LEAF", arXiv 1812.01097, 2018; FedMut (AAAI 2024). Initial weights are PyTorch's, as in FedMut's code: N(0, 1)
    for the embedding, U(±1/√units) for the rest.

    Args:
      input_shape: length of the windows.
      classes: number of characters.
      embedding: numbers that stand for a character.
      hidden: units of each layer.
      layers: LSTM layers.
      predict: what the loss of training counts: the character after the window (LEAF, FedProx, FedMut), or the next
        character at every position (McMahan et al., 2017; Reddi et al., "Adaptive federated optimization", 2021). Tests
        count the character after the window in both cases.

    Raises:
      ConfigurationError: a size is out of range, or the inputs are no windows of text.
    """
    if len(input_shape) != 1 or input_shape[0] < 1:
        raise ConfigurationError(
            f"model 'char_lstm' takes windows of text of the shape (characters,), but an input here has the shape "
            f"{input_shape}."
        )
    limits = (("embedding", embedding, MOST_UNITS), ("hidden", hidden, MOST_UNITS), ("layers", layers, MOST_LAYERS))
    for name, size, most in limits:
        if not 1 <= size <= most:
            raise ConfigurationError(f"model 'char_lstm': {name} = {size} must be between 1 and {most}.")
    every = predict == "every"
    return lambda rngs: CharacterLSTM(
        classes, embedding=embedding, hidden=hidden, layers=layers, every=every, rngs=rngs
    )
