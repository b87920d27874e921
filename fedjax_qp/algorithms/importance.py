"""PerFIT's search: which entries of an expanded LoRA module a client keeps.

Source: arXiv 2402.16919 (PerFIT): Taylor importance, pruned iteratively back to the original number of parameters. The
paper's code is not public; the schedule, the exact top-k and the order of ties are our formulation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fedjax_qp.models.language.lora import Adapters


def taylor_scores(adapters: PyTree, gradient: PyTree) -> Float[Array, "P"]:
    """|θ_p · ∂L/∂θ_p| of every entry, flattened in tree order."""
    return jnp.abs(flatten(adapters) * flatten(gradient))


def by_rank(scores: Float[Array, "P"], like: Adapters) -> Float[Array, "P"]:
    """Gives every entry the mean score of its rank, a column of a and the row of b that it meets.

    All entries of a rank then tie, so that the best ranks are kept whole, but for the last, which may not fit a budget.
    Our own control of the paper's search over single entries, which leaves far fewer products a·b.
    """
    means = {}
    for name, sides in unflatten(scores, like).items():
        a, b = sides["a"], sides["b"]
        mean = (a.sum(-2) + b.sum(-1)) / (a.shape[-2] + b.shape[-1])  # [layers, rank]
        means[name] = {
            "a": jnp.broadcast_to(mean[:, None, :], a.shape),
            "b": jnp.broadcast_to(mean[..., None], b.shape),
        }
    return flatten(means)


def keep_top(scores: Float[Array, "P"], mask: Bool[Array, "P"], count: Int[Array, ""]) -> Bool[Array, "P"]:
    """The `count` highest scores among the entries of a mask.

    Exact: pruned entries score −1, so they come last, and ties are broken by index.
    """
    order = jnp.argsort(jnp.where(mask, scores, -1), descending=True, stable=True)
    return jnp.zeros(mask.shape, bool).at[order].set(jnp.arange(len(order)) < count)


def schedule(total: int, budget: Int[Array, ""], prunings: int) -> Int[Array, "Q"]:
    """Entries that are kept after each pruning: total·(b/total)^(q/Q) to float32's 7 digits, and exactly b after the last."""
    share = (budget / total) ** (jnp.arange(1, prunings + 1) / prunings)
    counts = jnp.maximum(jnp.ceil(total * share).astype(jnp.int32), budget)
    return counts.at[-1].set(budget)


def flatten(tree: PyTree) -> Array:
    """All entries of a tree of arrays, in tree order."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def unflatten(flat: Array, like: PyTree) -> PyTree:
    """The inverse of `flatten`."""
    leaves, structure = jax.tree.flatten(like)
    parts = []
    start = 0
    for leaf in leaves:
        parts.append(flat[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return jax.tree.unflatten(structure, parts)
