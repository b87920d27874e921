"""The dense layer's product has a gradient rule of its own: derivatives are those of the plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_qp.models.layers import product


def objective(multiply, inputs, kernel):
    return jnp.sin(multiply(jnp.tanh(inputs), kernel)).sum()


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_first_and_second_derivatives_are_the_plain_ones(leading):
    keys = jax.random.split(jax.random.key(0), 4)
    at, along = (
        tuple(jax.random.normal(key, shape) for key, shape in zip(pair, ((*leading, 7), (7, 3)), strict=True))
        for pair in (keys[:2], keys[2:])
    )
    gradients, curvatures = [], []
    for multiply in (product, jnp.matmul):
        gradient = jax.grad(lambda *of, multiply=multiply: objective(multiply, *of), (0, 1))
        found, curvature = jax.jvp(gradient, at, along)
        gradients.append(found)
        curvatures.append(curvature)
    for ours, plain in (gradients, curvatures):
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_many_clients_kernels_is_not_transposed():
    """One product gives it in the kernel's own layout: that is why the rule exists."""
    inputs, kernels = jnp.ones((2, 5, 7)), jnp.ones((2, 7, 3))

    def gradient(inputs, kernel):
        return jax.grad(lambda kernel: objective(product, inputs, kernel))(kernel)

    text = str(jax.make_jaxpr(jax.vmap(gradient))(inputs, kernels))
    assert "transpose" not in text
    plain = jax.vmap(jax.grad(lambda kernel, inputs: objective(jnp.matmul, inputs, kernel)))
    assert "transpose" in str(jax.make_jaxpr(plain)(kernels, inputs))
