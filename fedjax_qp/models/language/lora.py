"""Low-rank adapters with masks, and what one does with a tree of them.

Source: Hu et al., "LoRA", ICLR 2022: y = x W + scale · dropout(x) A B with W frozen and scale = alpha / rank. PerFIT (Zhang
et al., 2024) masks single entries of A and B.

Adapters are a dict {"q_proj": {"a": [layers, inputs, rank], "b": [layers, rank, outputs]}, …}, masks the same tree of bools.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedjax_qp.registry import ConfigurationError

Adapters = dict[str, dict[str, Any]]

# Entries of a client's adapters are counted, ranked and laid out flat in int32.
MOST_ENTRIES = 2**31 - 1


class Adaptable(Protocol):
    """What adapters must know of a model: its number of layers and their matrices."""

    @property
    def layers(self) -> int: ...

    def projections(self) -> dict[str, tuple[int, int]]: ...


class Mask(nnx.Variable):
    """Which entries of an adapter exist: bools, carried per client, never trained."""


class MaskedLoRA(nnx.Module):
    """The low-rank correction of one matrix of one layer; masked entries are 0 and get a gradient of exactly 0."""

    def __init__(
        self, adapter: Mapping[str, Array], masks: Mapping[str, Array] | None, *, scale: float, dropout: float = 0.0
    ):
        """Wraps the arrays.

        Args:
          adapter: a [inputs, rank] and b [rank, outputs].
          masks: bools of the same shapes; None where every entry exists.
          scale: alpha / rank.
          dropout: share of the inputs that is dropped when a key is given.
        """
        self.a, self.b = nnx.LoRAParam(adapter["a"]), nnx.LoRAParam(adapter["b"])
        self.mask_a, self.mask_b = (Mask(masks["a"]), Mask(masks["b"])) if masks is not None else (None, None)
        self.scale, self.dropout = scale, dropout

    def __call__(
        self, inputs: Float[Array, "*batch inputs"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch outputs"]:
        """Returns what is added to the frozen matrix's outputs, in the adapter's type.

        Args:
          inputs: [..., inputs], of the base's type.
          key: for dropout; None keeps all.
        """
        a = _masked(self.a[...], self.mask_a)
        b = _masked(self.b[...], self.mask_b)
        inputs = inputs.astype(a.dtype)
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(key, 1 - self.dropout, inputs.shape)
            inputs = jnp.where(kept, inputs / (1 - self.dropout), 0)
        return (inputs @ a) @ (self.scale * b)


def _masked(values: Array, mask: Mask | None) -> Array:
    return values if mask is None else jnp.where(mask[...], values, 0)


def select_targets(config: Adaptable, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the matrices that get an adapter, in the model's order.

    Args:
      targets: names, globs ("*_proj") or regular expressions ("[qv]_proj"); each must match a whole name.

    Raises:
      ConfigurationError: one of them matches nothing, or stands twice.
    """
    names = tuple(config.projections())
    patterns = (targets,) if isinstance(targets, str) else tuple(targets)
    twice = [pattern for pattern in dict.fromkeys(patterns) if patterns.count(pattern) > 1]
    if twice:
        raise ConfigurationError(
            f"LoRA targets {patterns}: {', '.join(map(repr, twice))} stands twice: name each once."
        )
    unused = [pattern for pattern in patterns if not any(_matches(pattern, name) for name in names)]
    if unused or not patterns:
        raise ConfigurationError(
            f"LoRA targets {patterns}: {', '.join(map(repr, unused)) or 'the empty list'} matches no matrix. "
            f"Valid: {', '.join(names)}, or patterns such as '*_proj' and '[qv]_proj'."
        )
    return tuple(name for name in names if any(_matches(pattern, name) for pattern in patterns))


def _matches(pattern: str, name: str) -> bool:
    if fnmatch.fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # a glob that is no regular expression
        return False


def adapter_shapes(config: Adaptable, rank: int, targets: str | Sequence[str]) -> dict[str, dict[str, tuple]]:
    """Returns the shapes of the adapters.

    Raises:
      ConfigurationError: a target matches nothing, or the rank is below 1 or larger than any of the matrices can use.
    """
    sizes = {name: config.projections()[name] for name in select_targets(config, targets)}
    largest = max(min(size) for size in sizes.values())
    if not 1 <= rank <= largest:
        raise ConfigurationError(
            f"LoRA rank = {rank} (model.rank · the algorithm's factor on it) must be 1 to {largest}, the smaller side of the "
            f"largest matrix among {', '.join(sizes)}: choose another model.rank or factor."
        )
    entries = config.layers * rank * sum(inputs + outputs for inputs, outputs in sizes.values())
    if entries > MOST_ENTRIES:
        raise ConfigurationError(
            f"adapters of rank {rank} on {', '.join(sizes)} have {entries:,} entries for a client; at most {MOST_ENTRIES:,} "
            "are supported: lower model.rank or the algorithm's factor on it, or name fewer model.targets."
        )
    return {
        name: {"a": (config.layers, inputs, rank), "b": (config.layers, rank, outputs)}
        for name, (inputs, outputs) in sizes.items()
    }


