"""Damaged and wrongly typed files of a model, token ids beyond its embedding, and records that are no text."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from fedjax_qp import config
from fedjax_qp.experiment import build
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder

pytest.importorskip("transformers")
RECORDS = [{"instruction": f"Say {i}.", "output": "The cat " + "sat " * (i % 5 + 1) + "here."} for i in range(40)]
MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path, shared_folder):
    return shutil.copytree(shared_folder / "models" / "stories260k", tmp_path / "model")


def notes(folder, records=RECORDS, **text):
    file = RunFolder(folder).records_file
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    settings = {
        "name": "damaged",
        "data": {"name": "records", "files": str(file)},
        "partition": {"name": "iid", "clients": 2},
        "model": {"name": "pretrained", "path": str(folder), "rank": 2},
        "algorithm": "fedit",
        "text": {"cut_off": 96, "template": "short", "test_records": 4, **text},
        "local": {"batch_size": 4, "epochs": 1},
        "participation": {"cohort": 2},
        "engine": {"lanes": 2, "devices": 1},
        "evaluation": {"batch_size": 4},
    }
    return " ".join(build(config.from_dict(settings)).task.notes)


def change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": []}, "model_type = "),
        ({"rms_norm_eps": None}, "rms_norm_eps = None must be a number above 0"),
        ({"rope_theta": True}, "rope_theta = True must be a number above 0"),
        ({"rope_scaling": {"rope_type": []}}, "is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor = 0 must be a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' must be true or false"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be"),
        ({"num_hidden_layers": 9999}, "9999 layers by the configuration, but only 47 tensors"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers = None"),
    ],
)
def test_config_values_are_checked(folder, changes, message):
    change(folder / "config.json", **changes)
    with pytest.raises(ConfigurationError, match=message):
        notes(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"a": 1, "a": 2}', '{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_a_damaged_tokenizer_is_one_sentence(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match="tokenizer in .* cannot be read") as error:
        notes(folder)
    assert "\n" not in str(error.value) and "trust_remote_code" not in str(error.value)


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_special_tokens_beyond_the_embedding_are_refused(folder, role):
    change(folder / "tokenizer_config.json", **{role: "<never>"})
    with pytest.raises(ConfigurationError, match=r"512 \('<never>'\) are beyond the 512 rows .* has 513 tokens"):
        notes(folder)


def test_tokens_of_records_beyond_the_embedding_are_refused_and_named(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(folder)
    assert "training records" in notes(folder)  # harmless while no text has it
    for place in ("instruction", "output"):
        wrong = [*RECORDS, {**RECORDS[0], place: "say <|user|> now"}]
        with pytest.raises(ConfigurationError, match=r"line 41, record 41: the token ids 512 \('<\|user\|>'\)"):
            notes(folder, wrong)


@pytest.mark.parametrize("cut_off", [1500, 10**6])
def test_a_cut_off_beyond_the_positions_is_capped_and_said(folder, cut_off):
    found = notes(folder, cut_off=cut_off)
    assert (
        f"text.cut_off = {cut_off} is beyond the model's 512 positions" in found and "sequences of 512 tokens" in found
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (r'{"instruction": "Say 1", "output": "cat \ud83d sat"}', "record 2: output has half of a surrogate pair"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "line 2 has the key 'output' twice"),
        ('{"instruction": " ", "output": "b"}', "record 2: the instruction is empty"),
        ('{"instruction": "a", "output": "\\u200b"}', "record 2: the response is empty"),
    ],
)
def test_records_that_are_no_text_are_refused(folder, record, message):
    with pytest.raises(ConfigurationError, match=message):
        notes(folder, [RECORDS[0], record])


@pytest.mark.parametrize(("value", "kind"), [(np.nan, np.float32), (-np.inf, np.float32), (1e300, np.float64)])
def test_weights_that_are_not_finite_are_named(folder, value, kind):
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights[MATRIX] = weights[MATRIX].astype(kind)
    weights[MATRIX][0, 0] = value
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigurationError, match=f"model.safetensors: {MATRIX} holds NaN, infinity"):
        notes(folder)
