"""Max-pooling against numpy, and its gradient, ties and odd sizes included."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.models.pooling import global_average_pool, max_of_windows, max_pool


def reference(inputs: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loops: the value, and the gradient given to the first maximum in row-major order."""
    outputs, back = np.zeros_like(gradient), np.zeros_like(inputs)
    for example, row, column, channel in np.ndindex(gradient.shape):
        window = inputs[example, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2, channel]
        y, x = np.unravel_index(window.argmax(), (2, 2))
        outputs[example, row, column, channel] = window[y, x]
        back[example, 2 * row + y, 2 * column + x, channel] = gradient[example, row, column, channel]
    return outputs, back


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(2, 7), st.integers(2, 7), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_equals_loops_with_many_ties(shape: tuple[int, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs = random.integers(0, 3, shape).astype(np.float32)
    gradient = random.normal(size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])).astype(np.float32)

    def value_and_gradient(inputs, gradient):
        outputs, pull_back = jax.vjp(max_pool, inputs)
        return outputs, pull_back(gradient)[0]

    outputs, back = jax.jit(value_and_gradient)(inputs, gradient)
    expected, expected_back = reference(inputs, gradient)
    np.testing.assert_array_equal(outputs, expected)
    np.testing.assert_array_equal(back, expected_back)


def test_equals_reduce_window_under_vmap() -> None:
    inputs = jax.random.normal(jax.random.key(0), (3, 2, 5, 6, 4))
    expected = jax.lax.reduce_window(inputs, -jnp.inf, jax.lax.max, (1, 1, 2, 2, 1), (1, 1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(jax.vmap(max_pool)(inputs), expected)


def test_max_of_windows_gives_the_gradient_to_the_first_maximum() -> None:
    windows = jnp.array([[[1.0, 2.0]], [[3.0, 2.0]], [[3.0, 0.0]], [[0.0, 2.0]]])
    outputs, pull_back = jax.vjp(max_of_windows, windows)
    np.testing.assert_array_equal(outputs, [[3, 2]])
    np.testing.assert_array_equal(pull_back(jnp.array([[5.0, 7.0]]))[0][:, 0], [[0, 7], [5, 0], [0, 0], [0, 0]])


def test_global_average_pool() -> None:
    inputs = jnp.arange(24.0).reshape(1, 2, 3, 4)
    np.testing.assert_allclose(global_average_pool(inputs), [[10, 11, 12, 13]])
