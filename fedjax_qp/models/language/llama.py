"""The Llama family (Llama, SmolLM, Mistral, Qwen2) as functions of frozen weights and adapters.

Source: Touvron et al., "LLaMA", 2023; grouped queries: Ainslie et al., "GQA", 2023. Weights as Hugging Face names them, but
kernels are [inputs, outputs] and all layers are stacked:

    {"embed": [V, d],
     "blocks": {"input_norm": [layers, d], "q_proj": {"kernel": [layers, in, out], "bias": [layers, out]}, "k_proj", "v_proj",
                "o_proj", "post_norm": [layers, d], "gate_proj": {"kernel"}, "up_proj": {"kernel"}, "down_proj": {"kernel"}},
     "norm": [d], "head": {"kernel": [d, V]}}          # biases where the model has them; no head where it is tied

One `scan` runs the layers, so that compile time does not grow with depth. Under `vmap` over clients with unmapped weights
every frozen matrix multiplies the tokens of all clients at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedjax_qp.models.language.lora import MaskedLoRA
from fedjax_qp.models.language.rotary import Rotation, frequencies, rotate, rotation, scaling_type
from fedjax_qp.registry import ConfigurationError

LONGEST = 2**16  # tokens of a sequence, whose attention holds at least 4 GiB


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one model.

    Raises:
      ConfigurationError: sizes that do not fit together, or an unknown rotary scaling.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    hidden: int  # of the feed-forward layers
    rope_theta: float
    rope_scaling: Mapping | None = field(hash=False)  # Hugging Face's rope_parameters without theta; a dict has no hash
    norm_epsilon: float
    tied: bool  # the head is the embedding
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on o
    sliding_window: int | None = None  # how many tokens a token sees, itself included; None: all
    maximum_positions: int = 2048

    def __post_init__(self):
        if self.heads % self.key_value_heads:
            raise ConfigurationError(
                f"{self.heads} heads cannot share {self.key_value_heads} key-value heads; "
                "the first must be a multiple of the second. Check the model's configuration file."
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ConfigurationError(
                f"head_size = {self.head_size}; the rotary embedding needs an even number, at least 2."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigurationError(f"sliding_window = {self.sliding_window}; it must be at least 1, or None for all.")
        scaling_type(self.rope_scaling)

    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices by name: what adapters can be put on."""
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        return {
            "q_proj": (self.width, queries),
            "k_proj": (self.width, keys),
            "v_proj": (self.width, keys),
            "o_proj": (queries, self.width),
            "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden),
            "down_proj": (self.hidden, self.width),
        }


class Frozen(nnx.Variable):
    """A base weight, which nobody trains."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far; S slots, of which segment 0 marks the empty ones."""

    keys: Float[Array, "layers B S heads head_size"]
    values: Float[Array, "layers B S heads head_size"]
    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]


class RMSNorm(nnx.Module):
    """Divides by the root mean square, in float32."""

    def __init__(self, scale: Array, epsilon: float):
        self.scale, self.epsilon = Frozen(scale), epsilon

    def __call__(self, inputs: Float[Array, "B T d"]) -> Float[Array, "B T d"]:
        wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        normal = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        return normal.astype(inputs.dtype) * self.scale[...]


class Projection(nnx.Module):
    """A frozen matrix and, if it has one, its adapter."""

    def __init__(self, weights: Mapping[str, Array], adapter: MaskedLoRA | None):
        self.kernel = Frozen(weights["kernel"])
        self.bias = Frozen(weights["bias"]) if "bias" in weights else None
        self.adapter = adapter

    def __call__(self, inputs: Float[Array, "B T inputs"], key: Key[Array, ""] | None) -> Float[Array, "B T outputs"]:
        outputs = inputs @ self.kernel[...]
        if self.bias is not None:
            outputs = outputs + self.bias[...]
        if self.adapter is None:
            return outputs
        return (outputs + self.adapter(inputs, key)).astype(outputs.dtype)


