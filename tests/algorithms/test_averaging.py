"""FedAvg, FedProx, FedAvgM, FedAdam, FedYogi and Ditto against their papers' algorithms in numpy."""

from collections.abc import Callable

import numpy as np
import pytest
from support.softmax import RATE, Work, as_matrix, cohorts, first_weights, gradient, trained

RATE_OF_SERVER, BETA1, BETA2, ADAPTIVITY = 0.02, 0.9, 0.99, 1e-3
Server = Callable[[np.ndarray, int], np.ndarray]  # (mean difference, round from 1) -> what is added to the model


def local(weights: np.ndarray, work: Work, proximal: float = 0.0) -> np.ndarray:
    begun = weights
    for batch in work.batches:
        weights = weights - RATE * (gradient(weights, batch) + proximal * (weights - begun))
    return weights


def by_hand(server: Server, *, by_size: bool = True, proximal: float = 0.0) -> np.ndarray:
    weights = first_weights()
    for number, members in enumerate(cohorts(), 1):
        sizes = [work.size if by_size else 1 for work in members]
        differences = [local(weights, work, proximal) - weights for work in members]
        weights = weights + server(np.average(differences, axis=0, weights=sizes), number)
    return weights


def plain(difference: np.ndarray, number: int) -> np.ndarray:
    return difference


def heavy_ball(momentum: float, rate: float) -> Server:
    state = {"v": 0.0}

    def server(difference: np.ndarray, number: int) -> np.ndarray:
        state["v"] = momentum * state["v"] + difference
        return rate * state["v"]

    return server


def adaptive(kind: str) -> Server:
    """As optax has it: bias corrected, Adam from 0, Yogi from 1e-6 (of the gradient, which is the negated difference)."""
    start = 0.0 if kind == "adam" else 1e-6
    state = {"m": -start, "v": start}

    def server(difference: np.ndarray, number: int) -> np.ndarray:
        square = difference**2
        toward = state["v"] - square if kind == "adam" else np.sign(state["v"] - square) * square
        state["m"] = BETA1 * state["m"] + (1 - BETA1) * difference
        state["v"] = state["v"] - (1 - BETA2) * toward
        m, v = state["m"] / (1 - BETA1**number), state["v"] / (1 - BETA2**number)
        return RATE_OF_SERVER * m / (np.sqrt(v) + ADAPTIVITY)

    return server


CASES = {
    "fedavg": (lambda: by_hand(plain), {}),
    "fedavg, uniform": (lambda: by_hand(plain, by_size=False), {"weighting": "uniform"}),
    "fedprox": (lambda: by_hand(plain, proximal=2.0), {"proximal": 2.0}),
    "fedavgm": (lambda: by_hand(heavy_ball(0.7, 0.5)), {"momentum": 0.7, "server_learning_rate": 0.5}),
    "fedadam": (lambda: by_hand(adaptive("adam")), {"server_learning_rate": RATE_OF_SERVER}),
    "fedyogi": (lambda: by_hand(adaptive("yogi")), {"server_learning_rate": RATE_OF_SERVER}),
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_equal_the_papers(case):
    expected, options = CASES[case]
    state = trained(case.split(",")[0], **options)
    np.testing.assert_allclose(as_matrix(state.server.params.trainable), expected(), atol=2e-5)


def test_dittos_personal_models_equal_the_papers():
    strength, weights, personal = 1.5, first_weights(), {}
    for members in cohorts():
        for work in members:
            v = personal.get(work.client, weights)
            for batch in work.batches:
                v = v - RATE * (gradient(v, batch) + strength * (v - weights))
            personal[work.client] = v
        results = [local(weights, work) for work in members]
        weights = np.average(results, axis=0, weights=[work.size for work in members])
    state = trained("ditto", proximal=strength)
    np.testing.assert_allclose(as_matrix(state.server.params.trainable), weights, atol=5e-6)
    for client, expected in personal.items():
        np.testing.assert_allclose(as_matrix(state.memories[client].params.trainable), expected, atol=5e-6)
