"""Streams of random numbers that must not coincide, on the host and in the compiled program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_qp.federated import client_key, initial_key, round_keys
from fedjax_qp.streams import Stream, generator


def test_every_use_round_and_client_has_numbers_of_its_own() -> None:
    names = list(itertools.product((0, 1, 5), Stream, (0, 1, 2), (0, 1, 2)))
    drawn = {
        tuple(generator(seed, stream, round=round, client=client).integers(0, 2**62, 2).tolist())
        for seed, stream, round, client in names
    }
    assert len(drawn) == len(names)


def test_a_stream_is_numpys_for_its_four_numbers() -> None:
    expected = np.random.default_rng([7, 3, 1, 2]).random(4)
    np.testing.assert_array_equal(generator(7, Stream.BATCHES, round=3, client=2).random(4), expected)


def test_no_key_of_a_round_initialised_the_model() -> None:
    """A split gives the keys that folding in 0, 1, 2 gives: the initial model's parameters are drawn from such folds."""
    root = jax.random.key(0)
    initial = [initial_key(root), *(jax.random.fold_in(initial_key(root), count) for count in range(20))]
    of_rounds = [key for round in range(4) for key in round_keys(root, jnp.int32(round))]
    of_rounds += [client_key(of_rounds[1], jnp.int32(client), 0) for client in range(3)]
    data = {tuple(jax.random.key_data(key).tolist()) for key in initial}
    assert len(data) == len(initial)
    assert not data & {tuple(jax.random.key_data(key).tolist()) for key in of_rounds}
