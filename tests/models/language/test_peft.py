"""Adapters in PEFT's folders: there and back, and what is refused. Against PEFT itself: test_language_oracles."""

import json

import jax
import numpy as np
import pytest

from fedjax_qp.models.language.llama import LlamaConfig
from fedjax_qp.models.language.lora import adapter_shapes
from fedjax_qp.models.language.peft import export_adapter, import_adapter
from fedjax_qp.registry import ConfigurationError

save_file = pytest.importorskip("safetensors.numpy").save_file
load_file = pytest.importorskip("safetensors.numpy").load_file

CONFIG = LlamaConfig(
    vocabulary=31,
    width=12,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_size=6,
    hidden=20,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
)
TARGETS = ("q_proj", "v_proj", "down_proj")
SHAPES = adapter_shapes(CONFIG, 3, TARGETS)
A_OF_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def adapters(dtype=np.float32) -> dict:
    random = np.random.default_rng(0)
    return {
        name: {matrix: random.normal(size=shape).astype(dtype) for matrix, shape in pair.items()}
        for name, pair in SHAPES.items()
    }


def export(folder, values=None, **changes):
    options = {"config": CONFIG, "rank": 3, "alpha": 6.0, "targets": TARGETS, "base_model_name": "some/base"}
    export_adapter(folder, adapters() if values is None else values, **{**options, **changes})
    return folder


def test_an_exported_adapter_comes_back(tmp_path):
    found, rank, alpha = import_adapter(export(tmp_path / "new" / "folder"), CONFIG)
    assert (rank, alpha) == (3, 6.0)
    assert jax.tree.structure(found) == jax.tree.structure(adapters())
    jax.tree.map(np.testing.assert_array_equal, found, adapters())


def test_names_shapes_and_settings_are_those_of_peft(tmp_path):
    stored = load_file(export(tmp_path, alpha=5.5) / "adapter_model.safetensors")
    assert len(stored) == 2 * 3 * 2
    np.testing.assert_array_equal(stored[A_OF_Q], adapters()["q_proj"]["a"][1].T)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
    np.testing.assert_array_equal(stored[name], adapters()["down_proj"]["b"][0].T)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(TARGETS) and settings["base_model_name_or_path"] == "some/base"
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (3, 5.5, "CAUSAL_LM")


def test_entries_outside_the_mask_are_zeros(tmp_path):
    random = np.random.default_rng(1)
    masks = {name: {m: random.random(shape) < 0.5 for m, shape in pair.items()} for name, pair in SHAPES.items()}
    found, _, _ = import_adapter(export(tmp_path, masks=masks), CONFIG)
    expected = jax.tree.map(lambda values, mask: values * mask, adapters(), masks)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_device_arrays_of_half_precision_are_written_as_such(tmp_path):
    half = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.bfloat16), adapters())
    assert load_file(export(tmp_path, half) / "adapter_model.safetensors")[A_OF_Q].dtype == jax.numpy.bfloat16
    found, _, _ = import_adapter(tmp_path, CONFIG)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other.astype(np.float32)), found, half)


def test_what_does_not_fit_the_model_is_not_exported(tmp_path):
    with pytest.raises(ConfigurationError, match="give the same names"):
        export(tmp_path, targets=("q_proj",))
    with pytest.raises(ConfigurationError, match="q_proj/a: expected \\(2, 12, 4\\), found \\(2, 12, 3\\)"):
        export(tmp_path, rank=4)
    with pytest.raises(ConfigurationError, match="unknown projection 'c_attn'"):
        export(tmp_path, {"c_attn": adapters()["q_proj"]}, targets=("c_attn",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported, only 'LORA' is"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"bias": "all"}, "bias = 'all' is not supported, only 'none' is"),
        ({"use_dora": True}, "use_dora = True adds magnitudes"),
        ({"use_rslora": True}, "use_rslora = True scales by"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = .* different ranks"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern = .* different scales"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r = 0 must be a positive integer"),
        ({"lora_alpha": None}, "lora_alpha = None"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, changes, message):
    file = export(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(tmp_path, CONFIG)


def test_all_misfits_are_told_at_once(tmp_path):
    file = export(tmp_path) / "adapter_model.safetensors"
    stored = load_file(file)
    stored[A_OF_Q] = stored[A_OF_Q][:2]
    stored["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 12), np.float32)
    del stored[A_OF_Q.replace("layers.1", "layers.0")]
    stored[A_OF_Q.replace("lora_A", "lora_B")] = np.ones((24, 3), np.int32)
    save_file(stored, file)
    with pytest.raises(ConfigurationError) as error:
        import_adapter(tmp_path, CONFIG)
    for text in (
        "4 tensors do not fit",
        f"{A_OF_Q}: expected (3, 12), found (2, 12)",
        "base_model.model.lm_head.lora_A.weight: unexpected, found (3, 12)",
        f"{A_OF_Q.replace('layers.1', 'layers.0')}: missing, expected (3, 12)",
        "lora_B.weight: stored as I32",
    ):
        assert text in str(error.value)


def test_folders_without_an_adapter(tmp_path):
    with pytest.raises(ConfigurationError, match="adapter_config.json does not exist"):
        import_adapter(tmp_path, CONFIG)
    file = export(tmp_path) / "adapter_model.safetensors"
    save_file({}, file)
    with pytest.raises(ConfigurationError, match="there is no adapter in it"):
        import_adapter(tmp_path, CONFIG)
    file.unlink()
    with pytest.raises(ConfigurationError, match="Pickled adapters"):
        import_adapter(tmp_path, CONFIG)
