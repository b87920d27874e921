"""FedACG against its paper's algorithm in numpy, and against FedQP's drift alone, which is the same without the penalty."""

import jax
import numpy as np
import pytest
from support.federations import small_algorithm
from support.softmax import RATE, as_matrix, cohorts, first_weights, gradient, trained

from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import images, run_rounds, small_engine, worst_difference


@pytest.mark.parametrize("weighting", ["size", "uniform"])
def test_rounds_equal_the_papers(weighting):
    momentum, penalty, weights = 0.7, 2.0, first_weights()
    ahead = np.zeros_like(weights)
    for members in cohorts():
        start, differences = weights + momentum * ahead, []
        for work in members:
            here = start
            for batch in work.batches:
                here = here - RATE * (gradient(here, batch) + penalty * (here - start))
            differences.append(here - start)
        sizes = [work.size if weighting == "size" else 1 for work in members]
        ahead = momentum * ahead + np.average(differences, axis=0, weights=sizes)
        weights = weights + ahead
    state = trained("fedacg", momentum=momentum, proximal=penalty, weighting=weighting)
    np.testing.assert_allclose(as_matrix(state.server.params.trainable), weights, atol=2e-5)


@pytest.mark.parametrize("momentum", [0.3, 0.85])
def test_without_its_penalty_it_is_fedqps_drift_alone(momentum):
    federation = images()

    def after_rounds(name: str, **options):
        algorithm = algorithms.build(name, federation.model, federation.optimizer, **options)
        return run_rounds(algorithm, small_engine(algorithm), lanes=2, rounds=4)[0].server.params

    drift = after_rounds("fedqp", form="joint", use="drift", drift=momentum, alpha=2.0)
    accelerated = after_rounds("fedacg", momentum=momentum, proximal=0.0, weighting="uniform")
    assert worst_difference(accelerated, drift) < 1e-3
    plain = after_rounds("fedavg", weighting="uniform")
    assert worst_difference(accelerated, plain) > 0.05


def test_clients_start_ahead_of_the_global_model():
    algorithm = small_algorithm("fedacg")
    state, _ = run_rounds(algorithm, small_engine(algorithm), lanes=2)
    shared, _, _ = algorithm.dispatch(state.server, None, None)
    moved = jax.tree.map(np.subtract, shared.trainable, state.server.params.trainable)
    trace = state.server.optimizer_state[0].trace
    assert worst_difference(moved, jax.tree.map(lambda leaf: -0.85 * leaf, trace)) < 1e-3
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 0