def init_adapters(config: Adaptable, key: Key[Array, ""], rank: int, targets: str | Sequence[str]) -> Adapters:
    """Returns new adapters in float32, which change nothing yet: a ~ U(±1/√inputs) as in PEFT, b = 0.

    Raises:
      ConfigurationError: see `adapter_shapes`.
    """
    shapes = adapter_shapes(config, rank, targets)
    adapters: Adapters = {}
    for key_of_target, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        bound = shape["a"][1] ** -0.5
        a = jax.random.uniform(key_of_target, shape["a"], jnp.float32, minval=-bound, maxval=bound)
        adapters[name] = {"a": a, "b": jnp.zeros(shape["b"], jnp.float32)}
    return adapters


def apply_masks(adapters: Adapters, masks: PyTree) -> Adapters:
    """Sets the entries that do not exist to 0; masks () changes nothing."""
    return jax.tree.map(lambda values, mask: jnp.where(mask, values, 0), adapters, masks) if masks else adapters


def merge(frozen: dict, adapters: Adapters, scale: float, masks: PyTree = ()) -> dict:
    """Folds adapters into the base, so that it alone computes what both did; the other arrays are shared, not copied.

    Args:
      frozen: base weights, see `fedjax_qp.models.language.llama`.
      adapters: for this base.
      scale: alpha / rank.
      masks: which entries exist, or ().

    Returns:
      New base weights of the same types.
    """
    products = {
        name: scale * jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"])
        for name, adapter in apply_masks(adapters, masks).items()
    }
    return changed(frozen, products)


def changed(frozen: Any, changes: PyTree) -> Any:
    """The base with changes [layers, inputs, outputs] added to the matrices they name; changes () leave it alone."""
    if not changes:
        return frozen
    blocks = dict(frozen["blocks"])
    for name, change in changes.items():
        kernel = blocks[name]["kernel"]
        blocks[name] = {**blocks[name], "kernel": (kernel + change).astype(kernel.dtype)}
    return {**frozen, "blocks": blocks}


def count(tree: PyTree) -> Int[Array, ""] | int:
    """Returns the number of entries of adapters, or of the entries that exist by their masks."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.sum() if leaf.dtype == bool else leaf.size for leaf in leaves)


def product_share(masks: Adapters) -> Float[Array, ""]:
    """Returns the share of the products a[i, k]·b[k, j], of which the change to the base is the sum, that masks leave.

    Masks that keep half of a and half of b at random leave a quarter; two whole ranks out of four leave half.
    """
    kept = sum((mask["a"].sum(-2).astype(float) * mask["b"].sum(-1)).sum() for mask in masks.values())
    # A float: of a model of 7B parameters these are more than an int32 can count.
    return jnp.asarray(kept / float(sum(mask["a"].size * mask["b"].shape[-1] for mask in masks.values())))


def empty_modules(masks: Adapters) -> dict[str, Bool[Array, "layers"]]:
    """Tells for each target and layer whether its mask leaves nothing at all of the adapter."""
    return {name: ~(mask["a"].any((-2, -1)) | mask["b"].any((-2, -1))) for name, mask in masks.items()}


class DeadEntries(NamedTuple):
    """Numbers of entries that exist but cannot matter, since the other side of their rank is pruned away."""

    a: Int[Array, ""]
    b: Int[Array, ""]


def dead_entries(masks: Adapters) -> DeadEntries:
    """Counts entries of a whose rank has no entry of b left, and the reverse."""

    def total(numbers: Iterable[Array]) -> Int[Array, ""]:
        return sum(numbers, start=jnp.zeros((), jnp.int32))

    sides = [(mask["a"].sum(-2), mask["b"].sum(-1)) for mask in masks.values()]  # entries per rank, [layers, rank]
    return DeadEntries(
        a=total(jnp.where(b == 0, a, 0).sum() for a, b in sides),
        b=total(jnp.where(a == 0, b, 0).sum() for a, b in sides),
    )
