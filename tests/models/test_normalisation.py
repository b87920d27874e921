"""Normalisation layers; above all that padded examples do nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_qp.models.normalisation import BatchNormalisation, GroupNormalisation, NoNormalisation, normalisation_layer

INPUTS = np.random.default_rng(0).normal(3, 2, (5, 4, 3, 2)).astype(np.float32)


def test_batch_statistics_equal_numpy() -> None:
    layer = BatchNormalisation(2)
    outputs = layer(jnp.asarray(INPUTS), train=True)
    mean, variance = INPUTS.mean((0, 1, 2)), INPUTS.var((0, 1, 2))
    np.testing.assert_allclose(outputs, (INPUTS - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.variance[...], 0.9 + 0.1 * INPUTS.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_padded_examples_do_nothing_even_if_undefined() -> None:
    padded = jnp.concatenate([jnp.asarray(INPUTS), jnp.full((3, 4, 3, 2), jnp.nan)])
    mask = jnp.arange(8) < 5
    plain, masked = BatchNormalisation(2), BatchNormalisation(2)
    expected = plain(jnp.asarray(INPUTS), train=True)
    np.testing.assert_allclose(masked(padded, mask, train=True)[:5], expected, rtol=1e-5, atol=1e-6)
    for name in ("mean", "variance"):
        np.testing.assert_allclose(getattr(masked, name)[...], getattr(plain, name)[...], rtol=1e-6)


def test_padded_examples_get_and_give_no_gradient() -> None:
    layer, mask = BatchNormalisation(2), jnp.arange(5) < 3
    graph, state = nnx.split(layer)
    state = nnx.to_pure_dict(state)

    def loss(inputs):
        outputs = nnx.merge(graph, state)(inputs, mask, train=True)
        return jnp.where(mask[:, None, None, None], jnp.sin(outputs), 0).sum()

    def short_loss(inputs):
        return jnp.sin(nnx.merge(graph, state)(inputs, train=True)).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(INPUTS))
    np.testing.assert_array_equal(gradient[3:], 0)
    np.testing.assert_allclose(
        gradient[:3], jax.jit(jax.grad(short_loss))(jnp.asarray(INPUTS[:3])), rtol=1e-3, atol=1e-5
    )


def test_a_batch_without_valid_examples_changes_nothing() -> None:
    layer = BatchNormalisation(2)
    outputs = layer(jnp.asarray(INPUTS), jnp.zeros(5, bool), train=True)
    assert np.isfinite(outputs).all()
    np.testing.assert_array_equal(layer.mean[...], 0)
    np.testing.assert_array_equal(layer.variance[...], 1)


def test_evaluation_uses_running_statistics_and_keeps_them() -> None:
    layer = BatchNormalisation(2)
    layer.mean[...], layer.variance[...] = jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0])
    outputs = layer(jnp.asarray(INPUTS), train=False)
    np.testing.assert_allclose(outputs, (INPUTS - [1, 2]) / np.sqrt(np.array([4, 9]) + 1e-5), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.mean[...], [1, 2])


@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (64, 32), (48, 24), (31, 31), (37, 1)])
def test_groups_divide_the_channels(channels: int, groups: int) -> None:
    assert GroupNormalisation(channels).groups == groups


def test_group_normalisation_equals_numpy() -> None:
    inputs = np.random.default_rng(1).normal(size=(2, 3, 3, 64)).astype(np.float32)
    grouped = inputs.reshape(2, 3, 3, 32, 2)
    deviation = grouped - grouped.mean((1, 2, 4), keepdims=True)
    expected = (deviation / np.sqrt(grouped.var((1, 2, 4), keepdims=True) + 1e-5)).reshape(inputs.shape)
    np.testing.assert_allclose(GroupNormalisation(64)(jnp.asarray(inputs), train=True), expected, rtol=1e-3, atol=1e-4)


def test_none_is_the_identity() -> None:
    layer = normalisation_layer("none", 2)
    assert isinstance(layer, NoNormalisation)
    np.testing.assert_array_equal(layer(jnp.asarray(INPUTS), train=True), INPUTS)


@pytest.mark.oracle
def test_batch_normalisation_equals_pytorch() -> None:
    torch = pytest.importorskip("torch")
    layer, oracle = BatchNormalisation(2), torch.nn.BatchNorm2d(2)
    outputs = layer(jnp.asarray(INPUTS), train=True)
    expected = oracle(torch.from_numpy(INPUTS).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], oracle.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(layer.variance[...], oracle.running_var.numpy(), rtol=1e-5)
