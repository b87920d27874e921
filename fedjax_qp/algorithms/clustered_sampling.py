"""Clustered sampling (CluSamp): one client from each of M clusters, so that cohorts are more alike and nobody is favoured.

Source: Fraboni et al. 2021, "Clustered Sampling: Low-Variance and Improved Representativity for Clients Selection in
Federated Learning" (ICML). M distributions W_1 … W_M over the clients have Σ_k W_k(i) = M·p_i, with p_i = n_i/N the client's
share of the examples. A cohort is one draw from each, and the server averages its M models uniformly, which is unbiased
(proposition 1); a client may be drawn more than once. With all W_k = p this would be multinomial sampling.

Algorithm 1 fills the distributions one after another with the clients by falling size. Algorithm 2 clusters the clients by
how alike their representative gradients are (what a client's model moved by in its last round, 0 before its first) with
Ward's method on the pairwise distances, cuts the tree into groups whose masses Σ M·p_i do not exceed one distribution's,
puts the M heaviest groups into a distribution each, and fills these up with the clients of the others.

Deviations: a client with M·p_i ≥ 1, who fits into no group, first fills whole distributions of its own. A client that was
never drawn is at a right angle to those that were, and at no angle to the others that were not, so that these come together
(an angle to a zero gradient is not defined; the published code sets it to 0). The published code hands the square table of
distances to Ward's method, which takes each client's row in it for a point; here they are the distances. Ties fall by index.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, PyTree
from scipy.cluster.hierarchy import ward
from scipy.spatial.distance import pdist

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import averaging
from fedjax_qp.algorithms.local import LocalState
from fedjax_qp.federated import Algorithm, Client, Model, Params, Sampling

Measure = Literal["angle", "L2", "L1"]
Gradients = Sequence[Float[np.ndarray, "K P"]]  # one array for each of the model's


def fill(table: Int[np.ndarray, "M K"], capacity: int, masses: Int[np.ndarray, "K"], order: list[int]) -> None:
    """Pours the clients' masses, in this order, into the rows that have room, the first one first."""
    row = 0
    for client in order:
        left = int(masses[client])
        while left > 0:
            poured = min(left, capacity - int(table[row].sum()))
            table[row, client] += poured
            left -= poured
            if left > 0:
                row += 1


def by_size(sizes: Int[np.ndarray, "K"], members: int) -> Int[np.ndarray, "M K"]:
    """Algorithm 1: W_k(i)·N, so that rows sum to N and columns to M·n_i."""
    table = np.zeros((members, len(sizes)), np.int64)
    order = np.argsort(-sizes, kind="stable").tolist()
    fill(table, int(sizes.sum()), members * sizes, order)
    return table


def by_similarity(
    sizes: Int[np.ndarray, "K"], members: int, gradients: Gradients, measure: Measure
) -> Int[np.ndarray, "M K"]:
    """Algorithm 2, likewise."""
    capacity = int(sizes.sum())
    whole, masses = np.divmod(members * sizes, capacity)
    table = np.zeros((members, len(sizes)), np.int64)
    own = np.repeat(np.arange(len(sizes)), whole)
    table[np.arange(len(own)), own] = capacity
    shared = table[len(own) :]
    found = sorted(groups(masses, capacity, gradients, measure), key=lambda group: -masses[group].sum())
    for row, group in enumerate(found[: len(shared)]):
        shared[row, group] = masses[group]
    fill(shared, capacity, masses, [client for group in found[len(shared) :] for client in group])
    return table


def groups(masses: Int[np.ndarray, "K"], capacity: int, gradients: Gradients, measure: Measure) -> list[list[int]]:
    """The largest subtrees of Ward's tree whose mass does not exceed the capacity."""
    subtrees = [[client] for client in range(len(masses))]
    if len(masses) == 1:
        return subtrees
    kept = {client: None for client in range(len(masses))}
    for left, right in ward(distances(gradients, measure))[:, :2].astype(int):
        subtrees.append(sorted(subtrees[left] + subtrees[right]))
        if left in kept and right in kept and masses[subtrees[-1]].sum() <= capacity:
            del kept[left], kept[right]
            kept[len(subtrees) - 1] = None
    return [subtrees[node] for node in kept]


def distances(gradients: Gradients, measure: Measure) -> Float[np.ndarray, "pairs"]:
    """Between all pairs of clients, in scipy's condensed form; array by array, so that nothing is copied."""
    if measure == "L1":
        return np.sum([pdist(rows, metric="cityblock") for rows in gradients], axis=0)
    products = np.sum([rows @ rows.T for rows in gradients], axis=0)
    squares = np.diag(products)
    if measure == "L2":
        table = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
    else:
        never = squares == 0
        lengths = np.sqrt(np.where(never, 1, squares))
        table = np.arccos(np.clip(products / np.outer(lengths, lengths), -1, 1))
        table[np.ix_(never, never)] = 0
    return table[np.triu_indices(len(table), 1)]


def draw(table: Int[np.ndarray, "M K"], generator: np.random.Generator) -> Int[np.ndarray, "M"]:
    """One client from each distribution."""
    return np.array([generator.choice(len(row), p=row / row.sum()) for row in table])


@algorithms.register
def clustered_sampling(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    by: Literal["similarity", "size"] = "similarity",
    measure: Measure = "angle",
) -> Algorithm:
    """FedAvg whose cohorts have one client of each cluster of alike clients, for less variance (CluSamp).

    Args:
      by: algorithm 2, or algorithm 1. The former keeps every client's last update, and needs `engine.rounds_per_chunk: 1`.
      measure: how alike two gradients are, for algorithm 2: the angle between them (the paper's choice), their
        Euclidean distance, or the sum of absolute differences.
    """
    average = averaging(model, optimizer, optax.sgd(1.0), weighting="uniform")

    def draw_by_size(sizes: np.ndarray, memories: PyTree, members: int, generator: np.random.Generator) -> np.ndarray:
        return draw(by_size(sizes, members), generator)

    def draw_by_similarity(
        sizes: np.ndarray, memories: PyTree, members: int, generator: np.random.Generator
    ) -> np.ndarray:
        # The distance of two similar gradients is a small difference of large numbers.
        gradients = [np.asarray(leaf, np.float64).reshape(len(sizes), -1) for leaf in jax.tree.leaves(memories)]
        return draw(by_similarity(sizes, members, gradients, measure), generator)

    def finish(shared: Params, carry: LocalState, client: Client) -> tuple:
        upload, _, metrics = average.finish(shared, carry, client)
        return upload, upload.update.trainable, metrics

    if by == "size":
        return average._replace(sampling=Sampling(draw_by_size), unused=("measure",))
    return average._replace(
        init_client=lambda params: jax.tree.map(jnp.zeros_like, params.trainable),
        finish=finish,
        sampling=Sampling(draw_by_similarity, reads_memories=True),
    )
