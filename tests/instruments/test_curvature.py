"""Eigenvalues and trace against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from quadratic_bowl import EIGENVALUES, MATRIX, bowl
from scipy.sparse.linalg import LinearOperator, eigsh

from fedjax_qp.contract.federations import digits, small_model
from fedjax_qp.engine import cut_test_set
from fedjax_qp.federated import Batch, Params
from fedjax_qp.instruments import curvature
from fedjax_qp.instruments.curvature import _measure, hutchinson, lanczos, spectrum
from fedjax_qp.instruments.objective import Objective


def of_matrix(matrix: np.ndarray, steps: int):
    matrix = jnp.asarray(matrix, jnp.float32)
    start = jax.random.normal(jax.random.key(0), (len(matrix),))
    found = jax.jit(lambda start: lanczos(lambda v: matrix @ v, start, steps))(start / jnp.linalg.norm(start))
    return spectrum(found)


def symmetric(eigenvalues: np.ndarray) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(len(eigenvalues),) * 2))[0]
    return (rotation * eigenvalues) @ rotation.T


def test_as_many_steps_as_entries_give_the_whole_spectrum():
    found = of_matrix(MATRIX, 6)
    np.testing.assert_allclose(found.values, np.sort(EIGENVALUES), atol=1e-4)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-4)


def test_extreme_eigenvalues_and_residuals_of_a_larger_matrix():
    """Well-separated ends over a bulk, as a network's Hessian has; scipy's ARPACK is the oracle."""
    bulk = np.random.default_rng(2).normal(scale=0.3, size=195)
    matrix = symmetric(np.concatenate([bulk, [40, 25, 12, -6, 7.0]]))
    found = of_matrix(matrix, 40)
    operator = LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=matrix.dtype)
    np.testing.assert_allclose(found.values[-4:], eigsh(operator, 4, which="LA")[0], rtol=1e-4)
    np.testing.assert_allclose(found.values[0], eigsh(operator, 1, which="SA")[0], rtol=1e-4)
    assert (np.diff(found.values[-4:]) > 1).all()  # no ghosts: each eigenvalue appears once
    exact = np.linalg.eigvalsh(matrix)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert np.abs(exact - value).min() <= residual + 1e-4


def test_an_invariant_subspace_ends_the_recurrence():
    found = of_matrix(symmetric(np.array([3.0, 3, 3, 3, -1, -1, -1, -1])), 8)
    np.testing.assert_allclose(found.values, [-1, 3], atol=1e-5)


def test_the_trace_s_estimates_are_unbiased_with_the_right_spread():
    matrix = jnp.asarray(MATRIX, jnp.float32)
    found = np.asarray(hutchinson(lambda v: matrix @ v, jnp.zeros(6), jax.random.key(0), 4000, 50))
    variance = 2 * (np.sum(MATRIX**2) - np.sum(np.diag(MATRIX) ** 2))  # of a Rademacher probe
    np.testing.assert_allclose(found.mean(), EIGENVALUES.sum(), atol=4 * np.sqrt(variance / 4000))
    np.testing.assert_allclose(found.var(), variance, rtol=0.1)


def test_a_network_s_hessian():
    """Against the dense Hessian; the trace within three standard errors."""
    model = small_model()
    params = model.init(jax.random.key(1))
    examples = jax.tree.map(lambda leaf: leaf[:40], digits().train)
    vector, back = ravel_pytree(params.trainable)

    def whole(flat):
        return model.loss((), Params(back(flat), {}), Batch(examples, np.ones(40, bool)), jax.random.key(0))[0]

    exact = np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(whole))(vector), float))
    objective = Objective((), {}, cut_test_set(examples, 16))
    recurrence, probes = _measure(model, objective, params.trainable, jax.random.key(0), 40, 64, 4)
    found = spectrum(jax.device_get(recurrence))
    np.testing.assert_allclose(found.values[-3:], exact[-3:], rtol=1e-3)
    np.testing.assert_allclose(found.values[0], exact[0], atol=1e-3 * exact[-1])
    probes = np.asarray(probes, float)
    assert abs(probes.mean() - exact.sum()) < 3 * probes.std(ddof=1) / np.sqrt(len(probes))


def test_one_program_for_all_checkpoints(compilations):
    model, objective, trainable = bowl()
    arguments = (jax.random.key(0), 3, 4, 2)
    jax.block_until_ready(_measure(model, objective, trainable, *arguments))
    before = compilations()
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, trainable)
    jax.block_until_ready(_measure(model, objective, moved, *arguments))
    assert compilations() == before


def test_headline_takes_the_ends():
    result = {"largest": [5.0, 3.0], "smallest": [-1.0, 0.0], "trace": 7.0, "trace_error": 0.5}
    assert list(curvature.headline(result).values()) == [5.0, -1.0, 7.0, 0.5]
