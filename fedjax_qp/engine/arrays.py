"""Small tools of the engine for trees of arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree


def take(tree: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """One entry of a tree with a leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def gather(tree: PyTree, indices: Int[Array, "..."]) -> PyTree:
    """Entries [...] of a tree with a leading axis; a negative index (padding) gives the first."""
    return jax.tree.map(lambda leaf: leaf[jnp.maximum(indices, 0)], tree)


def put(whole: PyTree, target: Int[Array, "L"], rows: PyTree) -> PyTree:
    """Writes rows [L, ...] to their places; out of range = dropped."""
    return jax.tree.map(lambda leaf, new: leaf.at[target].set(new, mode="drop"), whole, rows)


def select(condition: Bool[Array, "L"], new: PyTree, old: PyTree) -> PyTree:
    def select(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, new, old)


def zeros(shapes: PyTree, *leading: int) -> PyTree:
    """Zeros of the given shapes behind the `leading` axes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leading + leaf.shape, leaf.dtype), shapes)


def sum_over_devices(axis: str | None, tree: PyTree) -> PyTree:
    """Sums over the devices; for bools, whether any device has it."""
    if axis is None:
        return tree
    as_number = jax.tree.map(lambda leaf: leaf.astype(jnp.int32) if leaf.dtype == bool else leaf, tree)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), jax.lax.psum(as_number, axis), tree)
