"""MOON against a numpy loop with hand-written gradients, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.softmax import RATE, as_matrices, cohorts, errors, softmax, trained, with_ones

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.moon import contrast, cosine
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.experiment import build, first_state
from fedjax_qp.federated import Params
from fedjax_qp.registry import ConfigurationError

HIDDEN, MU, TAU = (16,), 5.0, 0.5


def features(weights: list[np.ndarray], inputs: np.ndarray) -> np.ndarray:
    return np.maximum(inputs @ weights[0], 0)


def cosine_and_slope(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair of rows, and the gradient by the first."""
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)]
    value = (first * second).sum(1, keepdims=True) / (lengths[0] * lengths[1])
    return value, second / (lengths[0] * lengths[1]) - value * first / lengths[0] ** 2


def stepped(local: list, shared: list, previous: list, batch: tuple) -> list:
    """One step of plain SGD on the paper's loss."""
    inputs, labels = batch
    z = features(local, inputs)
    toward, toward_slope = cosine_and_slope(z, features(shared, inputs))
    away, away_slope = cosine_and_slope(z, features(previous, inputs))
    odds = np.exp(away / TAU) / (np.exp(toward / TAU) + np.exp(away / TAU))
    by_logits = errors(with_ones(z) @ local[1], labels)
    by_features = by_logits @ local[1][:-1].T + MU / len(labels) * odds / TAU * (away_slope - toward_slope)
    gradients = [inputs.T @ (by_features * (z > 0)), with_ones(z).T @ by_logits]
    return [weights - RATE * slope for weights, slope in zip(local, gradients, strict=True)]


def test_rounds_equal_the_papers():
    shared = as_matrices(softmax(HIDDEN).model.init(jax.random.key(0)).trainable)
    first, last = shared, {}
    for members in cohorts():
        results = []
        for client, _, batches in members:
            local = shared
            for batch in batches:
                local = stepped(local, shared, last.get(client, first), batch)
            results.append(local)
            last[client] = local
        sizes = [member.size for member in members]
        shared = [np.average(layer, axis=0, weights=sizes) for layer in zip(*results, strict=True)]
    played = trained("moon", HIDDEN, contrastive=MU, temperature=TAU)
    for ours, expected in zip(as_matrices(played.server.params.trainable), shared, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    for client, expected in last.items():
        assert worst_difference(expected, as_matrices(played.memories[client].trainable)) <= 1e-4


def test_without_contrast_it_is_fedavg():
    plain, contrasted = trained("fedavg", HIDDEN), trained("moon", HIDDEN, contrastive=0.0)
    assert worst_difference(plain.server.params, contrasted.server.params) <= 1e-6


def test_the_first_round_of_everybody_is_fedavg():
    """The last model is the global one then: both terms of the contrast cancel."""
    plain, contrasted = trained("fedavg", HIDDEN), trained("moon", HIDDEN, contrastive=MU, temperature=TAU)
    assert worst_difference(plain.servers[1].params, contrasted.servers[1].params) <= 1e-5
    assert worst_difference(plain.server.params, contrasted.server.params) > 1e-3


def test_features_that_are_off_have_no_gradient():
    off, on = jnp.zeros((1, 3)), jnp.ones((1, 3))
    np.testing.assert_array_equal(cosine(off, on), 0)
    slope = jax.grad(lambda z: contrast(z, on, -on, 0.5).sum())(off)
    assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(contrast(on, on, on, 0.5), np.log(2), rtol=1e-6)


def test_a_model_in_one_part_is_refused():
    whole = softmax(HIDDEN).model._replace(parts=None)
    algorithm = algorithms.build("moon", whole, optax.sgd(0.1))
    with pytest.raises(ConfigurationError, match="choose a model of images with hidden layers"):
        algorithm.init_server(Params({}, ()), 1)


def test_features_that_are_the_image_itself_are_refused():
    settings = {"name": "x", "data": "digits", "partition": {"name": "iid", "clients": 10}, "algorithm": "moon"}
    assert build(config.from_dict({**settings, "model": {"name": "mlp", "hidden": [8]}})).model.parts is not None
    with pytest.raises(ConfigurationError, match="choose a model of images with hidden layers"):
        first_state(build(config.from_dict({**settings, "model": {"name": "mlp", "hidden": []}})))
