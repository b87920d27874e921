"""The Llama family against a plain numpy model with loops, and what packing, types and memory options must not change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.llama import CONFIG, changed, one_record, run

from fedjax_qp.models.language.llama import LlamaConfig, RMSNorm, abstract_weights, forward, initial_weights, logits
from fedjax_qp.models.language.lora import init_adapters
from fedjax_qp.models.language.rotary import SCALINGS, frequencies, rotate, rotation
from fedjax_qp.registry import ConfigurationError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def reference(config: LlamaConfig, frozen, tokens) -> np.ndarray:
    """Logits [T, V] of one record, float64, one head and one pair of tokens at a time."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), frozen)
    size, group = config.head_size, config.heads // config.key_value_heads
    frequency = np.asarray(frequencies(size, config.rope_theta, config.rope_scaling), np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def turned(vector, position):
        result = np.empty(size)
        for j in range(size // 2):
            c, s = math.cos(position * frequency[j]), math.sin(position * frequency[j])
            result[j] = vector[j] * c - vector[j + size // 2] * s
            result[j + size // 2] = vector[j + size // 2] * c + vector[j] * s
        return result

    x = weights["embed"][tokens]
    for number in range(config.layers):
        block = jax.tree.map(lambda array, number=number: array[number], weights["blocks"])

        def matrix(name, inputs, block=block):
            return inputs @ block[name]["kernel"] + block[name].get("bias", 0)

        normal = norm(x, block["input_norm"])
        query, key, value = (matrix(name, normal) for name in ("q_proj", "k_proj", "v_proj"))
        heads = np.zeros((len(tokens), config.heads * size))
        for head in range(config.heads):
            own, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
            for t in range(len(tokens)):
                first = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
                seen = range(first, t + 1)
                scores = np.array([turned(query[t, own], t) @ turned(key[s, shared], s) for s in seen]) / size**0.5
                shares = np.exp(scores - scores.max())
                heads[t, own] = (shares / shares.sum()) @ value[list(seen), shared]
        x = x + matrix("o_proj", heads)
        normal = norm(x, block["post_norm"])
        gate = matrix("gate_proj", normal)
        x = x + matrix("down_proj", gate / (1 + np.exp(-gate)) * matrix("up_proj", normal))
    head = weights["embed"].T if config.tied else weights["head"]["kernel"]
    return norm(x, weights["norm"]) @ head


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        changed(tied=False, attention_bias=True, key_value_heads=4),
        changed(sliding_window=3, output_bias=True, key_value_heads=1),
        changed(rope_scaling=LLAMA3),
    ],
    ids=["grouped", "untied-bias", "window", "llama3"],
)
def test_logits_equal_the_loops(config):
    frozen = initial_weights(config, jax.random.key(0))
    tokens, positions, segments = one_record(7)
    hidden = run(config, frozen, (), (), tokens, positions, segments)
    scores = logits(config, frozen, hidden)
    for row, found in zip(tokens, scores, strict=True):
        np.testing.assert_allclose(found, reference(config, frozen, row), rtol=1e-4, atol=1e-4)


def test_norm_is_computed_in_float32():
    inputs = jnp.full((1, 1, 4096), 0.1, jnp.bfloat16)  # the mean of 4096 squares is lost in bfloat16
    found = RMSNorm(jnp.ones(4096, jnp.bfloat16), 0.0)(inputs)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1)


def test_packed_records_do_not_see_each_other_and_padding_is_inert():
    frozen = initial_weights(CONFIG, jax.random.key(1))
    first, *_ = one_record(5, batch=1, seed=1)
    second, *_ = one_record(4, batch=1, seed=2)

    def padded(tokens, positions, segments):
        rows = np.zeros((3, 1, 12), np.int32)
        rows[:, 0, : tokens.shape[1]] = [tokens[0], list(positions), segments]
        return run(CONFIG, frozen, (), (), *rows)[0, : tokens.shape[1]]

    def packed(filler):
        tokens = np.concatenate([first, second, np.full((1, 3), filler, np.int32)], axis=1)
        return padded(tokens, [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0], [1] * 5 + [2] * 4 + [0] * 3)

    together = packed(7)
    np.testing.assert_allclose(together[:5], padded(first, range(5), [1] * 5), atol=1e-5)
    np.testing.assert_allclose(together[5:9], padded(second, range(4), [1] * 4), atol=1e-5)
    np.testing.assert_array_equal(together[:9], packed(11)[:9])
    assert np.isfinite(together).all()


def test_linear_scaling_is_a_slower_count_of_positions():
    positions = jnp.arange(8)[None]
    slow = rotation(frequencies(6, 100.0, {"rope_type": "linear", "factor": 2.0}), 2 * positions)
    plain = rotation(frequencies(6, 100.0, None), positions)
    np.testing.assert_allclose(slow.sine, plain.sine, atol=1e-6)
    np.testing.assert_allclose(slow.cosine, plain.cosine, atol=1e-6)


def test_llama3_keeps_fast_waves_and_stretches_slow_ones():
    plain, scaled = frequencies(64, 10_000.0, None), frequencies(64, 10_000.0, LLAMA3)
    wavelength = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 32 / 4], plain[wavelength < 32 / 4])
    np.testing.assert_allclose(scaled[wavelength > 32], plain[wavelength > 32] / 8, rtol=1e-6)
    between = (wavelength > 32 / 4) & (wavelength < 32)
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()


