"""Laws of FedMut's mutation (AAAI 2024): signs, lengths, the shrinking backward share, the odd client, its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.federations import small_algorithm

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.fedmut import (
    MutationServer,
    Own,
    Shared,
    backward_share,
    layer_squared_norms,
    mutation_signs,
    start_model,
)
from fedjax_qp.contract.federations import run_rounds, small_engine, small_model, worst_difference
from fedjax_qp.federated import Cohort, Params


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), members=st.sampled_from([1, 2, 5, 10]), beta=st.sampled_from([0.0, 0.3, 1.0]))
def test_signs_are_half_and_half_in_every_layer(seed, members, beta):
    signs = np.asarray(mutation_signs(jax.random.key(seed), members, 7, jnp.float32(beta)))
    half = members // 2
    assert signs.shape == (members, 7)
    np.testing.assert_allclose(np.sort(signs[: 2 * half], axis=0)[:half], beta - 1, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(signs[: 2 * half], axis=0)[half:], 1.0)
    np.testing.assert_array_equal(signs[2 * half :], 0.0)


def test_layers_draw_independently_and_rounds_differ():
    signs = mutation_signs(jax.random.key(0), 10, 8, jnp.float32(0))
    assert len({tuple(column) for column in np.asarray(signs).T}) > 1
    assert not np.array_equal(signs, mutation_signs(jax.random.key(1), 10, 8, jnp.float32(0)))


def test_backward_share_falls_to_zero():
    shares = [float(backward_share(0.3, 50, jnp.int32(round))) for round in (0, 25, 50, 80)]
    np.testing.assert_allclose(shares, [0.3, 0.15, 0.0, 0.0], atol=1e-7)


@pytest.fixture(scope="module")
def update():
    """A made-up global update of the small model, with layers of very different length."""
    trainable = small_model().init(jax.random.key(3)).trainable
    leaves, structure = jax.tree.flatten(trainable)
    scales = np.logspace(-2, 1, len(leaves))
    return jax.tree.unflatten(structure, [leaf * scale + 0.01 for leaf, scale in zip(leaves, scales, strict=True)])


@pytest.mark.parametrize("members", [4, 5])
def test_mutants_sum_to_zero_and_have_length_alpha_g(update, members):
    """With β = 0: Σ_i (w_i − w) = 0 and ‖w_i − w‖ = α‖g‖, except the odd client, which is not mutated."""
    alpha = 4.0
    params = Params(jax.tree.map(jnp.zeros_like, update), {})
    algorithm = algorithms.build("fedmut", small_model(), optax.sgd(0.1), alpha=alpha, beta0=0.0)
    server = MutationServer(params, update, jnp.int32(0), ())
    cohort = Cohort(jnp.arange(members), jnp.ones(members), jnp.ones(members))
    shared, own, metrics = algorithm.dispatch(server, cohort, jax.random.key(0))
    mutants = [start_model(shared, jax.tree.map(lambda leaf, i=i: leaf[i], own)) for i in range(members)]
    length = np.sqrt(float(layer_squared_norms(update).sum()))
    total = jax.tree.map(lambda *leaves: sum(leaves), *mutants)
    assert float(optax.tree.norm(total)) <= 1e-5 * length
    lengths = [float(optax.tree.norm(mutant)) for mutant in mutants]
    np.testing.assert_allclose(lengths[: members - members % 2], alpha * length, rtol=1e-5)
    np.testing.assert_allclose(lengths[members - members % 2 :], 0)
    assert float(metrics["mutation/drift"]) == pytest.approx(0, abs=1e-6)


def test_drift_is_half_alpha_beta(update):
    algorithm = algorithms.build("fedmut", small_model(), optax.sgd(0.1), alpha=4.0, beta0=0.3, mutation_rounds=50)
    for members, expected in ((10, 4 * 0.3 / 2), (5, 4 * 0.3 / 2 * 4 / 5)):
        server = MutationServer(Params(update, {}), update, jnp.int32(0), ())
        cohort = Cohort(jnp.arange(members), jnp.ones(members), jnp.ones(members))
        metrics = algorithm.dispatch(server, cohort, jax.random.key(0))[2]
        assert float(metrics["mutation/drift"]) == pytest.approx(expected, rel=1e-5)


def test_start_model_is_the_coefficient_wise_combination(update):
    params = jax.tree.map(jnp.ones_like, update)
    coefficients = jnp.arange(len(jax.tree.leaves(update)), dtype=jnp.float32)
    made = start_model(Shared(Params(params, {}), update, ()), Own(coefficients, jnp.zeros(0)))
    for c, w, g, x in zip(coefficients, *map(jax.tree.leaves, (params, update, made)), strict=True):
        np.testing.assert_allclose(x, w + c * g, rtol=1e-6)


def test_without_length_it_is_uniform_fedavg():
    uniform = small_algorithm("fedavg-uniform")
    still = algorithms.build("fedmut", small_model(), optax.sgd(0.05, 0.9), alpha=0.0)
    expected, _ = run_rounds(uniform, small_engine(uniform), lanes=3, rounds=4)
    state, _ = run_rounds(still, small_engine(still), lanes=3, rounds=4)
    assert worst_difference(expected.server.params, state.server.params) <= 1e-5


def test_the_first_round_is_not_mutated():
    uniform, mutating = small_algorithm("fedavg-uniform"), small_algorithm("fedmut")
    expected, _ = run_rounds(uniform, small_engine(uniform), lanes=3, rounds=1)
    state, _ = run_rounds(mutating, small_engine(mutating), lanes=3, rounds=1)
    assert worst_difference(expected.server.params, state.server.params) <= 1e-6
    later, _ = run_rounds(mutating, small_engine(mutating), lanes=3, rounds=2)
    unmutated, _ = run_rounds(uniform, small_engine(uniform), lanes=3, rounds=2)
    assert worst_difference(unmutated.server.params, later.server.params) > 1e-3