class Attention(nnx.Module):
    """Attention with rotary positions; several query heads share one head of keys and values."""

    def __init__(self, config: LlamaConfig, projections: Mapping[str, Projection]):
        self.head_size = config.head_size
        self.q_proj, self.k_proj = projections["q_proj"], projections["k_proj"]
        self.v_proj, self.o_proj = projections["v_proj"], projections["o_proj"]

    def __call__(
        self, inputs: Float[Array, "B T d"], turn: Rotation, mask: Bool[Array, "B 1 T S"], past: Any, keys: Mapping
    ) -> tuple[Float[Array, "B T d"], Any]:
        """Attends.

        Args:
          inputs: [B, T, d].
          turn: the rotation of each position.
          mask: which of the S slots each token sees; S = T without a cache.
          past: () or (keys [B, S, heads, head_size], values, slot), see `forward_cached`.
          keys: for dropout, by matrix.

        Returns:
          Outputs, and () or the new (keys, values).
        """
        query, key, value = (
            projection(inputs, keys.get(name)).reshape(*inputs.shape[:2], -1, self.head_size)
            for name, projection in (("q_proj", self.q_proj), ("k_proj", self.k_proj), ("v_proj", self.v_proj))
        )
        query, key = rotate(query, turn), rotate(key, turn)
        present = ()
        if past:
            *stores, slot = past
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), slot, axis=1)
                for store, new in zip(stores, (key, value), strict=True)
            )
            present = (key, value)
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return self.o_proj(attended.reshape(*inputs.shape[:2], -1), keys.get("o_proj")), present


class FeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, projections: Mapping[str, Projection]):
        self.gate_proj, self.up_proj = projections["gate_proj"], projections["up_proj"]
        self.down_proj = projections["down_proj"]

    def __call__(self, inputs: Float[Array, "B T d"], keys: Mapping) -> Float[Array, "B T d"]:
        gate = jax.nn.silu(self.gate_proj(inputs, keys.get("gate_proj")))
        return self.down_proj(gate * self.up_proj(inputs, keys.get("up_proj")), keys.get("down_proj"))


