"""FedGen against a numpy loop with hand-written gradients, Adam included, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.softmax import RATE, ROUNDS, as_matrices, cohorts, errors, softmax, trained, with_ones

from fedjax_qp.algorithms.fedgen import diversity_loss, draw_inputs, first_generator
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.federated import client_key, round_keys

UNITS, CLASSES = 16, 10
OPTIONS = {
    "distillation": 2.0,
    "diversity": 0.5,
    "generator_learning_rate": 0.01,
    "generator_steps": 3,
    "generated": 6,
    "noise": 4,
    "hidden": 8,
}


def matrices(generator) -> list[np.ndarray]:
    return [np.vstack([layer.kernel, layer.bias]).astype(np.float64) for layer in generator]


def drawn(key, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same random numbers; what is done with them is the test's own."""
    labels, noise = draw_inputs(key, jnp.asarray(shares, jnp.float32), OPTIONS["generated"], OPTIONS["noise"])
    return np.asarray(labels), np.asarray(noise, np.float64)


def made(generator: list[np.ndarray], labels: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Inputs, hidden units and features."""
    inputs = with_ones(np.hstack([noise, np.eye(CLASSES)[labels]]))
    hidden = np.maximum(inputs @ generator[0], 0)
    return inputs, hidden, with_ones(hidden) @ generator[1]


def client_step(local: list, batch: tuple, features: np.ndarray, labels: np.ndarray, weight: float) -> list:
    inputs, real = batch
    z = np.maximum(inputs @ local[0], 0)
    by_logits = errors(with_ones(z) @ local[1], real)
    practice = with_ones(features).T @ errors(with_ones(features) @ local[1], labels)
    slopes = [
        inputs.T @ (by_logits @ local[1][:-1].T * (z > 0)),
        with_ones(z).T @ by_logits + weight * practice,
    ]
    return [weights - RATE * slope for weights, slope in zip(local, slopes, strict=True)]


def generator_slopes(generator: list, heads: list[np.ndarray], labels: np.ndarray, noise: np.ndarray) -> list:
    """Equation 4 with the diversity term."""
    inputs, hidden, z = made(generator, labels, noise)
    head = np.mean(heads, 0)  # the mean of affine maps is one
    noises = ((noise[:, None] - noise) ** 2).mean(-1)
    value = np.exp(-(noises * np.abs(z[:, None] - z).mean(-1)).mean())
    apart = 2 * (noises[..., None] * np.sign(z[:, None] - z)).sum(1) / (len(z) ** 2 * z.shape[1])
    by_z = errors(with_ones(z) @ head, labels) @ head[:-1].T - OPTIONS["diversity"] * value * apart
    by_hidden = by_z @ generator[1][:-1].T * (hidden > 0)
    return [inputs.T @ by_hidden, with_ones(hidden).T @ by_z]


class Adam:
    def __init__(self):
        self.first, self.second, self.steps = 0.0, 0.0, 0

    def __call__(self, weights: list, slopes: list) -> list:
        self.steps += 1
        flat = np.concatenate([slope.ravel() for slope in slopes])
        self.first, self.second = 0.9 * self.first + 0.1 * flat, 0.999 * self.second + 0.001 * flat**2
        mean, square = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        moves = np.split(OPTIONS["generator_learning_rate"] * mean / (np.sqrt(square) + 1e-8), [weights[0].size])
        return [w - move.reshape(w.shape) for w, move in zip(weights, moves, strict=True)]


def test_rounds_equal_the_papers():
    shared = as_matrices(softmax((UNITS,)).model.init(jax.random.key(0)).trainable)
    generator = matrices(first_generator(OPTIONS["noise"], CLASSES, OPTIONS["hidden"], UNITS))
    shares, adam = np.full(CLASSES, 1 / CLASSES), Adam()
    for number, members in enumerate(cohorts()):
        keys = round_keys(jax.random.key(0), jnp.int32(number))
        results, counts = [], np.zeros(CLASSES)
        for client, _, batches in members:
            local = shared
            for place, batch in enumerate(batches):
                labels, noise = drawn(client_key(keys.clients, jnp.int32(client), place + 1), shares)
                features = made(generator, labels, noise)[-1]
                local = client_step(local, batch, features, labels, OPTIONS["distillation"] * (number > 0))
                counts += np.bincount(batch[1], minlength=CLASSES)
            results.append(local)
        shared = [np.mean(layer, 0) for layer in zip(*results, strict=True)]
        shares = counts / counts.sum()
        for key in jax.random.split(keys.combine, OPTIONS["generator_steps"]):
            labels, noise = drawn(key, shares)
            generator = adam(generator, generator_slopes(generator, [result[1] for result in results], labels, noise))
    server = trained("fedgen", (UNITS,), **OPTIONS).server
    np.testing.assert_allclose(server.shared.shares, shares, atol=1e-6)
    for ours, expected in zip(as_matrices(server.shared.params.trainable), shared, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)
    for ours, expected in zip(matrices(server.shared.generator), generator, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4)
    assert int(server.shared.rounds) == ROUNDS


def test_without_distillation_it_is_fedavg():
    plain = trained("fedavg", (UNITS,), weighting="uniform")
    generating = trained("fedgen", (UNITS,), **{**OPTIONS, "distillation": 0.0})
    assert worst_difference(plain.server.params, generating.server.shared.params) <= 1e-5


def test_the_first_round_is_fedavg():
    plain, generating = trained("fedavg", (UNITS,), weighting="uniform"), trained("fedgen", (UNITS,), **OPTIONS)
    assert worst_difference(plain.servers[1].params, generating.servers[1].shared.params) <= 1e-5
    assert worst_difference(plain.server.params, generating.server.shared.params) > 1e-3


def test_diversity_by_hand():
    """Two rows a distance of (1 + 9)/2 and (2 + 0)/2 apart; each pair counts twice, a row with itself 0."""
    noise, features = jnp.array([[0.0, 0], [1, 3]]), jnp.array([[2.0, 1], [0, 1]])
    assert float(diversity_loss(noise, features)) == pytest.approx(np.exp(-(5 * 1 * 2) / 4))
    assert float(diversity_loss(noise, jnp.ones((2, 3)))) == 1
