"""FedSAM and FedASAM against a numpy loop, and their limit."""

import jax
import numpy as np
import pytest
from support.softmax import RATE, as_matrix, cohorts, first_weights, gradient, softmax, trained

from fedjax_qp.algorithms.fedsam import ascent_of, sharpness_aware
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.federated import Batch

ADAPTIVITY = 0.2


def by_hand(radius: float, adaptive: bool) -> np.ndarray:
    weights = first_weights()
    for members in cohorts():
        results = []
        for _, _, batches in members:
            local = weights
            for batch in batches:
                scale = np.abs(local) + ADAPTIVITY if adaptive else 1.0
                slope = scale * gradient(local, batch)
                above = local + radius * scale * slope / np.linalg.norm(slope)
                local = local - RATE * gradient(above, batch)
            results.append(local)
        weights = np.average(results, axis=0, weights=[member.size for member in members])
    return weights


@pytest.mark.parametrize(("radius", "adaptive"), [(0.3, False), (0.7, True)])
def test_rounds_equal_the_papers(radius, adaptive):
    state = trained("fedsam", radius=radius, adaptive=adaptive, adaptivity=ADAPTIVITY)
    np.testing.assert_allclose(as_matrix(state.server.params.trainable), by_hand(radius, adaptive), atol=5e-6)


def test_without_radius_it_is_fedavg():
    plain, flat = trained("fedavg"), trained("fedsam", radius=0.0)
    assert worst_difference(plain.server.params, flat.server.params) <= 1e-6


def test_the_loss_stays_the_loss_at_the_weights():
    params = softmax().model.init(jax.random.key(0))
    batch = Batch(jax.tree.map(lambda leaf: leaf[:8], softmax().train), np.ones(8, bool))
    sharp = sharpness_aware(softmax().model.loss, ascent_of(0.5, False, 0.0))
    expected, _ = softmax().model.loss((), params, batch, None)
    np.testing.assert_allclose(sharp((), params, batch, None)[0], expected, rtol=1e-6)


def test_a_flat_point_is_not_left():
    """No gradient, no ascent: nothing is divided by zero."""
    params = softmax().model.init(jax.random.key(0))
    nothing = Batch(jax.tree.map(lambda leaf: leaf[:8], softmax().train), np.zeros(8, bool))
    sharp = sharpness_aware(softmax().model.loss, ascent_of(0.5, False, 0.0))
    gradient_there = jax.grad(lambda params: sharp((), params, nothing, None)[0])(params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient_there))