class Block(nnx.Module):
    """One decoder layer, made from its slice of the stacked arrays."""

    def __init__(
        self, config: LlamaConfig, weights: Mapping, adapters: Any, masks: Any, *, scale: float, dropout: float
    ):
        self.names = tuple(config.projections())
        projections = {}
        for name in self.names:
            adapter = None
            if adapters and name in adapters:
                adapter = MaskedLoRA(adapters[name], masks[name] if masks else None, scale=scale, dropout=dropout)
            projections[name] = Projection(weights[name], adapter)
        self.input_norm = RMSNorm(weights["input_norm"], config.norm_epsilon)
        self.attention = Attention(config, projections)
        self.post_norm = RMSNorm(weights["post_norm"], config.norm_epsilon)
        self.feed_forward = FeedForward(projections)

    def __call__(
        self,
        hidden: Float[Array, "B T d"],
        turn: Rotation,
        mask: Bool[Array, "B 1 T S"],
        past: Any = (),
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T d"], Any]:
        """See `Attention`."""
        # A matrix's key depends on its own place only, not on which other matrices have adapters.
        keys = {} if key is None else {name: jax.random.fold_in(key, place) for place, name in enumerate(self.names)}
        attended, present = self.attention(self.input_norm(hidden), turn, mask, past, keys)
        hidden = hidden + attended
        return hidden + self.feed_forward(self.post_norm(hidden), keys), present


def attention_mask(
    config: LlamaConfig,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    seen_positions: Int[Array, "B S"],
    seen_segments: Int[Array, "B S"],
) -> Bool[Array, "B 1 T S"]:
    """Tells which tokens (last axis) a token sees: earlier ones of its own segment, inside the window."""
    distance = positions[:, :, None] - seen_positions[:, None, :]
    mask = (segments[:, :, None] == seen_segments[:, None, :]) & (distance >= 0)
    if config.sliding_window is not None:
        mask &= distance < config.sliding_window
    return mask[:, None]


def forward(
    config: LlamaConfig,
    frozen: Mapping,
    adapters: PyTree,
    masks: PyTree,
    tokens: Int[Array | np.ndarray, "B T"],
    positions: Int[Array | np.ndarray, "B T"],
    segments: Int[Array | np.ndarray, "B T"],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    rematerialise: bool = False,
) -> Float[Array, "B T d"]:
    """Returns the last hidden states, normalised, in the base's type; `logits` takes them to the vocabulary.

    Args:
      config: the architecture.
      frozen: base weights, see the module docstring.
      adapters: see `fedjax_qp.models.language.lora`; () for none.
      masks: which entries of the adapters exist; () for all.
      tokens: as in `fedjax_qp.data.text.sequences.Sequences`.
      positions: likewise.
      segments: likewise.
      scale: of the adapters, alpha / rank.
      dropout: of the adapters' inputs, when there is a key.
      key: for dropout, or None.
      rematerialise: remember nothing of a layer but its inputs for the backward pass; otherwise the outputs of its matrices
        are kept.

    Raises:
      ConfigurationError: longer than what a dynamic scaling is defined for here.
    """
    check_length(config, tokens.shape[1])
    tokens, positions, segments = map(jnp.asarray, (tokens, positions, segments))
    turn = rotation(frequencies(config.head_size, config.rope_theta, config.rope_scaling), positions)
    mask = attention_mask(config, positions, segments, positions, segments)
    layer_keys = jax.random.split(key, config.layers) if key is not None and dropout > 0 else None

    def layer(hidden: Array, slices: tuple) -> tuple[Array, None]:
        weights, layer_adapters, layer_masks, layer_key = slices
        block = Block(config, weights, layer_adapters, layer_masks, scale=scale, dropout=dropout)
        return block(hidden, turn, mask, key=layer_key)[0], None

    # The backward pass computes norms, gates and attention weights again rather than remember them: as fast as remembering
    # all, with half the memory. Inside a scan the compiler cannot merge the two computations, so nothing must prevent it.
    kept = None if rematerialise else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    layer = jax.checkpoint(layer, prevent_cse=False, policy=kept)
    embedded = jnp.asarray(frozen["embed"])[tokens]
    hidden, _ = jax.lax.scan(layer, embedded, (frozen["blocks"], adapters, masks, layer_keys))
    return RMSNorm(frozen["norm"], config.norm_epsilon)(hidden)


def empty_cache(config: LlamaConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """Returns a cache for `slots` tokens of each of `batch` sequences."""
    store = jnp.zeros((config.layers, batch, slots, config.key_value_heads, config.head_size), dtype)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return Cache(store, store, empty, empty)


def forward_cached(
    config: LlamaConfig,
    frozen: Mapping,
    adapters: PyTree,
    masks: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: Cache,
    slot: Int[Array, ""] | int,
    *,
    scale: float = 1.0,
) -> tuple[Float[Array, "B T d"], Cache]:
    """As `forward` for T further tokens, which see those in the cache and are put into its slots from `slot` on."""
    check_length(config, cache.positions.shape[1])
    turn = rotation(frequencies(config.head_size, config.rope_theta, config.rope_scaling), positions)
    seen_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
    seen_segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, slot, axis=1)
    mask = attention_mask(config, positions, segments, seen_positions, seen_segments)

    def layer(hidden: Array, slices: tuple) -> tuple[Array, Any]:
        weights, layer_adapters, layer_masks, keys, values = slices
        block = Block(config, weights, layer_adapters, layer_masks, scale=scale, dropout=0.0)
        return block(hidden, turn, mask, (keys, values, slot))

    embedded = jnp.asarray(frozen["embed"])[tokens]
    slices = (frozen["blocks"], adapters, masks, cache.keys, cache.values)
    hidden, (keys, values) = jax.lax.scan(layer, embedded, slices)
    return RMSNorm(frozen["norm"], config.norm_epsilon)(hidden), Cache(keys, values, seen_positions, seen_segments)


def check_length(config: LlamaConfig, length: int) -> None:
    """Checks that a sequence is not too long for attention or the rotary scaling.

    Raises:
      ConfigurationError: it is. With dynamic scaling all frequencies would depend on the longest sequence of the batch.
    """
    if length > LONGEST:
        raise ConfigurationError(
            f"sequences of {length} tokens; at most {LONGEST} are supported, since attention takes their square. Lower "
            "text.cut_off or the number of new tokens."
        )
    if scaling_type(config.rope_scaling) == "dynamic" and length > config.maximum_positions:
        raise ConfigurationError(
            f"sequences of {length} tokens; with dynamic rotary scaling at most {config.maximum_positions} are supported. "
            "Shorten them."
        )


def logits(config: LlamaConfig, frozen: Mapping, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch V"]:
    """Returns the scores of all next tokens, in float32."""
    equation, head = ("...d,vd->...v", frozen["embed"]) if config.tied else ("...d,dv->...v", frozen["head"]["kernel"])
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.einsum(equation, hidden, head, preferred_element_type=wide)


def abstract_weights(config: LlamaConfig, dtype: Any = jnp.float32) -> dict:
    """Returns shapes and types of the base weights, without any memory."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    blocks: dict[str, Any] = {"input_norm": array(config.layers, config.width)}
    biased = {"q_proj", "k_proj", "v_proj"} if config.attention_bias else set()
    biased |= {"o_proj"} if config.output_bias else set()
    for name, (inputs, outputs) in config.projections().items():
        blocks[name] = {"kernel": array(config.layers, inputs, outputs)}
        if name in biased:
            blocks[name]["bias"] = array(config.layers, outputs)
    blocks["post_norm"] = array(config.layers, config.width)
    weights = {"embed": array(config.vocabulary, config.width), "blocks": blocks, "norm": array(config.width)}
    if not config.tied:
        weights["head"] = {"kernel": array(config.width, config.vocabulary)}
    return weights


def split_axes(config: LlamaConfig, parts: int) -> dict:
    """Returns of each base weight the axis along which `parts` devices can share it, or None where each needs all of it.

    Source: Shoeybi et al., "Megatron-LM", 2019: what enters a layer is whole on every device; the outputs of q, k, v, gate
    and up are split, and so are the inputs of o and down, whose partial products are summed. Attention is split by whole
    heads, the embedding and the head by vocabulary. What does not divide evenly is not split.
    """
    by_output, by_input = {"kernel": 2, "bias": 1}, {"kernel": 1}
    pieces = {  # how many there are to deal, and how each array is cut
        "q_proj": (config.heads, by_output),
        "k_proj": (config.key_value_heads, by_output),
        "v_proj": (config.key_value_heads, by_output),
        "o_proj": (config.heads, by_input),
        "gate_proj": (config.hidden, by_output),
        "up_proj": (config.hidden, by_output),
        "down_proj": (config.hidden, by_input),
        "embed": (config.vocabulary, {"embed": 0}),
        "head": (config.vocabulary, {"kernel": 1}),
    }

    def axis(path: tuple, leaf: jax.ShapeDtypeStruct) -> int | None:
        keys = [entry.key for entry in path]
        owner = keys[1] if keys[0] == "blocks" else keys[0]
        count, axes = pieces.get(owner, (0, {}))
        return axes.get(keys[-1]) if count % parts == 0 else None

    return jax.tree.map_with_path(axis, abstract_weights(config))


def initial_weights(config: LlamaConfig, key: Key[Array, ""], dtype: Any = jnp.float32) -> dict:
    """Returns random base weights for tests and timing.

    Kernels and the embedding are N(0, 1 / inputs); norms and biases are random too, so that a swapped array shows.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_weights(config, dtype))
    keys = jax.random.split(key, len(leaves))
    arrays = [_initial(path[-1].key, leaf, one) for (path, leaf), one in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, arrays)


def _initial(name: str, leaf: jax.ShapeDtypeStruct, key: Key[Array, ""]) -> Array:
    if name.endswith("norm"):
        return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5).astype(leaf.dtype)
    inputs = leaf.shape[-1] if name in ("embed", "bias") else leaf.shape[-2]
    return (jax.random.normal(key, leaf.shape) * inputs**-0.5).astype(leaf.dtype)
