"""Cross-entropy of next tokens under a frozen head, without ever holding the logits of all tokens.

A vocabulary of 50,000 makes logits by far the largest array of a step. So tokens pass the head in chunks; since the head is
frozen, the gradient with respect to a token's hidden state is computed on the way, while its logits exist, and nothing is
computed twice. Only tokens that count are sent through: they are sorted to the front, and the loop ends after them. Under
`vmap` over clients all clients' tokens form one list, so that chunks stay large and full.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# 128 MiB of float32 logits at a time; several of that size live at once.
LOGITS_AT_A_TIME = 2**25


class TokenLosses(NamedTuple):
    """Of each token; 0 and False where it does not count."""

    loss: Float[Array, "*batch"]  # negative log likelihood
    correct: Bool[Array, "*batch"]  # the likeliest token was the right one


def token_losses(
    hidden: Float[Array, "*batch d"],
    head: Float[Array, "V d"] | Float[Array, "d V"],
    labels: Int[Array, "*batch"],
    counts: Bool[Array, "*batch"],
    *,
    tied: bool,
    chunk: int | None = None,
) -> TokenLosses:
    """Returns each token's loss; differentiable with respect to `hidden` only, the head gets no gradient.

    Args:
      hidden: last hidden states, normalised.
      head: the embedding [V, d] where `tied`, else the head's kernel [d, V].
      labels: the right next tokens.
      counts: False for tokens that do not count; nothing is computed for them.
      tied: see `head`.
      chunk: tokens that pass the head at a time; by default what LOGITS_AT_A_TIME allows.
    """
    vocabulary = head.shape[0] if tied else head.shape[1]
    chunk = chunk or max(128, LOGITS_AT_A_TIME // vocabulary // 128 * 128)
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses, correct = _losses_of(tied, chunk)(flat, jnp.asarray(head), labels.reshape(-1), counts.reshape(-1))
    return TokenLosses(losses.reshape(labels.shape), correct.reshape(labels.shape))


@lru_cache
def _losses_of(tied: bool, chunk: int) -> Any:
    values = _over_clients(tied, chunk, gradient=False)
    values_and_gradients = _over_clients(tied, chunk, gradient=True)

    @jax.custom_vjp
    def losses(hidden: Array, head: Array, labels: Array, counts: Array) -> tuple[Array, Array]:
        return values(hidden, head, labels, counts)

    def forward(hidden: Array, head: Array, labels: Array, counts: Array) -> tuple[Any, Array]:
        loss, correct, gradient = values_and_gradients(hidden, head, labels, counts)
        return (loss, correct), gradient

    def backward(gradient: Array, cotangents: tuple) -> tuple:
        return (cotangents[0][:, None].astype(gradient.dtype) * gradient, None, None, None)

    losses.defvjp(forward, backward)
    return losses


def _over_clients(tied: bool, chunk: int, *, gradient: bool) -> Any:
    """The chunked computation, with a rule that turns a vmap over clients into one longer list of tokens."""

    @jax.custom_batching.custom_vmap
    def compute(hidden: Array, head: Array, labels: Array, counts: Array) -> tuple[Array, ...]:
        return _chunked(hidden, head, labels, counts, tied=tied, chunk=chunk, gradient=gradient)

    @compute.def_vmap
    def rule(size: int, batched: list[bool], *operands: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        hidden, head, labels, counts = operands
        outputs: tuple[Array, ...]
        if batched[1]:  # every client has a head of its own: nothing to share

            def each(index: Array) -> tuple[Array, ...]:
                return compute(*(x[index] if mapped else x for x, mapped in zip(operands, batched, strict=True)))

            outputs = jax.lax.map(each, jnp.arange(size))
        else:
            rows = (x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(operands, batched, strict=True))
            hidden, _, labels, counts = (
                x.reshape(-1, *x.shape[2:]) if place != 1 else x for place, x in enumerate(rows)
            )
            outputs = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), compute(hidden, head, labels, counts))
        return outputs, tuple(True for _ in outputs)

    return compute


def _chunked(
    hidden: Float[Array, "N d"],
    head: Array,
    labels: Int[Array, "N"],
    counts: Bool[Array, "N"],
    *,
    tied: bool,
    chunk: int,
    gradient: bool,
) -> tuple[Array, ...]:
    """Returns losses [N], hits [N] and, if asked for, the gradient of each token's loss with respect to its row [N, d]."""
    length = labels.shape[0]
    chunk = min(chunk, length)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    to_logits, to_hidden = ("nd,vd->nv", "nv,vd->nd") if tied else ("nd,dv->nv", "nv,dv->nd")
    # Those that count first; the list is filled up to whole chunks with an index behind the end, which reads and writes
    # nothing.
    order = jnp.argsort(~counts, stable=True)
    order = jnp.pad(order, (0, -length % chunk), constant_values=length)
    total = counts.sum()

    def one_chunk(number: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        places = jax.lax.dynamic_slice_in_dim(order, number * chunk, chunk)
        places = jnp.where(number * chunk + jnp.arange(chunk) < total, places, length)
        rows = hidden.at[places].get(mode="fill", fill_value=0)
        right = labels.at[places].get(mode="fill", fill_value=0)
        logits = jnp.einsum(to_logits, rows, head, preferred_element_type=wide)
        largest = logits.max(-1)
        of_right = jnp.take_along_axis(logits, right[:, None], axis=-1)[:, 0]
        exponentials = jnp.exp(logits - largest[:, None])
        normaliser = exponentials.sum(-1)
        # Ties count as hits, so that no second pass for the argmax is needed.
        found = [largest + jnp.log(normaliser) - of_right, of_right >= largest]
        if gradient:
            # Σ_v p_v head_v − head_right. In the head's type, or the whole head would be converted.
            mean = jnp.einsum(to_hidden, exponentials.astype(head.dtype), head, preferred_element_type=wide)
            of_label = head[right] if tied else head[:, right].T
            found.append((mean / normaliser[:, None] - of_label).astype(hidden.dtype))
        return tuple(result.at[places].set(new, mode="drop") for result, new in zip(results, found, strict=True))

    empty = [jnp.zeros(length, wide), jnp.zeros(length, bool)] + [jnp.zeros_like(hidden)] * gradient
    # A division of integers: the number of chunks that hold a token that counts.
    return jax.lax.fori_loop(0, (total + chunk - 1) // chunk, one_chunk, tuple(empty))
