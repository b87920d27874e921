"""Adapters as folders of PEFT, the package in which Hugging Face keeps LoRA: one way out to other tools, and back.

PEFT stores A as [r, in] and B as [out, r] for every layer; ours are a [in, r] and b [r, out], stacked over the layers. The
update is alpha / r · BA in both.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedjax_qp.models.language.llama import LlamaConfig
from fedjax_qp.models.language.pretrained import (
    FLOATS,
    PROJECTIONS,
    check_finite,
    check_names,
    open_tensors,
    save_tensors,
)
from fedjax_qp.models.language.pretrained_config import number, read_json
from fedjax_qp.registry import ConfigurationError, unknown_name

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Options of PEFT that change what the matrices mean, with the value at which they do nothing.
REFUSED = {
    "use_rslora": "scales by alpha / √r",
    "use_dora": "adds magnitudes",
    "lora_bias": "adds a bias to B",
    "rank_pattern": "gives modules different ranks",
    "alpha_pattern": "gives modules different scales",
    "modules_to_save": "trains whole modules",
    "trainable_token_indices": "trains embeddings",
    "target_parameters": "adapts bare parameters",
    "layer_replication": "repeats layers",
    "alora_invocation_tokens": "adapts after certain tokens only",
    "use_qalora": "groups the inputs",
    "use_bdlora": "uses block-diagonal matrices",
    "fan_in_fan_out": "stores transposed kernels",
}


class Part(NamedTuple):
    """Where one tensor of adapter_model.safetensors belongs."""

    target: str
    matrix: str  # "a" or "b"
    layer: int
    shape: tuple[int, int]  # as PEFT stores it


def export_adapter(
    folder: Path | str,
    adapters: Mapping[str, Mapping[str, Any]],
    *,
    config: LlamaConfig,
    rank: int,
    alpha: float,
    targets: Iterable[str],
    base_model_name: str,
    masks: Mapping[str, Mapping[str, Any]] | tuple = (),
) -> None:
    """Writes one client's adapter so that `peft.PeftModel.from_pretrained(base_model, folder)` loads it.

    Args:
      adapters: `{target: {"a": [layers, in, r], "b": [layers, r, out]}}`, float32 or bfloat16.
      rank: r; for an expanded module (PerFIT) the expanded rank.
      alpha: the update is alpha / rank · a @ b; with an expanded rank that keeps its scale, alpha is expanded as well.
      targets: names of the adapted projections; must be those of `adapters`.
      base_model_name: folder or hub name of the base model, for whoever loads the adapter.
      masks: () or a tree of booleans like `adapters`; entries outside the mask are written as zeros.

    Raises:
      ConfigurationError: targets or shapes that do not fit the model.
    """
    targets = sorted(set(targets))
    if set(targets) != set(adapters):
        raise ConfigurationError(f"targets = {targets}, but the adapter has {sorted(adapters)}; give the same names.")
    table = _parts(config, rank, targets)
    tensors, problems = {}, []
    for target in targets:
        for matrix in ("a", "b"):
            array = np.asarray(adapters[target][matrix])
            if isinstance(masks, Mapping):
                array = np.where(np.asarray(masks[target][matrix]), array, np.zeros((), array.dtype))
            parts = {name: part for name, part in table.items() if (part.target, part.matrix) == (target, matrix)}
            expected = (config.layers, *next(iter(parts.values())).shape[::-1])
            if array.shape != expected:
                problems.append(f"{target}/{matrix}: expected {expected}, found {array.shape}")
                continue
            tensors.update({name: array[part.layer].T for name, part in parts.items()})
    check_names("the adapter", problems)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / TENSORS, tensors)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def import_adapter(folder: Path | str, config: LlamaConfig) -> tuple[dict[str, dict[str, np.ndarray]], int, float]:
    """Reads a LoRA adapter that PEFT or `export_adapter` wrote.

    Returns:
      The adapters `{target: {"a": [layers, in, r], "b": [layers, r, out]}}` in float32, the rank and alpha.

    Raises:
      ConfigurationError: not a plain LoRA of a causal language model, or tensors that do not fit `config`; lists them.
    """
    folder = Path(folder)
    rank, alpha = _read_settings(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        raise ConfigurationError(
            f"{folder} has no {TENSORS}. Pickled adapters (adapter_model.bin) are never read: save them again with PEFT."
        )
    with open_tensors(folder / TENSORS) as stored:
        sizes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        types = {name: stored.get_slice(name).get_dtype() for name in sizes}
        # Which projections are adapted is read off the tensors: PEFT's target_modules may be an expression.
        targets = [target for target, path in PROJECTIONS.items() if any(f".{path}.lora_" in name for name in sizes)]
        table = _parts(config, rank, targets)
        problems = [f"{name}: missing, expected {part.shape}" for name, part in table.items() if name not in sizes]
        problems += [f"{name}: unexpected, found {shape}" for name, shape in sizes.items() if name not in table]
        for name, part in table.items():
            if sizes.get(name, part.shape) != part.shape:
                problems.append(f"{name}: expected {part.shape}, found {sizes[name]}")
            elif types.get(name, "F32") not in FLOATS:
                problems.append(f"{name}: stored as {types[name]}, expected one of {', '.join(sorted(FLOATS))}")
        check_names(folder, problems)
        if not table:
            raise ConfigurationError(f"{folder / TENSORS} holds no tensors; there is no adapter in it.")
        adapters: dict[str, dict[str, np.ndarray]] = {target: {} for target in targets}
        for name, part in table.items():
            pair = adapters[part.target]
            if part.matrix not in pair:
                pair[part.matrix] = np.empty((config.layers, *part.shape[::-1]), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                pair[part.matrix][part.layer] = stored.get_tensor(name).T
            check_finite(folder / TENSORS, name, pair[part.matrix][part.layer])
    return adapters, rank, alpha


def _parts(config: LlamaConfig, rank: int, targets: Iterable[str]) -> dict[str, Part]:
    table = {}
    for target in targets:
        if target not in PROJECTIONS:
            raise unknown_name("projection", target, PROJECTIONS)
        inputs, outputs = config.projections()[target]
        for layer in range(config.layers):
            prefix = f"base_model.model.model.layers.{layer}.{PROJECTIONS[target]}"
            table[f"{prefix}.lora_A.weight"] = Part(target, "a", layer, (rank, inputs))
            table[f"{prefix}.lora_B.weight"] = Part(target, "b", layer, (outputs, rank))
    return table


def _read_settings(file: Path) -> tuple[int, float]:
    """Rank and alpha of a plain LoRA."""
    content = read_json(file)
    for key, allowed in (("peft_type", ("LORA",)), ("task_type", ("CAUSAL_LM", None)), ("bias", ("none", None))):
        if content.get(key) not in allowed:
            raise ConfigurationError(f"{file}: {key} = {content.get(key)!r} is not supported, only {allowed[0]!r} is.")
    for key, effect in REFUSED.items():
        if content.get(key):
            raise ConfigurationError(f"{file}: {key} = {content[key]!r} {effect}, which is not supported here.")
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ConfigurationError(
            f"{file}: r = {rank!r} must be a positive integer and lora_alpha = {alpha!r} a number."
        )
    return rank, number(file, "lora_alpha", alpha)
