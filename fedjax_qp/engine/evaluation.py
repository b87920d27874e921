"""Evaluation inside the program: the server's model on the common test set, each client's on its own test part."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import Array, Bool, Int, PyTree

from fedjax_qp.engine.arrays import put, sum_over_devices, take, zeros
from fedjax_qp.federated import Batch, FederatedState, Model
from fedjax_qp.registry import ConfigurationError


class TestSet(NamedTuple):
    """Test examples cut into batches for the device."""

    __test__ = False  # the name is the field's; it is not a test case

    examples: PyTree  # [batches, B, ...]
    mask: Bool[Array | np.ndarray, "batches B"]


def evaluate(model: Model, frozen: PyTree, params: PyTree, test: TestSet, axis: str | None) -> dict[str, Array]:
    """Sums of the model's metrics over the whole test set; every device takes its share of the batches."""
    batches = len(test.mask)
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    device = 0 if axis is None else jax.lax.axis_index(axis)

    def add(turn: Int[Array, ""], sums: dict[str, Array]) -> dict[str, Array]:
        index = turn * devices + device
        examples = take(test.examples, jnp.minimum(index, batches - 1))
        mask = test.mask[jnp.minimum(index, batches - 1)] & (index < batches)
        return jax.tree.map(jnp.add, sums, model.evaluate(frozen, params, Batch(examples, mask)))

    first = Batch(take(test.examples, 0), test.mask[0])
    sums = zeros(jax.eval_shape(model.evaluate, frozen, params, first))
    return sum_over_devices(axis, jax.lax.fori_loop(0, -(-batches // devices), add, sums))


def even_batches(count: int, most: int) -> tuple[int, int]:
    """The fewest batches of at most `most` that hold all examples, and the smallest common size for them."""
    batches = max(-(-count // most), 1)
    return batches, max(-(-count // batches), 1)


def cut_test_set(examples: PyTree, batch_size: int) -> TestSet:
    """Cuts arrays [N, ...] into even batches of at most `batch_size`, the last one padded."""
    count = len(jax.tree.leaves(examples)[0])
    return _cut(examples, *even_batches(count, batch_size))


def _cut(examples: PyTree, batches: int, size: int) -> TestSet:
    count = len(jax.tree.leaves(examples)[0])

    def cut(leaf: np.ndarray) -> np.ndarray:
        padded = np.concatenate([leaf, np.zeros((batches * size - count, *leaf.shape[1:]), leaf.dtype)])
        return padded.reshape(batches, size, *leaf.shape[1:])

    return TestSet(jax.tree.map(cut, examples), cut(np.ones(count, bool)))


class PersonalTests(NamedTuple):
    """Every client's own test examples, cut into the same number of batches for all; padded ones have mask False."""

    examples: PyTree  # [K, batches, B, ...]
    mask: Bool[Array | np.ndarray, "K batches B"]


def cut_client_tests(
    tests: Sequence[PyTree], batch_size: int, *, remedy: str = "choose clients of more even size"
) -> PersonalTests:
    """Cuts every client's test examples, arrays [n, ...], into equally many batches of at most `batch_size`.

    Args:
      remedy: what to do where this takes too much memory, since every client takes as much as the one with most tests.

    Raises:
      ConfigurationError: it would take more than half of this machine's memory.
    """
    longest = max(len(jax.tree.leaves(examples)[0]) for examples in tests)
    batches, size = even_batches(longest, batch_size)
    of_example = 1 + sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tests[0]))
    needed, memory = len(tests) * batches * size * of_example, psutil.virtual_memory().total
    if needed > memory / 2:  # while they are stacked, they are there twice
        raise ConfigurationError(
            f"the clients' own tests take {needed / 2**30:,.1f} GiB, since each of {len(tests):,} clients gets room for "
            f"{longest:,}, as many as the largest of them has, but at most half of this machine's {memory / 2**30:,.1f} "
            f"GiB may be taken: {remedy}."
        )
    cut = [_cut(examples, batches, size) for examples in tests]
    return PersonalTests(*jax.tree.map(lambda *leaves: np.stack(leaves), *cut))


def evaluate_clients(
    model: Model,
    frozen: PyTree,
    view: Callable,
    state: FederatedState,
    tests: PersonalTests,
    lanes: int,
    axis: str | None,
) -> dict[str, Array]:
    """Sums of the model's metrics for each client on its own test part.

    Args:
      view: `(server, memory) -> Params`, the model a client is evaluated with.
      state: holds the memories of all K clients.
      lanes: clients evaluated side by side on one device.

    Returns:
      Arrays [K, ...].
    """
    clients, batches = tests.mask.shape[:2]
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    device = 0 if axis is None else jax.lax.axis_index(axis)
    tests = jax.tree.map(jnp.asarray, tests)

    def one_client(client: Int[Array, ""]) -> dict[str, Array]:
        params = view(state.server, take(state.clients, client))

        def add(index: Int[Array, ""], sums: dict[str, Array]) -> dict[str, Array]:
            batch = Batch(take(take(tests.examples, client), index), tests.mask[client, index])
            return jax.tree.map(jnp.add, sums, model.evaluate(frozen, params, batch))

        return jax.lax.fori_loop(0, batches, add, zeros(one_sum))

    def turn(index: Int[Array, ""], sums: dict[str, Array]) -> dict[str, Array]:
        members = (index * devices + device) * lanes + jnp.arange(lanes)
        return put(sums, members, jax.vmap(one_client)(jnp.minimum(members, clients - 1)))

    first = Batch(take(take(tests.examples, 0), 0), tests.mask[0, 0])
    one_params = jax.eval_shape(lambda: view(state.server, take(state.clients, jnp.zeros((), jnp.int32))))
    one_sum = jax.eval_shape(model.evaluate, frozen, one_params, first)
    turns = -(-clients // (devices * lanes))
    return sum_over_devices(axis, jax.lax.fori_loop(0, turns, turn, zeros(one_sum, clients)))
