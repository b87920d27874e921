"""Pretrained language models from Hugging Face folders: the weights (the configuration is in `pretrained_config`).

A folder holds config.json and either model.safetensors or its shards with model.safetensors.index.json. Nothing is
downloaded and nothing is unpickled. Hugging Face stores one [out, in] matrix a layer; ours are [in, out] and stacked over
the layers, so that a forward pass is one scan.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from fedjax_qp.models.language.llama import LlamaConfig, abstract_weights
from fedjax_qp.models.language.pretrained_config import config_json, read_config, read_json
from fedjax_qp.registry import ConfigurationError

__all__ = ["load_weights", "read_config", "save_weights"]

INSTALL = "pip install -e '.[language]'"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Storage types of ordinary weights; quantised ones (integers, 8-bit floats) mean nothing without their scales.
FLOATS = {"F64", "F32", "F16", "BF16"}
NAMED = 4  # tensors that a message lists

# The projections of a decoder layer, where Hugging Face (and PEFT after it) keeps them.
PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
INSIDE = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", **PROJECTIONS}
OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


class Slot(NamedTuple):
    """Where one tensor of a file goes in our tree."""

    path: tuple[str, ...]
    layer: int | None  # index into the stacked array; None where there is no layer axis
    shape: tuple[int, ...]  # as Hugging Face stores it

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"


def slots(config: LlamaConfig) -> dict[str, Slot]:
    """Returns every tensor of the model's safetensors files, by its name there."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_weights(config)):
        keys = tuple(entry.key for entry in path)
        kind = "bias" if keys[-1] == "bias" else "weight"
        if keys[0] != "blocks":
            shape = leaf.shape[::-1] if keys[-1] == "kernel" else leaf.shape
            table[f"{OUTSIDE[keys[0]]}.{kind}"] = Slot(keys, None, shape)
            continue
        shape = leaf.shape[:0:-1] if keys[-1] == "kernel" else leaf.shape[1:]
        for layer in range(config.layers):
            table[f"model.layers.{layer}.{INSIDE[keys[1]]}.{kind}"] = Slot(keys, layer, shape)
    return table


