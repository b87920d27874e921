"""The configuration of pretrained language models: config.json in Hugging Face's words and in ours."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_qp.models.language.llama import LlamaConfig
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json
from fedjax_qp.settings.values import shown

# Sizes far beyond any model there is, so that a slip of the pen costs a sentence and not the machine's memory.
LARGEST, MOST_LAYERS, MOST_PARAMETERS = 2**24, 10_000, 10**13

# What Hugging Face's classes take where config.json is silent.
_COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "rope_theta": 10000.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "mistral": {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
}


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ConfigurationError: the file is absent, or is not a JSON object.
    """
    try:
        content = load_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{file} does not exist; the folder of a model in Hugging Face's layout has it."
        ) from None
    except (OSError, ValueError) as error:  # a NUL in the path
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file} holds a {type(content).__name__}, not a JSON object.")
    return content


def read_config(folder: Path | str) -> LlamaConfig:
    """Reads config.json of a Llama, Mistral or Qwen2 model, as transformers 4 or 5 writes it.

    Raises:
      ConfigurationError: another architecture, or a variant of these three that our forward pass does not have.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigurationError(f"{file}: model_type = {kind!r} is not supported, only {', '.join(DEFAULTS)} are.")
    raw = {**DEFAULTS[kind], **raw}
    _refuse_variants(file, raw)
    width, layers, heads = (size(file, raw, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    key_value_heads = heads if raw["num_key_value_heads"] is None else size(file, raw, "num_key_value_heads")
    head_size = width // heads if raw["head_dim"] is None else size(file, raw, "head_dim")
    maximum_positions = size(file, raw, "max_position_embeddings")
    theta, scaling = _rope(file, raw, maximum_positions)
    biased = kind == "llama" and _flag(file, raw, "attention_bias")
    config = LlamaConfig(
        vocabulary=size(file, raw, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_size=head_size,
        hidden=size(file, raw, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=number(file, "rms_norm_eps", raw["rms_norm_eps"]),
        tied=_flag(file, raw, "tie_word_embeddings"),
        attention_bias=kind == "qwen2" or biased,
        output_bias=biased,
        sliding_window=_window(file, raw, layers),
        maximum_positions=maximum_positions,
    )
    matrices = layers * sum(inputs * outputs for inputs, outputs in config.projections().values())
    parameters = matrices + config.vocabulary * width
    _require(
        file, parameters <= MOST_PARAMETERS, f"these sizes make {parameters:,} parameters, more than any model has"
    )
    return config


def _require(file: Path, condition: bool, problem: str) -> None:
    if not condition:
        raise ConfigurationError(f"{file}: {problem}.")


def size(file: Path, raw: dict[str, Any], key: str) -> int:
    """A size that a model's file states.

    Raises:
      ConfigurationError: it is not a positive integer, or far too large.
    """
    value = raw.get(key)
    most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST
    fits = type(value) is int and 0 < value <= most
    _require(file, fits, f"{key} = {shown(value)} must be a positive integer, at most {most}")
    return int(value)  # type: ignore[arg-type]


def number(file: Path, key: str, value: Any) -> float:
    """A positive number that a model's file states.

    Raises:
      ConfigurationError: it is something else.
    """
    fits = type(value) in (int, float) and 0 < value <= 1e30 and math.isfinite(value)
    _require(file, fits, f"{key} = {shown(value)} must be a number above 0")
    return float(value)


def _flag(file: Path, raw: dict[str, Any], key: str) -> bool:
    value = raw[key]
    _require(file, value is None or type(value) is bool, f"{key} = {shown(value)} must be true or false")
    return bool(value)


def _refuse_variants(file: Path, raw: dict[str, Any]) -> None:
    activation = raw["hidden_act"]
    _require(
        file, activation in ("silu", "swish"), f"hidden_act = {shown(activation)} is not supported, only 'silu' is"
    )
    _require(file, not _flag(file, raw, "mlp_bias"), "mlp_bias = true is not supported: the MLP has no biases here")
    quantised = raw.get("quantization_config")
    _require(file, not quantised, "the weights are quantised (quantization_config); use the model's unquantised folder")


def _rope(file: Path, raw: dict[str, Any], positions: int) -> tuple[float, Mapping | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    _require(file, isinstance(given, dict), f"the rotary embedding's scaling is {shown(given)}, not an object")
    rope = {**given}
    theta = rope.pop("rope_theta", None)
    theta = number(file, "rope_theta", raw["rope_theta"] if theta is None else theta)
    older = rope.pop("type", "default")
    kind = rope.pop("rope_type", older)
    partial = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    _require(
        file, partial is None or partial == 1, f"partial_rotary_factor = {shown(partial)} is not supported, only 1 is"
    )
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    _require(file, not nested, f"rotary embeddings that differ between layers ({', '.join(nested)}) are not supported")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or positions
    return theta, {"rope_type": kind, **rope}


def _window(file: Path, raw: dict[str, Any], layers: int) -> int | None:
    """Width of the sliding window, the same in all layers."""
    kind, window = raw["model_type"], raw["sliding_window"]
    if (
        kind == "llama"
        or window is None
        or ("use_sliding_window" in raw and not _flag(file, raw, "use_sliding_window"))
    ):
        return None
    if kind == "qwen2":
        types, windowless = raw.get("layer_types"), raw["max_window_layers"]
        fits = types is None or (isinstance(types, list) and len(types) == layers)
        _require(file, fits, f"layer_types = {shown(types)} must be a list of {layers} names, one a layer")
        fits = type(windowless) is int and windowless >= 0
        _require(
            file, bool(types) or fits, f"max_window_layers = {shown(windowless)} must be a whole number, 0 or more"
        )
        full = types.count("full_attention") if types else min(windowless, layers)
        if full == layers:
            return None
        _require(file, full == 0, f"{full} of {layers} layers have no sliding window; all layers must be alike")
    return size(file, raw, "sliding_window")


def config_json(config: LlamaConfig) -> dict[str, Any]:
    """Returns what config.json says about a model; the inverse of `read_config`.

    The layout is the older one (`rope_theta`, `rope_scaling`), which transformers 5 reads as well.

    Raises:
      ConfigurationError: none of the three architectures has this combination.
    """
    windowed, bias = config.sliding_window is not None, (config.attention_bias, config.output_bias)
    if bias == (True, False):
        kind = "qwen2"
    elif bias[0] == bias[1] and not (windowed and bias[0]):
        kind = "mistral" if windowed else "llama"
    else:
        raise ConfigurationError(
            f"no architecture of {', '.join(DEFAULTS)} has attention_bias = {bias[0]}, output_bias = {bias[1]} and "
            f"sliding_window = {config.sliding_window} together."
        )
    content = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.maximum_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "tie_word_embeddings": config.tied,
    }
    if kind == "llama":
        content.update(attention_bias=config.attention_bias, mlp_bias=False)
    else:
        content.update(sliding_window=config.sliding_window)
    if kind == "qwen2":
        content.update(use_sliding_window=windowed, max_window_layers=0 if windowed else config.layers)
    return content