def test_scores_depend_on_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    frequency = frequencies(6, 100.0, None)

    def score(t, s):
        turned = (rotate(x, rotation(frequency, jnp.array([[at]]))) for x, at in ((query, t), (key, s)))
        return jnp.vdot(*turned)

    np.testing.assert_allclose(score(9, 4), score(5, 0), rtol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_wrong_settings_are_refused_with_the_remedy():
    with pytest.raises(ConfigurationError, match=f"'yarn' is not supported.*{', '.join(SCALINGS)}"):
        changed(rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ConfigurationError, match="needs factor"):
        changed(rope_scaling={"rope_type": "linear"})
    with pytest.raises(ConfigurationError, match="4 heads cannot share 3"):
        changed(key_value_heads=3)
    with pytest.raises(ConfigurationError, match="even"):
        changed(head_size=5)
    dynamic = changed(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, maximum_positions=4)
    with pytest.raises(ConfigurationError, match="at most 4"):
        forward(dynamic, abstract_weights(dynamic), (), (), *one_record(5))


def test_dynamic_scaling_changes_nothing_up_to_the_maximum():
    frozen = initial_weights(CONFIG, jax.random.key(0))
    dynamic = changed(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, maximum_positions=6)
    plain, scaled = (run(config, frozen, (), (), *one_record(6)) for config in (CONFIG, dynamic))
    np.testing.assert_array_equal(plain, scaled)


def test_bfloat16_stays_near():
    frozen = initial_weights(CONFIG, jax.random.key(2))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    adapters = init_adapters(CONFIG, jax.random.key(0), 2, "*_proj")
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    exact, rounded = (run(CONFIG, weights, adapters, (), *one_record(6)) for weights in (frozen, half))
    assert rounded.dtype == jnp.bfloat16
    difference = np.asarray(rounded, np.float32) - exact
    assert np.sqrt((difference**2).mean() / (exact**2).mean()) < 0.03
    assert logits(CONFIG, half, rounded).dtype == jnp.float32


def test_weights_have_the_stated_shapes():
    config = changed(tied=False, attention_bias=True)
    frozen, shapes = initial_weights(config, jax.random.key(0), jnp.bfloat16), abstract_weights(config, jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), frozen) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert set(frozen["blocks"]["k_proj"]) == {"kernel", "bias"} and set(frozen["blocks"]["o_proj"]) == {"kernel"}
    assert hash(changed(rope_scaling=LLAMA3)) == hash(changed(rope_scaling=dict(LLAMA3)))


def test_depth_does_not_grow_the_program():
    def size(layers):
        config = changed(layers=layers)
        program = jax.make_jaxpr(lambda weights: forward(config, weights, (), (), *one_record(4)))
        return len(str(program(abstract_weights(config))).splitlines())

    assert size(12) == size(3)
