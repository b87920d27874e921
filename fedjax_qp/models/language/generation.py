"""Text continuation token by token, with the keys and values of earlier tokens kept."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from fedjax_qp.federated import Params
from fedjax_qp.models.language.llama import LlamaConfig, check_length, empty_cache, forward_cached, logits
from fedjax_qp.models.language.lora import changed
from fedjax_qp.registry import ConfigurationError


def generate(
    config: LlamaConfig,
    frozen: Mapping,
    params: Params,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    new_tokens: int,
    stop: int | Sequence[int] | None,
    lengths: Int[Array | np.ndarray, "B"] | None = None,
    temperature: float = 0.0,
    key: Key[Array, ""] | None = None,
    scale: float = 1.0,
) -> Int[Array, "B new_tokens"]:
    """Continues prompts.

    Args:
      config: the base's architecture.
      frozen: base weights.
      params: adapters, masks and changes of the base; `Params((), ())` for the base alone.
      tokens: prompts, the shorter ones filled up on the right with anything.
      new_tokens: how many to write, at least 1.
      stop: token or tokens that end a text; None writes all `new_tokens`.
      lengths: of the prompts, each at least 1; None where all have length T.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
      key: for drawing; needed where temperature > 0.
      scale: of the adapters, alpha / rank.

    Returns:
      The new tokens; a text that has ended is filled up with the (first) stop token.

    Raises:
      ConfigurationError: a number is out of range, or a key is missing.
    """
    if new_tokens < 1:
        raise ConfigurationError(f"new_tokens = {new_tokens}; it must be at least 1.")
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(
            f"temperature = {temperature}; it must be at least 0 and finite, and 0 takes the likeliest token."
        )
    if temperature > 0 and key is None:
        raise ConfigurationError(f"temperature = {temperature} needs a key; give one, or temperature 0.")
    if tokens.shape[1] < 1:
        raise ConfigurationError(
            "the prompt is empty; begin with at least one token, e.g. the beginning-of-text token."
        )
    check_length(config, tokens.shape[1] + new_tokens)
    sizes = np.full(tokens.shape[0], tokens.shape[1]) if lengths is None else np.asarray(lengths)
    _check_prompts(np.asarray(tokens), sizes, config.vocabulary)
    stops = (stop,) if isinstance(stop, int) else tuple(stop or ())
    return _generate(
        config,
        changed(frozen, params.statistics),
        params._replace(statistics=()),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
        jnp.asarray(stops, jnp.int32),
        temperature,
        key if temperature > 0 else None,
        scale,
        new_tokens=new_tokens,
    )


def _check_prompts(tokens: np.ndarray, lengths: np.ndarray, vocabulary: int) -> None:
    """Checks lengths and tokens, before they are narrowed; what fills a prompt up may be anything."""
    longest = tokens.shape[1]
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= longest:
        raise ConfigurationError(f"prompts of {lengths.min()} to {lengths.max()} tokens must have 1 to {longest}.")
    given = tokens[np.arange(longest) < lengths[:, None]]
    if given.size and not 0 <= given.min() <= given.max() < vocabulary:
        raise ConfigurationError(
            f"token ids from {given.min()} to {given.max()} must be 0 to {vocabulary - 1}, the rows of the embedding: "
            "take this model's own tokenizer."
        )


@partial(jax.jit, static_argnums=0, static_argnames="new_tokens")
def _generate(
    config: LlamaConfig,
    frozen: Mapping,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    stops: Int[Array, "stops"],
    temperature: Float[Array, ""],
    key: Key[Array, ""] | None,
    scale: Any,
    *,
    new_tokens: int,
) -> Int[Array, "B new_tokens"]:
    batch, prompt = tokens.shape
    rows = jnp.arange(batch)
    run = partial(forward_cached, config, frozen, params.trainable, params.masks, scale=scale)

    def choose(hidden: Float[Array, "B d"], number: Int[Array, ""] | int) -> Int[Array, "B"]:
        scores = logits(config, frozen, hidden)
        if key is None:
            return scores.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, number), scores / temperature).astype(jnp.int32)

    positions = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))
    cache = empty_cache(config, batch, prompt + new_tokens, jnp.asarray(frozen["embed"]).dtype)
    real = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = run(tokens, positions, real, cache, 0)
    first = choose(hidden[rows, lengths - 1], 0)
    fill = stops[0] if stops.size else jnp.zeros((), jnp.int32)
    written = jnp.full((batch, new_tokens), fill).at[:, 0].set(first)

    def unfinished(state: tuple) -> Array:
        number, _, _, ended = state
        return (number < new_tokens) & ~ended.all()

    def step(state: tuple) -> tuple:
        number, written, cache, ended = state
        previous = written[:, number - 1]
        position = lengths + number - 1
        ones = jnp.ones((batch, 1), jnp.int32)
        # All prompts go on in the same slots, behind the longest; where a token stands is told by its position.
        hidden, cache = run(previous[:, None], position[:, None], ones, cache, prompt + number - 1)
        chosen = jnp.where(ended, fill, choose(hidden[:, 0], number))
        return number + 1, written.at[:, number].set(chosen), cache, ended | jnp.isin(chosen, stops)

    state = (jnp.ones((), jnp.int32), written, cache, jnp.isin(first, stops))
    return jax.lax.while_loop(unfinished, step, state)[1]
