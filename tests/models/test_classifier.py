"""The classifier as pure functions: losses and sums against numpy, masks, transformations, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_qp.data.examples import Examples
from fedjax_qp.federated import Batch, Params
from fedjax_qp.models import classifier, models
from fedjax_qp.models.classifier import normalise
from fedjax_qp.models.convolution import convolution
from fedjax_qp.models.layers import Convolution, Dense
from fedjax_qp.models.normalisation import BatchNormalisation

CLASSES = 4


class Small(nnx.Module):
    """A convolution, batch normalisation and a dense layer on 6×6 images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = Convolution(1, 3, 3, rngs=rngs)
        self.norm = BatchNormalisation(3)
        self.dense = Dense(48, CLASSES, rngs=rngs)

    def __call__(self, inputs, mask=None, *, train):
        outputs = jax.nn.relu(self.norm(self.conv(inputs), mask, train=train))
        return self.dense(outputs.reshape(len(outputs), -1))


@pytest.fixture(scope="module")
def model():
    return classifier(Small, mean=0.4, std=0.3, classes=CLASSES)


def batch_of(size: int, valid: int) -> Batch:
    random = np.random.default_rng(0)
    examples = Examples(
        jnp.asarray(random.integers(0, 256, (size, 6, 6, 1)), jnp.uint8),
        jnp.asarray(random.integers(0, CLASSES, size), jnp.int32),
    )
    return Batch(examples, jnp.arange(size) < valid)


def test_parameters_are_plain_dicts(model) -> None:
    params = model.init(jax.random.key(0))
    assert {name: sorted(parts) for name, parts in params.trainable.items()} == {
        "conv": ["bias", "kernel"], "dense": ["bias", "kernel"], "norm": ["bias", "scale"]
    }  # fmt: skip
    assert list(params.statistics) == ["norm"] and sorted(params.statistics["norm"]) == ["mean", "variance"]
    stateless = classifier(models.build("mlp", (6, 6, 1), CLASSES, hidden=()), classes=CLASSES)
    assert jax.tree.leaves(stateless.init(jax.random.key(0)).statistics) == []


def test_evaluation_sums_equal_numpy(model) -> None:
    params, batch = model.init(jax.random.key(0)), batch_of(9, 7)
    sums = jax.jit(model.evaluate)((), params, batch)
    weights = jax.tree.map(np.asarray, params.trainable)
    pixels = (np.asarray(batch.examples.inputs, np.float32) / 255 - 0.4) / 0.3
    hidden = convolution(jnp.asarray(pixels), weights["conv"]["kernel"], form="lax") + weights["conv"]["bias"]
    hidden = np.maximum(np.asarray(hidden) / np.sqrt(1 + 1e-5), 0).reshape(9, -1)
    logits = hidden @ weights["dense"]["kernel"] + weights["dense"]["bias"]
    labels = np.asarray(batch.examples.labels)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(9), labels]
    hits = logits.argmax(-1) == labels
    np.testing.assert_allclose(sums["loss"], losses[:7].sum(), rtol=1e-4)
    np.testing.assert_array_equal(sums["count"], np.bincount(labels[:7], minlength=CLASSES))
    np.testing.assert_array_equal(sums["correct"], np.bincount(labels[:7][hits[:7]], minlength=CLASSES))


def test_padding_is_inert(model) -> None:
    params = model.init(jax.random.key(0))
    padded = batch_of(9, 6)
    short = Batch(jax.tree.map(lambda leaf: leaf[:6], padded.examples), padded.mask[:6])

    def loss(trainable, batch):
        return model.loss((), Params(trainable, params.statistics), batch, jax.random.key(1))

    value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = [value_and_gradient(params.trainable, batch) for batch in (short, padded)]
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    for expected, got in zip(
        *(jax.tree.leaves(jax.jit(model.evaluate)((), params, batch)) for batch in (short, padded)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_batch_without_valid_examples_teaches_nothing(model) -> None:
    params = model.init(jax.random.key(0))

    def loss(trainable):
        return model.loss((), Params(trainable, params.statistics), batch_of(3, 0), jax.random.key(1))

    (value, statistics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params.trainable)
    assert value == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))
    jax.tree.map(np.testing.assert_array_equal, statistics, params.statistics)


def test_normalisation_of_inputs() -> None:
    pixels = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(normalise(pixels, 0.5, 0.5).ravel(), [-1, -0.6, 1], rtol=1e-5)
    np.testing.assert_allclose(normalise(pixels, (0.0, 0.2, 1.0), (1.0, 2.0, 0.5)).ravel(), [0, 0, 0], atol=1e-6)
    floats = jnp.ones((1, 1, 1, 3))
    assert normalise(floats, 0.5, 0.5) is floats


def test_vmap_over_clients_equals_a_loop(model) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    batch = batch_of(5, 4)
    params = jax.vmap(model.init)(keys)
    loss = jax.jit(model.loss)
    together = jax.jit(jax.vmap(lambda params: model.loss((), params, batch, keys[0])))(params)
    alone = [
        loss((), jax.tree.map(lambda leaf, client=client: leaf[client], params), batch, keys[0]) for client in range(3)
    ]
    for got, expected in zip(jax.tree.leaves(together), zip(*map(jax.tree.leaves, alone), strict=True), strict=True):
        np.testing.assert_allclose(got, jnp.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalisation", ["none", pytest.param("batch", marks=pytest.mark.slow)])
def test_training_learns_real_digits(normalisation: str) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    images = np.repeat(np.repeat(bunch.images[:64, :, :, None] * 15, 2, axis=1), 2, axis=2)
    batch = Batch(
        Examples(jnp.asarray(images, jnp.uint8), jnp.asarray(bunch.target[:64], jnp.int32)), jnp.ones(64, bool)
    )
    model = classifier(models.build("lenet", (16, 16, 1), 10, normalisation=normalisation), classes=10)

    @jax.jit
    def train(params: Params) -> tuple[Params, jax.Array]:
        def step(params, _):
            def loss(trainable):
                return model.loss((), Params(trainable, params.statistics), batch, jax.random.key(0))

            (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params.trainable)
            trainable = jax.tree.map(lambda leaf, slope: leaf - 0.2 * slope, params.trainable, gradient)
            return Params(trainable, statistics), value

        return jax.lax.scan(step, params, length=120)

    params, losses = train(model.init(jax.random.key(0)))
    assert losses[-1] < 0.5 * losses[0]
    if normalisation == "batch":
        assert not np.allclose(params.statistics["norm1"]["mean"], 0)
        assert model.evaluate((), params, batch)["correct"].sum() > 32
