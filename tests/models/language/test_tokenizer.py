"""Tokenizers from a local folder."""

import json

import pytest

from fedjax_qp.models.language import tokenizer as module
from fedjax_qp.models.language.tokenizer import load_tokenizer
from fedjax_qp.registry import ConfigurationError

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")


def write_tokenizer(folder, **settings):
    vocabulary = {"<unk>": 0, "<end>": 1, "<fill>": 2, "red": 3, "blue": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def test_padding_is_kept_where_there_is_one(tmp_path):
    loaded = load_tokenizer(write_tokenizer(tmp_path, eos_token="<end>", pad_token="<fill>"))
    assert loaded("blue red green")["input_ids"] == [4, 3, 0]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (2, 1)


def test_the_end_serves_as_padding(tmp_path):
    loaded = load_tokenizer(write_tokenizer(tmp_path, eos_token="<end>"))
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert loaded(["red", "red blue"], padding=True)["input_ids"] == [[3, 1], [3, 4]]


def test_nothing_can_serve_as_padding(tmp_path):
    with pytest.raises(ConfigurationError, match="neither pad_token nor eos_token"):
        load_tokenizer(write_tokenizer(tmp_path))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigurationError, match="has no tokenizer: none of tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigurationError, match="has no tokenizer"):
        load_tokenizer("someone/model-on-the-hub")


@pytest.mark.parametrize("content", ["{}", "{", '{"version": "1.0", "model": {"type": "Other"}}'])
def test_a_broken_tokenizer(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_code_of_the_folder_is_not_run(tmp_path):
    write_tokenizer(tmp_path, eos_token="<end>", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    try:
        load_tokenizer(tmp_path)
    except ConfigurationError as error:
        assert "cannot be read" in str(error)
    assert not (tmp_path / "ran").exists()


def test_the_advice_is_silenced_for_the_import_only(monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    with module._no_advice():
        assert module.os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in module.os.environ


def test_stories260k_has_no_padding_of_its_own(shared_folder):
    loaded = load_tokenizer(shared_folder / "models" / "stories260k")
    text = "Once upon a time, there was a cat."
    tokens = loaded(text)["input_ids"]
    assert tokens[0] == loaded.bos_token_id == 1 and max(tokens) < 512
    assert loaded.decode(tokens, skip_special_tokens=True) == text
    assert loaded.pad_token_id == loaded.eos_token_id == 2 and not loaded.chat_template
