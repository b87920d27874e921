"""Adapters: shapes, targets, masks, merging, and the counts that PerFIT reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.llama import CONFIG, FROZEN, one_record, run, some_adapters, some_masks

from fedjax_qp.models.language import lora
from fedjax_qp.registry import ConfigurationError


def test_new_adapters_are_pefts_and_change_nothing():
    adapters = lora.init_adapters(CONFIG, jax.random.key(0), 3, ["q_proj", "down_proj"])
    shapes = {name: {side: x.shape for side, x in adapter.items()} for name, adapter in adapters.items()}
    assert shapes == lora.adapter_shapes(CONFIG, 3, ["q_proj", "down_proj"])
    assert shapes == {"q_proj": {"a": (2, 16, 3), "b": (2, 3, 24)}, "down_proj": {"a": (2, 24, 3), "b": (2, 3, 16)}}
    for adapter, inputs in ((adapters["q_proj"], 16), (adapters["down_proj"], 24)):
        assert 0.8 * inputs**-0.5 < np.abs(adapter["a"]).max() <= inputs**-0.5
        assert not adapter["b"].any()
    assert lora.count(adapters) == 2 * 3 * (16 + 24 + 24 + 16)
    base, adapted = (run(CONFIG, FROZEN, some, (), *one_record(5)) for some in ((), adapters))
    np.testing.assert_array_equal(base, adapted)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["v_proj", "q_proj"], ("q_proj", "v_proj")),
        ("[qv]_proj", ("q_proj", "v_proj")),
        ("(gate|up)_proj", ("gate_proj", "up_proj")),
        (["q*", "o_proj"], ("q_proj", "o_proj")),
        ("*", tuple(CONFIG.projections())),
    ],
)
def test_targets_are_names_globs_or_regular_expressions(targets, expected):
    assert lora.select_targets(CONFIG, targets) == expected


def test_targets_that_match_nothing_are_refused_with_the_names():
    for targets in (["q_proj", "query"], "proj", []):
        with pytest.raises(ConfigurationError, match="Valid: q_proj, k_proj"):
            lora.select_targets(CONFIG, targets)
    with pytest.raises(ConfigurationError, match="rank = 0"):
        lora.adapter_shapes(CONFIG, 0, "*")


def test_merging_computes_what_the_adapters_did():
    adapters = some_adapters()
    masks = some_masks(adapters)
    record = one_record(6)
    for mask in ((), masks):
        merged = lora.merge(FROZEN, adapters, 0.7, mask)
        expected = run(CONFIG, FROZEN, adapters, mask, *record, scale=0.7)
        np.testing.assert_allclose(run(CONFIG, merged, (), (), *record), expected, atol=2e-5)
    assert merged["embed"] is FROZEN["embed"]
    half = lora.merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), FROZEN), adapters, 0.7)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    base = run(CONFIG, FROZEN, (), (), *record)
    assert np.abs(base - expected).max() > 1e-2  # or nothing was tested


def test_masks_of_ones_change_nothing_and_others_set_entries_to_zero():
    adapters = some_adapters()
    record = one_record(6)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, bool), adapters)
    plain, full = (run(CONFIG, FROZEN, adapters, masks, *record) for masks in ((), ones))
    np.testing.assert_array_equal(plain, full)
    masks = some_masks(adapters)
    masked = run(CONFIG, FROZEN, adapters, masks, *record)
    by_hand = run(CONFIG, FROZEN, jax.tree.map(jnp.multiply, adapters, masks), (), *record)
    np.testing.assert_allclose(masked, by_hand, atol=1e-6)
    assert np.abs(masked - plain).max() > 1e-3


def test_masked_entries_have_no_gradient_not_even_where_values_are_not_finite():
    adapters = some_adapters()
    masks = some_masks(adapters)
    adapters = jax.tree.map(lambda x, mask: jnp.where(mask, x, jnp.nan), adapters, masks)
    gradient = jax.jit(jax.grad(lambda some: (run(CONFIG, FROZEN, some, masks, *one_record(5)) ** 3).sum()))(adapters)
    for values, mask in zip(jax.tree.leaves(gradient), jax.tree.leaves(masks), strict=True):
        assert (np.asarray(values)[~np.asarray(mask)] == 0).all()
        assert np.isfinite(values).all() and (np.asarray(values)[np.asarray(mask)] != 0).any()


def test_module_keeps_masks_apart_from_what_is_trained():
    adapter = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}
    masks = {"a": jnp.ones((4, 2), bool), "b": jnp.array([[True, False, True], [False, False, True]])}
    module = lora.MaskedLoRA(adapter, masks, scale=0.5)
    _, trained, kept = nnx.split(module, nnx.LoRAParam, lora.Mask)
    assert set(nnx.to_pure_dict(trained)) == {"a", "b"} and set(nnx.to_pure_dict(kept)) == {"mask_a", "mask_b"}
    np.testing.assert_array_equal(module(jnp.ones((1, 4))), [[2.0, 0.0, 4.0]])
    _, trained, kept = nnx.split(lora.MaskedLoRA(adapter, None, scale=0.5), nnx.LoRAParam, ...)
    assert not nnx.to_pure_dict(kept)


def test_dropout_keeps_the_mean_and_needs_a_key():
    adapter = {"a": jnp.ones((1000, 1)), "b": jnp.ones((1, 1))}
    module = lora.MaskedLoRA(adapter, None, scale=1.0, dropout=0.25)
    assert module(jnp.ones((1, 1000))).item() == 1000
    drawn = module(jnp.ones((200, 1000)), jax.random.key(0))
    # Each row is 4/3 · Binomial(1000, 3/4): mean 1000, standard deviation 4/3 · √187.5 ≈ 18.3, so 1.3 for the mean of 200.
    assert abs(drawn.mean() - 1000) < 6 and 14 < drawn.std() < 23


def test_emptiness_death_and_products_are_counted():
    masks = {
        "q_proj": {
            "a": np.array([[[1, 1], [0, 1]], [[0, 0], [0, 0]]], bool),  # [layers 2, inputs 2, rank 2]
            "b": np.array([[[1, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], bool),  # [2, 2, 3]
        },
        "v_proj": {"a": np.zeros((2, 2, 1), bool), "b": np.array([[[1]], [[0]]], bool)},
    }
    empty = lora.empty_modules(jax.tree.map(jnp.asarray, masks))
    assert {name: rows.tolist() for name, rows in empty.items()} == {"q_proj": [False, True], "v_proj": [False, True]}
    dead = lora.dead_entries(jax.tree.map(jnp.asarray, masks))
    assert (int(dead.a), int(dead.b)) == (2, 1)  # layer 0: a's second rank; v's only entry of b
    assert int(lora.count(masks)) == 3 + 2 + 1
    assert float(lora.product_share(jax.tree.map(jnp.asarray, masks))) == pytest.approx(2 / (24 + 4))
