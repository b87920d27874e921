"""Cosines between clients."""

import jax
import numpy as np
import pytest

from fedjax_qp.instruments.replay import conflict_share, cosine_matrix, mean_cosine


def test_cosine_matrix_is_numpy_s():
    random = np.random.default_rng(0)
    rows = {"a": random.normal(size=(5, 3, 2)), "b": random.normal(size=(5, 4))}
    rows = jax.tree.map(lambda leaf: leaf.astype(np.float32), rows)
    rows["a"][3], rows["b"][3] = 0, 0  # one who did not report
    flat = np.concatenate([rows["a"].reshape(5, -1), rows["b"]], axis=1)
    expected = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            if 3 not in (i, j):
                expected[i, j] = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
    np.testing.assert_allclose(cosine_matrix(rows), expected, atol=1e-6)


def test_share_and_mean_count_each_pair_once():
    cosines = np.array([[1, -0.5, 0.2], [-0.5, 1, -0.1], [0.2, -0.1, 1]])
    clients = np.array([4, 7, 9])
    assert conflict_share(cosines, clients) == pytest.approx(2 / 3)
    assert mean_cosine(cosines, clients) == pytest.approx(-0.4 / 3)
    assert np.isnan(conflict_share(np.ones((1, 1)), np.array([4])))


def test_a_client_that_was_drawn_twice_is_no_pair_with_itself():
    cosines = np.array([[1, 1, -0.1], [1, 1, -0.1], [-0.1, -0.1, 1]])
    assert conflict_share(cosines, np.array([4, 4, 9])) == 1
    assert mean_cosine(cosines, np.array([4, 4, 9])) == pytest.approx(-0.1)
