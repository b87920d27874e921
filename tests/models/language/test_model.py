"""The language model as pure functions: loss against the plain formula, clients side by side, padding and packing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.llama import CONFIG, FROZEN, changed, some_adapters, some_masks

from fedjax_qp.data.text.sequences import Sequences
from fedjax_qp.federated import Batch, Params
from fedjax_qp.models.language.llama import forward, initial_weights, logits
from fedjax_qp.models.language.model import language_model
from fedjax_qp.models.language.token_loss import token_losses
from fedjax_qp.registry import ConfigurationError

MODEL = language_model(CONFIG, rank=3, alpha=6.0, targets="*_proj")


def packed(records, length: int) -> Sequences:
    """Puts records into one sequence [1, length]; the first token of each and every third one are no targets."""
    rows = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segments", "positions")}
    targets = np.zeros((1, length), bool)
    begin = 0
    for number, record in enumerate(records, start=1):
        place = slice(begin, begin + len(record))
        rows["tokens"][0, place], rows["segments"][0, place] = record, number
        rows["positions"][0, place] = np.arange(len(record))
        targets[0, place] = np.arange(len(record)) % 3 > 0
        begin += len(record)
    return Sequences(**rows, targets=targets)


def some_batch(seed: int = 0, batch: int = 2, length: int = 10) -> Batch:
    draw = np.random.default_rng(seed)
    rows = [packed([draw.integers(0, 64, 5), draw.integers(0, 64, 4)], length) for _ in range(batch)]
    return Batch(Sequences(*(np.concatenate(field) for field in zip(*rows, strict=True))), np.ones(batch, bool))


@partial(jax.jit, static_argnums=0)
def loss_of(model, adapters, batch, key=None, masks=(), frozen=FROZEN):
    """Compiled once for each model and kind of arguments."""
    return model.loss(frozen, Params(adapters, (), masks), batch, key)[0]


step_of = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)
evaluate = jax.jit(MODEL.evaluate)


def assert_near(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def plain_losses(hidden, head, labels, counts, tied):
    scores = hidden @ (head.T if tied else head)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], axis=-1)[..., 0]
    return jnp.where(counts, nll, 0), (scores.argmax(-1) == labels) & counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [4, 100])
def test_chunked_losses_are_the_plain_formula(tied, chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 5, 8))
    head = jax.random.normal(keys[1], (32, 8) if tied else (8, 32))
    labels = jax.random.randint(keys[2], (3, 5), 0, 32)
    counts = jax.random.bernoulli(keys[3], 0.6, (3, 5))
    weights = jnp.arange(15.0).reshape(3, 5) - 4

    def ours(x):
        return (weights * token_losses(x, head, labels, counts, tied=tied, chunk=chunk).loss).sum()

    def plain(x):
        return (weights * plain_losses(x, head, labels, counts, tied)[0]).sum()

    found = jax.jit(partial(token_losses, tied=tied, chunk=chunk))(hidden, head, labels, counts)
    expected, hits = plain_losses(hidden, head, labels, counts, tied)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.correct, hits)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(hidden), jax.jit(jax.grad(plain))(hidden), rtol=1e-4, atol=1e-5)
    # Several clients make one list of tokens; the head may even differ.
    several = jnp.stack([hidden, 2 * hidden, -hidden])
    each, expected_each = (jax.jit(jax.vmap(jax.grad(function)))(several) for function in (ours, plain))
    np.testing.assert_allclose(each, expected_each, atol=1e-4)
    per_head = jax.jit(jax.vmap(lambda h: token_losses(hidden, h, labels, counts, tied=tied, chunk=chunk).loss))(
        jnp.stack([head, 2 * head])
    )
    np.testing.assert_allclose(per_head[1], plain_losses(hidden, 2 * head, labels, counts, tied)[0], rtol=1e-4)


def test_one_matmul_with_the_head_serves_all_clients_and_none_holds_all_logits():
    hidden, head = jnp.ones((3, 40, 8)), jnp.ones((1000, 8))
    labels, counts = jnp.zeros((3, 40), int), jnp.ones((3, 40), bool)

    def losses(x, label, count):
        return token_losses(x, head, label, count, tied=True, chunk=16).loss.sum()

    program = str(jax.make_jaxpr(jax.vmap(jax.grad(losses)))(hidden, labels, counts))
    assert "f32[16,1000]" in program
    assert "f32[3,16,1000]" not in program and "f32[40,1000]" not in program and "f32[120,1000]" not in program


def test_loss_and_evaluation_are_sums_over_targets():
    batch = some_batch()
    adapters = some_adapters()
    examples = batch.examples
    hidden = forward(
        CONFIG, FROZEN, adapters, (), examples.tokens, examples.positions, examples.segments, scale=6.0 / 3
    )
    probabilities = np.asarray(jax.nn.log_softmax(logits(CONFIG, FROZEN, hidden)))
    total, hits, count = 0.0, 0, 0
    for row, column in zip(*np.nonzero(examples.targets), strict=True):
        before = probabilities[row, column - 1]
        total -= float(before[examples.tokens[row, column]])
        hits += int(before.argmax()) == examples.tokens[row, column]
        count += 1
    sums = jax.jit(evaluate)(FROZEN, Params(adapters, (), ()), batch)
    assert {name: x.shape for name, x in sums.items()} == {"loss": (), "correct": (1,), "count": (1,)}
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)
    assert (sums["correct"][0], sums["count"][0]) == (hits, count) and count == 2 * (3 + 2)
    value, statistics = jax.jit(MODEL.loss)(FROZEN, Params(adapters, (), ()), batch, jax.random.key(0))
    np.testing.assert_allclose(value, total / count, rtol=1e-5)
    assert statistics == ()


def test_records_packed_or_apart_have_the_same_loss_and_padding_is_inert():
    draw = np.random.default_rng(3)
    first, second = draw.integers(0, 64, 5), draw.integers(0, 64, 4)
    params = Params(some_adapters(), (), ())

    def sums(sequences, mask):
        return evaluate(FROZEN, params, Batch(sequences, np.array(mask)))

    together = sums(packed([first, second], 12), [True])
    apart = Sequences(*map(np.concatenate, zip(packed([first], 6), packed([second], 6), strict=True)))
    assert_near(together, sums(apart, [True, True]))
    # A padded example, whatever it holds.
    assert_near(sums(apart, [True, False]), sums(packed([first], 6), [True]))


def test_nothing_to_predict_is_a_loss_of_zero():
    batch = some_batch()
    for empty in (
        batch._replace(mask=np.zeros(2, bool)),
        batch._replace(examples=batch.examples._replace(targets=np.zeros((2, 10), bool))),
    ):
        value, gradient = step_of(MODEL, some_adapters(), empty)
        assert value == 0
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_gradient_is_that_of_the_plain_formula():
    batch, adapters = some_batch(), some_adapters()
    masks = some_masks(adapters)
    examples = batch.examples

    def plain(some):
        arrays = examples.tokens, examples.positions, examples.segments
        hidden = forward(CONFIG, FROZEN, some, masks, *arrays, scale=2.0)
        counts = examples.targets[:, 1:]
        return (
            plain_losses(hidden[:, :-1], FROZEN["embed"], examples.tokens[:, 1:], counts, True)[0].sum() / counts.sum()
        )

    assert_near(step_of(MODEL, adapters, batch, None, masks), jax.jit(jax.value_and_grad(plain))(adapters))


def test_gradient_is_that_of_finite_differences():
    batch, adapters = some_batch(), some_adapters()
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), adapters)

    def moved(step):
        return step_of(MODEL, jax.tree.map(lambda x, d: x + step * d, adapters, direction), batch)[0]

    _, gradient = step_of(MODEL, adapters, batch)
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose((moved(3e-3) - moved(-3e-3)) / 6e-3, slope, rtol=1e-2)


def test_rematerialising_changes_memory_only():
    other = language_model(CONFIG, rank=3, alpha=6.0, targets="*_proj", rematerialise=True)
    first, second = (step_of(one, some_adapters(), some_batch()) for one in (MODEL, other))
    assert_near(first, second, 1e-6)


def test_dropout_only_with_a_key():
    model = language_model(CONFIG, rank=3, alpha=6.0, targets="*_proj", dropout=0.5)
    adapters, batch = some_adapters(), some_batch()
    plain = loss_of(MODEL, adapters, batch)
    assert loss_of(model, adapters, batch) == plain == loss_of(MODEL, adapters, batch, jax.random.key(0))
    drawn = [loss_of(model, adapters, batch, jax.random.key(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and len({float(plain), float(drawn[0]), float(drawn[2])}) == 3


def test_clients_side_by_side_are_clients_one_by_one():
    targets = "(v|down)_proj"
    start = some_adapters(targets=targets)
    clients = [
        (jax.tree.map(lambda x, n=n: (1 + 0.2 * n) * x, start), some_batch(n), jax.random.key(n)) for n in range(3)
    ]
    masks = [jax.tree.map(lambda x, n=n: jnp.roll(x, n), some_masks(start)) for n in range(3)]
    model = language_model(CONFIG, rank=3, alpha=6.0, targets=targets, dropout=0.3)

    def one(frozen, adapters, batch, key, mask):
        return step_of(model, adapters, batch, key, mask, frozen)

    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *field) for field in (*zip(*clients, strict=True), masks)]
    together = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))(FROZEN, *stacked)
    for number, (client, mask) in enumerate(zip(clients, masks, strict=True)):
        expected = one(FROZEN, *client, mask)
        assert_near(jax.tree.map(lambda x, n=number: x[n], together), expected)


def test_the_base_is_shared_by_all_clients_and_has_no_gradient():
    config = changed(width=20, hidden=28, layers=3)
    frozen = initial_weights(config, jax.random.key(0))
    model = language_model(config, rank=2, targets="v_proj")
    adapters = jax.tree.map(lambda x: jnp.stack([x] * 5), model.init(jax.random.key(0)).trainable)
    batches = jax.tree.map(lambda x: jnp.stack([x] * 5), some_batch())

    def one(weights, some, batch):
        return step_of(model, some, batch, None, (), weights)[1]

    program = jax.jit(jax.vmap(one, in_axes=(None, 0, 0))).lower(frozen, adapters, batches).as_text()
    assert "dot_general" in program and "tensor<20x28xf32>" in program
    # Neither a base matrix per client (its 5 copies), nor the product of activations that would be its gradient.
    for matrix in ("20x28", "28x20", "20x24", "24x20"):
        assert f"tensor<5x{matrix}xf32>" not in program and f"tensor<5x3x{matrix}xf32>" not in program
        products = [line for line in program.splitlines() if "dot_general" in line]
        assert not any(line.split("->")[-1].strip().startswith(f"tensor<{matrix}xf32>") for line in products)


def test_merged_base_has_the_same_loss():
    adapters, batch = some_adapters(), some_batch()
    merged = MODEL.merge(FROZEN, adapters)
    assert_near(evaluate(merged, Params((), ()), batch), evaluate(FROZEN, Params(adapters, ()), batch), 1e-4)


def test_bfloat16_base_trains_float32_adapters():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FROZEN)
    adapters, batch = some_adapters(), some_batch()
    found, expected = (step_of(MODEL, adapters, batch, None, (), w) for w in (half, FROZEN))
    np.testing.assert_allclose(found[0], expected[0], rtol=0.03)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert one.dtype == jnp.float32
        assert jnp.linalg.norm(one - other) < 0.1 * jnp.linalg.norm(other)


def test_wrong_settings_are_refused():
    for options, message in (
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"rank": 0}, "rank = 0"),
        ({"targets": ["query"]}, "Valid: q_proj"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            language_model(CONFIG, **options)
