"""Weights and configurations in Hugging Face's layout: there and back, its variants, and what is refused."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from fedjax_qp.models.language.llama import LlamaConfig, abstract_weights, initial_weights
from fedjax_qp.models.language.pretrained import load_weights, read_config, save_weights
from fedjax_qp.registry import ConfigurationError

save_file = pytest.importorskip("safetensors.numpy").save_file
load_file = pytest.importorskip("safetensors.numpy").load_file

SMALL = LlamaConfig(
    vocabulary=31,
    width=12,
    layers=3,
    heads=4,
    key_value_heads=2,
    head_size=6,  # not width / heads: 4 · 6 = 24 outputs of q
    hidden=20,
    rope_theta=5000.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
    maximum_positions=64,
)
CONFIGS = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tied=False),
    "qwen2": dataclasses.replace(SMALL, attention_bias=True),
    "qwen2 with a window": dataclasses.replace(SMALL, attention_bias=True, sliding_window=8),
    "llama with biases": dataclasses.replace(SMALL, attention_bias=True, output_bias=True),
    "mistral": dataclasses.replace(SMALL, sliding_window=8, tied=False),
    "scaled": dataclasses.replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}),
}
RAW = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}


def weights(config: LlamaConfig, dtype: type = np.float32) -> dict:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), initial_weights(config, jax.random.key(0)))


def assert_equal(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def config_of(folder, **changes) -> LlamaConfig:
    content = {**RAW, **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return read_config(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_comes_back(tmp_path, name):
    config = CONFIGS[name]
    save_weights(tmp_path, config, weights(config))
    assert read_config(tmp_path) == config
    assert_equal(load_weights(tmp_path, config), weights(config))


def test_kernels_are_transposed_and_stacked(tmp_path):
    frozen = weights(SMALL)
    save_weights(tmp_path, SMALL, frozen)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.2.self_attn.q_proj.weight"].shape == (24, 12)
    np.testing.assert_array_equal(
        stored["model.layers.2.mlp.down_proj.weight"], frozen["blocks"]["down_proj"]["kernel"][2].T
    )
    np.testing.assert_array_equal(
        stored["model.layers.1.post_attention_layernorm.weight"], frozen["blocks"]["post_norm"][1]
    )
    assert len(stored) == 2 + SMALL.layers * 9


def test_shards_hold_the_same_model(tmp_path):
    save_weights(tmp_path, SMALL, weights(SMALL))
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(sorted(stored))}
    for shard in set(shards.values()):
        save_file({name: stored[name] for name in stored if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_equal(load_weights(tmp_path, SMALL), weights(SMALL))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="model-1.safetensors cannot be read"):
        load_weights(tmp_path, SMALL)


def test_types_of_the_file_and_of_the_arrays_are_independent(tmp_path):
    half = weights(SMALL, ml_dtypes.bfloat16)
    save_weights(tmp_path, SMALL, half)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert_equal(load_weights(tmp_path, SMALL, "bfloat16"), half)
    assert_equal(load_weights(tmp_path, SMALL, "float32"), jax.tree.map(lambda leaf: leaf.astype(np.float32), half))
    save_weights(tmp_path, SMALL, weights(SMALL))
    assert_equal(load_weights(tmp_path, SMALL, "bfloat16"), half)


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    config = dataclasses.replace(SMALL, vocabulary=2000, width=128, hidden=256, layers=8)
    save_weights(tmp_path, config, weights(config))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_weights(config)))
    tracemalloc.start()
    load_weights(tmp_path, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < peak < 1.5 * size


def test_redundant_tensors_are_accepted(tmp_path):
    save_weights(tmp_path, SMALL, weights(SMALL))
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    assert_equal(load_weights(tmp_path, SMALL), weights(SMALL))


def test_all_misfits_are_told_at_once(tmp_path):
    save_weights(tmp_path, SMALL, weights(SMALL))
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    stored["model.layers.0.self_attn.q_norm.weight"] = np.ones(6, np.float32)
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][:30]
    stored["model.layers.1.mlp.up_proj.weight"] = np.ones((20, 12), np.int8)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError) as error:
        load_weights(tmp_path, SMALL)
    for text in (
        "4 tensors do not fit",
        "model.norm.weight: missing, expected (12,)",
        "model.layers.0.self_attn.q_norm.weight: unexpected, found (6,)",
        "model.embed_tokens.weight: expected (31, 12), found (30, 12)",
        "model.layers.1.mlp.up_proj.weight: stored as I8, expected one of BF16, F16, F32, F64",
    ):
        assert text in str(error.value)


def test_a_long_list_of_misfits_is_cut(tmp_path):
    save_weights(tmp_path, SMALL, weights(SMALL))
    deeper = dataclasses.replace(SMALL, layers=5)
    with pytest.raises(ConfigurationError, match="18 tensors do not fit") as error:
        load_weights(tmp_path, deeper)
    message = str(error.value)
    assert "; … and 14 more" in message and message.count("missing, expected") == 4 and "\n" not in message


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigurationError, match="pytorch_model.bin, but pickled weights are never read: convert them"):
        load_weights(tmp_path, SMALL)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigurationError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_weights(tmp_path, SMALL)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"model.norm.weight": "../other.safetensors"}}', "no json"])
def test_a_bad_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigurationError, match="index.json"):
        load_weights(tmp_path, SMALL)


def test_a_cut_file_and_a_wrong_type_are_refused(tmp_path):
    save_weights(tmp_path, SMALL, weights(SMALL))
    with pytest.raises(ConfigurationError, match="dtype = 'float16' is not valid; choose one of float32, bfloat16"):
        load_weights(tmp_path, SMALL, "float16")  # type: ignore[arg-type]
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        load_weights(tmp_path, SMALL)


def test_a_combination_that_no_architecture_has_is_not_written(tmp_path):
    config = dataclasses.replace(SMALL, output_bias=True)
    with pytest.raises(ConfigurationError, match="output_bias = True"):
        save_weights(tmp_path, config, weights(config))


def test_both_generations_of_rotary_settings_mean_the_same(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    older = config_of(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    newer = config_of(tmp_path, rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling})
    assert older == newer
    assert newer.rope_theta == 5e5 and newer.rope_scaling == {"rope_type": "llama3", **scaling}
    oldest = config_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert oldest.rope_theta == 10000.0 and oldest.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config_of(tmp_path, rope_parameters={"rope_theta": 3.0, "rope_type": "default"}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"key_value_heads": 4, "head_size": 4, "maximum_positions": 2048, "tied": False, "sliding_window": None}),
        ({"head_dim": 6, "num_key_value_heads": 2}, {"key_value_heads": 2, "head_size": 6}),
        ({"head_dim": None, "num_key_value_heads": None}, {"key_value_heads": 4, "head_size": 4}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
        ({"sliding_window": 7}, {"sliding_window": None}),  # Llama has none
        ({"model_type": "mistral", "num_key_value_heads": 2}, {"sliding_window": 4096, "attention_bias": False}),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, {"sliding_window": None}),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 7}, {"sliding_window": 7}),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 7},
            {"sliding_window": None, "attention_bias": True, "output_bias": False},
        ),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            {"sliding_window": 7},
        ),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 7, "use_sliding_window": True},
            {"sliding_window": None},  # both layers lie below max_window_layers = 28
        ),
    ],
)
def test_what_a_configuration_says(tmp_path, changes, expected):
    config = config_of(tmp_path, **changes)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma' is not supported, only llama, mistral, qwen2 are"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"vocab_size": "absent"}, "vocab_size = None must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 5}, "head_size = 5"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": 2.0}, "not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 2},
            "1 of 2 layers have no sliding window",
        ),
    ],
)
def test_what_a_configuration_must_not_say(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        config_of(tmp_path, **changes)


def test_a_missing_or_broken_config_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="config.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="not a JSON object"):
        read_config(tmp_path)


def test_stories260k_loads(shared_folder):
    folder = shared_folder / "models" / "stories260k"
    config = read_config(folder)
    assert (config.vocabulary, config.width, config.layers, config.heads, config.key_value_heads) == (512, 64, 5, 8, 4)
    assert (config.head_size, config.hidden, config.tied, config.rope_theta) == (8, 172, True, 10000.0)
    frozen = load_weights(folder, config)
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 260_032
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        frozen["blocks"]["gate_proj"]["kernel"][4].T, stored["model.layers.4.mlp.gate_proj.weight"]
    )
