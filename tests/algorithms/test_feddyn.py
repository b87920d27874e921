"""FedDyn against algorithm 1 of the paper in numpy, and its limits."""

import numpy as np
from support.softmax import RATE, as_matrix, cohorts, first_weights, gradient, softmax, trained

from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import CLIENTS, COHORT, worst_difference


def by_hand(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 in the paper's own terms, g_k and h: the server's model, and the mean of the last cohort's."""
    theta = first_weights()
    h, gradients = np.zeros_like(theta), {}
    for members in cohorts():
        results = []
        for client, _, batches in members:
            g, local = gradients.get(client, np.zeros_like(theta)), theta
            for batch in batches:
                local = local - RATE * (gradient(local, batch) - g + alpha * (local - theta))
            gradients[client] = g - alpha * (local - theta)
            results.append(local)
        h = h - alpha / CLIENTS * sum(local - theta for local in results)
        theta = np.mean(results, 0) - h / alpha
    return theta, np.mean(results, 0)


def test_rounds_equal_the_papers():
    theta, mean = by_hand(0.5)
    for served, expected in {"server": theta, "average": mean}.items():
        state = trained("feddyn", alpha=0.5)
        np.testing.assert_allclose(as_matrix(state.server.params.trainable), theta, atol=5e-6)
        algorithm = algorithms.build("feddyn", softmax().model, softmax().optimizer, alpha=0.5, served=served)
        np.testing.assert_allclose(as_matrix(algorithm.serve(state.server, ()).trainable), expected, atol=5e-6)


def test_the_servers_term_is_the_mean_of_all_clients_moves():
    state = trained("feddyn", alpha=0.5)
    mean = np.mean([as_matrix(memory) for memory in state.memories], 0)
    np.testing.assert_allclose(as_matrix(state.server.moves), mean, atol=1e-6)


def test_without_alpha_the_clients_work_is_fedavgs():
    """The server still adds its mean of all past moves, so after one round it has gone 1 + M/K times as far."""
    start = first_weights()
    plain, dynamic = (
        as_matrix(state.servers[1].params.trainable)
        for state in (trained("fedavg", weighting="uniform"), trained("feddyn", alpha=0.0))
    )
    np.testing.assert_allclose(dynamic - start, (1 + COHORT / CLIENTS) * (plain - start), atol=1e-6)


def test_alpha_goes_to_zero_smoothly():
    nearly, none = trained("feddyn", alpha=1e-6), trained("feddyn", alpha=0.0)
    assert worst_difference(none.server.params, nearly.server.params) <= 1e-4
