"""The character LSTM against numpy by hand, JAX's own gradient, and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_qp.data import Examples
from fedjax_qp.federated import Batch, Model
from fedjax_qp.models import classifier, models
from fedjax_qp.models.recurrent import recurrence
from fedjax_qp.registry import ConfigurationError

CLASSES, LENGTH, BATCH = 7, 6, 4
SMALL = {"embedding": 3, "hidden": 5}


def model(**options) -> Model:
    build = models.build("char_lstm", (LENGTH,), CLASSES, **SMALL, **options)
    return classifier(build, mean=None, std=None, classes=CLASSES)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, CLASSES, (BATCH, LENGTH)).astype(np.uint8)
    return Batch(Examples(inputs, rng.integers(0, CLASSES, BATCH).astype(np.int32)), np.array([1, 1, 1, 0], bool))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logits_by_hand(weights, text):
    """One text, one character and one unit at a time as the equations stand, in double precision."""
    states = [weights["embedding"][character] for character in text]
    for name in ("lstm1", "lstm2"):
        layer = weights[name]
        hidden = cell = np.zeros(SMALL["hidden"])
        following = []
        for value in states:
            gates = value @ layer["input_kernel"] + layer["input_bias"]
            gates = gates + hidden @ layer["hidden_kernel"] + layer["hidden_bias"]
            i, f, g, o = gates.reshape(4, -1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            following.append(hidden)
        states = following
    return np.array([state @ weights["dense"]["kernel"] + weights["dense"]["bias"] for state in states])


def cross_entropy(logits, label):
    return np.log(np.exp(logits).sum()) - logits[label]


@pytest.mark.parametrize("predict", ["last", "every"])
def test_loss_and_metrics_by_hand(predict):
    small, data = model(predict=predict), batch()
    params = jax.jit(small.init)(jax.random.key(1))
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.trainable)
    logits = [logits_by_hand(weights, text) for text in data.examples.inputs]
    last = [cross_entropy(row[-1], label) for row, label in zip(logits, data.examples.labels, strict=True)]
    following = np.column_stack([data.examples.inputs[:, 1:], data.examples.labels])
    every = [
        np.mean([cross_entropy(*pair) for pair in zip(*text, strict=True)])
        for text in zip(logits, following, strict=True)
    ]
    loss, _ = jax.jit(small.loss)((), params, data, jax.random.key(0))
    np.testing.assert_allclose(loss, np.mean((last if predict == "last" else every)[:3]), rtol=1e-5)
    metrics = jax.jit(small.evaluate)((), params, data)
    np.testing.assert_allclose(metrics["loss"], np.sum(last[:3]), rtol=1e-5)
    right = [int(row[-1].argmax() == label) for row, label in zip(logits, data.examples.labels, strict=True)]
    assert metrics["correct"].sum() == sum(right[:3]) and metrics["count"].sum() == 3


def recurrence_by_scan(projected, kernel):
    """The same recurrence, with the gradient that JAX derives."""

    def step(state, share):
        gates = share + state[0] @ kernel
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    start = jnp.zeros((projected.shape[1], kernel.shape[0]))
    return jax.lax.scan(step, (start, start), projected)[1]


def test_the_gradient_of_the_recurrence_and_its_derivative():
    keys = jax.random.split(jax.random.key(0), 5)
    point = (jax.random.normal(keys[0], (6, 3, 20)), jax.random.normal(keys[1], (5, 20)))
    direction = (jax.random.normal(keys[2], (6, 3, 20)), jax.random.normal(keys[3], (5, 20)))
    weights = jax.random.normal(keys[4], (6, 3, 5))

    @jax.jit
    def results(point, direction):
        def of(function):
            gradient = jax.grad(lambda point: (weights * function(*point) ** 2).sum())
            return jax.jvp(gradient, (point,), (direction,))  # gradient, and Hessian-vector product

        return of(recurrence), of(recurrence_by_scan)

    own, derived = results(point, direction)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(derived), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_clients_side_by_side_train_as_alone():
    small, data = model(), batch()
    clients = jax.vmap(small.init)(jax.random.split(jax.random.key(2), 3))

    def gradient(params):
        return jax.grad(lambda trainable: small.loss((), params._replace(trainable=trainable), data, None)[0])(
            params.trainable
        )

    together = jax.jit(jax.vmap(gradient))(clients)
    alone = jax.jit(gradient)(jax.tree.map(lambda leaf: leaf[1], clients))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-4, atol=1e-6)


def test_size_names_and_initial_weights_of_the_published_network():
    small = classifier(models.build("char_lstm", (80,), 80), mean=None, std=None, classes=80)
    params = jax.jit(small.init)(jax.random.key(0)).trainable
    # Embedding, and for each layer two kernels and two biases of four gates, then the dense layer, with LEAF's 80 characters.
    first, second = (4 * 256 * (inputs + 256 + 2) for inputs in (8, 256))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 80 * 8 + first + second + 256 * 80 + 80 == 819_920
    assert set(params) == {"embedding", "lstm1", "lstm2", "dense"}
    assert set(params["lstm1"]) == {"input_kernel", "hidden_kernel", "input_bias", "hidden_bias"}
    for name in ("lstm1", "lstm2"):
        for leaf in jax.tree.leaves(params[name]):
            assert 0.98 / 16 < np.abs(leaf).max() <= 1 / 16
            np.testing.assert_allclose(leaf.std(), 1 / 16 / np.sqrt(3), rtol=0.1)
    np.testing.assert_allclose(params["embedding"].std(), 1, rtol=0.1)


@pytest.mark.parametrize("name", ["embedding", "hidden", "layers"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"{name} = 0 must be"):
        models.build("char_lstm", (80,), 81, **{name: 0})


@pytest.mark.oracle
def test_training_equals_pytorch():
    torch = pytest.importorskip("torch")
    small, data = model(), batch()
    params = jax.jit(small.init)(jax.random.key(1))
    own = {name: torch.tensor(np.asarray(leaf)) for name, leaf in _named(params.trainable)}
    embedding = torch.nn.Embedding(CLASSES, 3)
    lstm = torch.nn.LSTM(3, 5, 2)
    dense = torch.nn.Linear(5, CLASSES)
    pairs = {"embedding": embedding.weight, "dense/kernel": dense.weight, "dense/bias": dense.bias}
    for number in range(2):
        for ours, theirs in (("input_kernel", "weight_ih"), ("hidden_kernel", "weight_hh")):
            pairs[f"lstm{number + 1}/{ours}"] = getattr(lstm, f"{theirs}_l{number}")
        for ours, theirs in (("input_bias", "bias_ih"), ("hidden_bias", "bias_hh")):
            pairs[f"lstm{number + 1}/{ours}"] = getattr(lstm, f"{theirs}_l{number}")
    assert set(pairs) == set(own)
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(own[name].T if name.endswith("kernel") else own[name])
    optimizer = torch.optim.SGD(pairs.values(), lr=0.5)
    texts, labels = torch.tensor(data.examples.inputs[:3].astype(int)), torch.tensor(data.examples.labels[:3]).long()

    @jax.jit
    def step(params):
        gradient = jax.grad(lambda t: small.loss((), params._replace(trainable=t), data, None)[0])(params.trainable)
        return params._replace(trainable=jax.tree.map(lambda a, g: a - 0.5 * g, params.trainable, gradient))

    for _ in range(3):
        optimizer.zero_grad()
        outputs, _ = lstm(embedding(texts.T))
        torch.nn.functional.cross_entropy(dense(outputs[-1]), labels).backward()
        optimizer.step()
        params = step(params)
    for name, leaf in _named(params.trainable):
        expected = pairs[name].detach().numpy()
        np.testing.assert_allclose(leaf, expected.T if name.endswith("kernel") else expected, rtol=1e-4, atol=1e-6)


def _named(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]
