"""Loss, gradient and Hessian over batches are those over all examples at once; directions are what they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from quadratic_bowl import MATRIX, bowl

from fedjax_qp.contract.federations import digits, small_model
from fedjax_qp.data.examples import Examples
from fedjax_qp.engine import cut_test_set
from fedjax_qp.federated import Batch, Params
from fedjax_qp.instruments.directions import filter_normalised, on_sphere, sign_mutations
from fedjax_qp.instruments.objective import Objective, gradient, hessian_product, loss, losses_at, norm
from fedjax_qp.models.convolution import convolution_relu_pool
from fedjax_qp.models.recurrent import recurrence


def of_digits(count: int, batch_size: int) -> Objective:
    examples = jax.tree.map(lambda leaf: leaf[:count], digits().train)
    return Objective((), {}, cut_test_set(examples, batch_size))


@pytest.fixture(scope="module")
def trainable():
    return small_model().init(jax.random.key(1)).trainable


def test_batches_of_any_size_give_the_same(trainable):
    model, vector = small_model(), on_sphere(jax.random.key(2), trainable)

    @jax.jit
    def everything(objective):
        product = hessian_product(model, objective, trainable, vector)
        return loss(model, objective, trainable), gradient(model, objective, trainable), product

    found = [everything(of_digits(50, size)) for size in (50, 16)]  # the last batch of 16 is padded
    for first, second in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_gradient_and_hessian_are_jax_own(trainable):
    model, objective = small_model(), of_digits(40, 16)
    everything = Batch(jax.tree.map(lambda leaf: leaf[:40], digits().train), np.ones(40, bool))
    vector, back = ravel_pytree(trainable)

    way = jax.random.normal(jax.random.key(3), vector.shape)

    def whole(flat):
        return model.loss((), Params(back(flat), {}), everything, jax.random.key(0))[0]

    @jax.jit
    def expected(flat):
        """Reverse over reverse, of the loss that training uses."""
        value, slope = jax.value_and_grad(whole)(flat)
        return value, slope, jax.grad(lambda flat: jax.grad(whole)(flat) @ way)(flat)

    @jax.jit
    def found(flat):
        product = hessian_product(model, objective, back(flat), back(way))
        slope = gradient(model, objective, back(flat))
        return loss(model, objective, back(flat)), ravel_pytree(slope)[0], ravel_pytree(product)[0]

    for one, other in zip(found(vector), expected(vector), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def pooled(inputs, params, form):
    return convolution_relu_pool(inputs, params["kernel"], jnp.full(2, 0.1), form=form)


def recurrent(inputs, params):
    """An LSTM of two units that reads the image row by row."""
    return recurrence(inputs[..., 0].swapaxes(0, 1) @ params["inputs"], params["hidden"]).swapaxes(0, 1)


@pytest.mark.parametrize(
    ("features", "shapes"),
    [
        (partial(pooled, form="toeplitz"), {"kernel": (5, 5, 1, 2)}),
        (partial(pooled, form="winograd"), {"kernel": (5, 5, 1, 2)}),
        (recurrent, {"inputs": (12, 8), "hidden": (2, 8)}),
    ],
)
def test_the_hessian_goes_through_gradients_written_by_hand(features, shapes):
    """Of pooling, convolution and the LSTM; a finite difference of the gradient in float64 says what is right."""

    def evaluate(frozen, params, batch):
        values = features(batch.examples.inputs, params.trainable).reshape(len(batch.mask), -1)
        return {"loss": (batch.mask * jnp.sin(values).sum(1)).sum(), "count": batch.mask.sum()[None]}

    with jax.enable_x64(True):
        model, random = small_model()._replace(evaluate=evaluate), np.random.default_rng(0)
        examples = Examples(random.normal(size=(6, 12, 12, 1)), np.zeros(6, np.int32))
        weights, way = ({name: jnp.array(random.normal(size=shape)) for name, shape in shapes.items()} for _ in "ab")
        objective, step = Objective((), {}, cut_test_set(examples, 4)), 1e-6
        slope = jax.jit(lambda move: gradient(model, objective, jax.tree.map(lambda a, b: a + move * b, weights, way)))
        expected = jax.tree.map(lambda ahead, back: (ahead - back) / (2 * step), slope(step), slope(-step))
        found = jax.jit(lambda way: hessian_product(model, objective, weights, way))(way)
        for name in shapes:
            largest = float(jnp.abs(expected[name]).max())
            assert largest > 1e-3
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6 * largest)


def test_losses_at_points_are_the_quadratic():
    model, objective, trainable = bowl()
    directions = {"weights": jnp.eye(4)[:2], "bias": jnp.zeros((2, 2))}
    coefficients = np.array([[0.0, 0.0], [1.0, -2.0], [0.5, 0.25]], np.float32)
    found = losses_at(model, objective, trainable, (directions, coefficients), 2)
    start = np.asarray(ravel_pytree(trainable)[0])
    for row, value in zip(coefficients, found, strict=True):
        moved = start + np.array([0, 0, *row, 0, 0])
        np.testing.assert_allclose(value, 0.5 * moved @ MATRIX @ moved, rtol=1e-5)


def test_filters_are_as_long_as_the_model_s():
    random = np.random.default_rng(0)
    weights = {
        "convolution": random.normal(size=(3, 3, 2, 5)),
        "dense": random.normal(size=(7, 4)),
        "bias": random.normal(size=4),
    }
    weights = jax.tree.map(jnp.float32, weights)
    found = jax.jit(filter_normalised)(jax.random.key(0), weights)
    for channel in range(5):
        filters = (np.asarray(tree["convolution"])[..., channel] for tree in (found, weights))
        np.testing.assert_allclose(*(np.linalg.norm(one) for one in filters), rtol=1e-5)
    for neuron in range(4):
        columns = (np.asarray(tree["dense"])[:, neuron] for tree in (found, weights))
        np.testing.assert_allclose(*(np.linalg.norm(one) for one in columns), rtol=1e-5)
    np.testing.assert_array_equal(found["bias"], 0)
    cosine = np.vdot(found["dense"], weights["dense"]) / np.vdot(weights["dense"], weights["dense"])
    assert abs(cosine) < 0.9  # a direction, not the weights again


def test_directions_have_their_lengths():
    like = {"a": jnp.zeros((3, 4)), "b": jnp.ones(5)}
    np.testing.assert_allclose(norm(on_sphere(jax.random.key(0), like)), 1, rtol=1e-6)
    update = {"a": jnp.full((3, 4), 2.0), "b": jnp.arange(5.0)}
    rows = jax.jit(sign_mutations, static_argnums=2)(jax.random.key(0), update, 6)
    for index in range(6):
        row = jax.tree.map(lambda leaf, i=index: leaf[i], rows)
        np.testing.assert_allclose(norm(row), norm(update), rtol=1e-6)
        for name in update:
            np.testing.assert_allclose(jnp.abs(row[name]), update[name])
    np.testing.assert_allclose(rows["b"].sum(0), 0, atol=1e-6)
