"""A tiny language federation: a random base of one layer, low-rank adapters, eight clients with a grammar of their own.

Every client's tokens follow its own cycle through the vocabulary with a few random jumps, so that there is something to learn
and something personal about it. Two records share a sequence, and most sequences end in padding.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Numpy arrays stand in for JAX arrays, and named tuples are made from leaves.

from functools import cache

import jax
import numpy as np
import optax

from fedjax_qp.data.text.sequences import Sequences
from fedjax_qp.engine import PersonalTests, cut_test_set
from fedjax_qp.federated import Model
from fedjax_qp.models.language.llama import LlamaConfig, initial_weights
from fedjax_qp.models.language.model import language_model

VOCABULARY, LENGTH, RANK = 32, 16, 2
SIZES = [3, 20, 8, 14, 5, 11, 4, 17]
CONFIG = LlamaConfig(
    vocabulary=VOCABULARY,
    width=8,
    layers=1,
    heads=2,
    key_value_heads=1,
    head_size=4,
    hidden=16,
    rope_theta=1e4,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=True,
)
# The large epsilon keeps Adam from making something of gradients that are 0 but for rounding.
OPTIMIZER = optax.adamw(0.02, eps=1e-3, weight_decay=0.1)


@cache
def language(expansion: int = 1) -> Model:
    rank = expansion * RANK
    model = language_model(CONFIG, rank=rank, alpha=2.0 * rank, targets=("q_proj", "v_proj"))
    # Compiled functions are traced once, however often a program contains them.
    return model._replace(loss=jax.jit(model.loss), evaluate=jax.jit(model.evaluate))


@cache
def base_weights() -> dict:
    return jax.device_get(initial_weights(CONFIG, jax.random.key(7)))


def sequences_of(client: int, count: int, seed: int) -> Sequences:
    """Sequences of one client's grammar; records of 5 to 9 tokens, all but the first two of each count."""
    cycle = np.random.default_rng(client).permutation(VOCABULARY)
    generator = np.random.default_rng((client, seed))
    arrays = Sequences(*(np.zeros((count, LENGTH), np.int32) for _ in range(3)), np.zeros((count, LENGTH), bool))
    for row in range(count):
        start = 0
        for record in (1, 2):
            size = min(int(generator.integers(5, 10)), LENGTH - start)
            token = generator.integers(VOCABULARY)
            for place in range(size):
                arrays.tokens[row, start + place] = token
                token = generator.integers(VOCABULARY) if generator.random() < 0.1 else cycle[token]
            span = slice(start, start + size)
            arrays.segments[row, span] = record
            arrays.positions[row, span] = np.arange(size)
            arrays.targets[row, span] = np.arange(size) >= 2
            start += size
    return arrays


def joined(parts: list[Sequences]) -> Sequences:
    return Sequences(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


@cache
def training_set() -> Sequences:
    return joined([sequences_of(client, size, seed=0) for client, size in enumerate(SIZES)])


def personal_tests(batch: int = 3, batches: int = 2) -> PersonalTests:
    """Five sequences a client in two batches of three: the last place is padding."""
    count = batch * batches - 1
    tests = [cut_test_set(sequences_of(client, count, seed=1), batch) for client in range(len(SIZES))]
    return PersonalTests(*jax.tree.map(lambda *leaves: np.stack(leaves), *tests))


def common_test() -> Sequences:
    return joined([sequences_of(client, 3, seed=2) for client in range(len(SIZES))])
