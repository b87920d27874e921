"""A tiny Llama with adapters and masks."""

import dataclasses

import jax
import numpy as np

from fedjax_qp.models.language import lora
from fedjax_qp.models.language.llama import LlamaConfig, forward, initial_weights

CONFIG = LlamaConfig(
    vocabulary=64,
    width=16,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_size=6,  # not width / heads
    hidden=24,
    rope_theta=100.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
)


# Compiled once for each architecture and shape.
run = jax.jit(forward, static_argnums=0, static_argnames="rematerialise")


def changed(**options) -> LlamaConfig:
    return dataclasses.replace(CONFIG, **options)


def one_record(length: int, batch: int = 2, seed: int = 0):
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocabulary, (batch, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


FROZEN = initial_weights(CONFIG, jax.random.key(0))


def some_adapters(rank: int = 3, targets="*_proj"):
    """Adapters after some training: b is not 0."""
    adapters = lora.init_adapters(CONFIG, jax.random.key(1), rank, targets)
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(adapters)))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)


def some_masks(adapters, share: float = 0.6):
    keys = iter(jax.random.split(jax.random.key(3), 2 * len(adapters)))
    return jax.tree.map(lambda x: jax.random.bernoulli(next(keys), share, x.shape), adapters)