def load_weights(
    folder: Path | str, config: LlamaConfig, dtype: Literal["float32", "bfloat16"] = "float32"
) -> dict[str, Any]:
    """Reads the weights, one tensor at a time into their final place, so that the peak is about one copy.

    Args:
      folder: with model.safetensors, or its shards and their index.
      dtype: of the arrays that are returned; that of the files may differ.

    Returns:
      The frozen tree of `llama` as numpy arrays: kernels [in, out], blocks with a leading axis of the layers.

    Raises:
      ConfigurationError: no safetensors, or tensors that are missing, unexpected, stored twice or of the wrong shape (lists
        them), or one with numbers that are not finite.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype = {dtype!r} is not valid; choose one of {', '.join(DTYPES)}.")
    files = _weight_files(Path(folder))
    found = _stored(Path(folder), files)
    check_layers(folder, config, len(found))
    table = slots(config)
    _check_tensors(Path(folder), found, table, config.tied)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for slot in table.values():
        if slot.path not in flat:
            shape = slot.shape[::-1] if slot.transposed else slot.shape
            flat[slot.path] = np.empty(shape if slot.layer is None else (config.layers, *shape), DTYPES[dtype])
    for file in files:
        with open_tensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name in table:
                    slot, tensor = table[name], stored.get_tensor(name)
                    target = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
                    with np.errstate(over="ignore", invalid="ignore"):
                        target[...] = tensor.T if slot.transposed else tensor
                    check_finite(file, name, target)
    frozen: dict[str, Any] = {}
    for path, array in flat.items():
        branch = frozen
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = array
    return frozen


def save_weights(folder: Path | str, config: LlamaConfig, frozen: Mapping[str, Any]) -> None:
    """Writes a folder in Hugging Face's layout, in the arrays' own dtype; the inverse of `load_weights`.

    Args:
      frozen: the tree of `llama`, numpy or JAX arrays, e.g. a base with adapters merged into it.
    """
    tensors = {}
    for name, slot in slots(config).items():
        leaf: Any = frozen
        for key in slot.path:
            leaf = leaf[key]
        array = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        tensors[name] = array.T if slot.transposed else array
    write_model(Path(folder), config_json(config), tensors)


def write_model(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tensors(folder / SINGLE, tensors)


def save_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that PyTorch's readers accept too."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    _safetensors().numpy.save_file(contiguous, str(file), metadata={"format": "pt"})


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Opens a safetensors file for reading tensor by tensor.

    Raises:
      ConfigurationError: it is absent or damaged.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(file), framework="numpy") as stored:
            yield stored
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error)[:300]
        raise ConfigurationError(f"{file} cannot be read as safetensors: {reason}.") from None


def check_layers(where: object, config: LlamaConfig, tensors: int) -> None:
    """Checks the number of layers against that of the tensors, before anything is laid out by layer.

    Raises:
      ConfigurationError: there are more layers than tensors.
    """
    if config.layers > tensors:
        raise ConfigurationError(
            f"{where}: {config.layers} layers by the configuration, but only {tensors} tensors: the weights of another model?"
        )


def check_finite(file: Path, name: str, array: np.ndarray) -> None:
    """Checks a tensor that was read.

    Raises:
      ConfigurationError: it holds NaN or infinity, or what is infinite in the type it was read into.
    """
    short = array.dtype == DTYPES["bfloat16"]  # compared as integers, which is several times faster
    finite = (array.view(np.uint16) & 0x7FFF) < 0x7F80 if short else np.isfinite(array)
    if not finite.all():
        raise ConfigurationError(
            f"{file}: {name} holds NaN, infinity or numbers beyond {array.dtype}: the weights are damaged, or need another "
            "model.dtype."
        )


def check_names(where: object, problems: list[str]) -> None:
    """Raises one error for all tensors that do not fit, if there are any."""
    if problems:
        rest = f"; … and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ConfigurationError(
            f"{where}: {len(problems)} tensors do not fit the configuration: {'; '.join(problems[:NAMED])}{rest}"
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(map(_plain_name, shards.values())):
            raise ConfigurationError(f"{folder / INDEX} has no weight_map from tensor names to file names.")
        return [folder / shard for shard in sorted(set(shards.values()))]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern))
    found = f" It has {', '.join(pickled[:3])}, but pickled weights are never read:" if pickled else " If need be,"
    raise ConfigurationError(
        f"{folder} has neither {SINGLE} nor {INDEX}.{found} convert them to safetensors, with transformers: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)."
    )


def _plain_name(shard: Any) -> bool:
    """Whether this names a file in the index's own folder."""
    return isinstance(shard, str) and shard not in ("", "..") and "\0" not in shard and Path(shard).name == shard


def _stored(folder: Path, files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and storage types of all tensors, by their names."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    twice = []
    for file in files:
        with open_tensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                part = stored.get_slice(name)
                twice += [f"{name}: in {file.name} and in an earlier file"] if name in found else []
                found[name] = tuple(part.get_shape()), part.get_dtype()
    check_names(folder, twice)
    return found


def _check_tensors(
    folder: Path, found: dict[str, tuple[tuple[int, ...], str]], table: dict[str, Slot], tied: bool
) -> None:
    """Compares names, shapes and storage types before anything large is read."""
    # Buffers of old checkpoints that follow from the configuration, and the copy of tied embeddings, say nothing new.
    ignored = {name for name in found if name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")}
    problems = [f"{name}: missing, expected {slot.shape}" for name, slot in table.items() if name not in found]
    problems += [f"{name}: unexpected, found {found[name][0]}" for name in found if name not in table.keys() | ignored]
    for name, slot in table.items():
        shape, storage = found.get(name, (slot.shape, "F32"))
        if shape != slot.shape:
            problems.append(f"{name}: expected {slot.shape}, found {shape}")
        elif storage not in FLOATS:
            problems.append(f"{name}: stored as {storage}, expected one of {', '.join(sorted(FLOATS))}")
    check_names(folder, problems)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ConfigurationError(f"pretrained models need `{INSTALL}` ({error}).") from None
    return safetensors
