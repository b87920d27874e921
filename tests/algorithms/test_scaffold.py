"""SCAFFOLD against algorithm 1 of the paper in numpy, and its limits."""

import numpy as np
import pytest
from support.softmax import RATE, as_matrix, cohorts, first_weights, gradient, own_examples, trained

from fedjax_qp.contract.federations import CLIENTS, worst_difference


def by_hand(option: str, server_rate: float) -> tuple[np.ndarray, np.ndarray, dict]:
    """Algorithm 1, with the paper's formula of option II. Returns x, c and the c_i of those who took part."""
    x = first_weights()
    c, controls = np.zeros_like(x), {}
    for members in cohorts():
        moves, changes = [], []
        for client, _, batches in members:
            c_i, y = controls.get(client, np.zeros_like(x)), x
            for batch in batches:
                y = y - RATE * (gradient(y, batch) - c_i + c)
            new = gradient(x, own_examples(client)) if option == "I" else c_i - c + (x - y) / (len(batches) * RATE)
            moves.append(y - x)
            changes.append(new - c_i)
            controls[client] = new
        x = x + server_rate * np.mean(moves, 0)
        c = c + len(members) / CLIENTS * np.mean(changes, 0)
    return x, c, controls


@pytest.mark.parametrize(("option", "server_rate"), [("I", 1.0), ("II", 0.7)])
def test_rounds_equal_the_papers(option, server_rate):
    x, c, controls = by_hand(option, server_rate)
    state = trained("scaffold", option=option, server_learning_rate=server_rate)
    np.testing.assert_allclose(as_matrix(state.server.params.trainable), x, atol=2e-6)
    np.testing.assert_allclose(as_matrix(state.server.control), c, atol=2e-6)
    memories = [as_matrix(state.memories[client]) for client in controls]
    np.testing.assert_allclose(memories, list(controls.values()), atol=2e-6)


def test_the_servers_control_is_the_mean_of_the_clients():
    """Of all of them: those who never took part count with 0."""
    state = trained("scaffold")
    mean = np.mean([as_matrix(memory) for memory in state.memories], 0)
    np.testing.assert_allclose(as_matrix(state.server.control), mean, atol=1e-6)


def test_before_there_are_controls_it_is_fedavg():
    plain, controlled = (trained(name, weighting="uniform").servers for name in ("fedavg", "scaffold"))
    assert worst_difference(plain[1].params, controlled[1].params) <= 1e-6
    assert worst_difference(plain[2].params, controlled[2].params) > 1e-3


def test_one_step_of_everybody_is_fedavg():
    """The corrections of all clients add up to nothing, since c is the mean of the c_i."""
    plain, controlled = (trained(name, one_step=True, weighting="uniform") for name in ("fedavg", "scaffold"))
    assert worst_difference(plain.server.params, controlled.server.params) <= 1e-5
    assert np.abs(as_matrix(controlled.memories[0])).max() > 0.1
