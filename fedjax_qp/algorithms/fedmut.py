"""FedMut: every client starts from its own mutation of the global model along the last global update.

Source: Hu et al. 2024, "FedMut: Generalized Federated Learning via Stochastic Mutation" (AAAI), and its published code:
w_i = w + α·(v_i^1 g_1, …, v_i^L g_L), where g is the last global update, a layer is one parameter array, and the signs
v_i^l are 1 or −1 + β_t, half of each per layer, with β_t = β_0·max(1 − t/T_b, 0).

Deviations: t counts the rounds before the mutation, so the first mutation has t = 1; in the published code it has t = 0. The
published code mutates all of a model's state, batch norm's running means and variances included; here they are averaged only,
since a mutated variance can fall below zero.

A mutant is a linear combination of two trees, so only its coefficients exist per client; the start model is built when a
lane loads the client, and M models are never stored.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import LocalState, Upload, add, local_training, mean_update, report
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params
from fedjax_qp.watch import Watch

DRIFT_LIMIT = 0.9


class MutationServer(NamedTuple):
    params: Params
    update: PyTree  # g, the last global update of the trainable arrays; zero before the first round
    round: Int[Array, ""]
    references: PyTree  # further directions that FedQP's corrections refer to; () for everything else


class Shared(NamedTuple):
    params: Params
    update: PyTree
    directions: PyTree  # unit-norm trees stacked on a leading axis [R]; () where coefficients of g suffice


class Own(NamedTuple):
    """One client's start model: w + Σ_l coefficients_l·g_l + Σ_j multipliers_j·directions_j."""

    coefficients: Float[Array, "L"]
    multipliers: Float[Array, "R"]


def layer_squared_norms(tree: PyTree) -> Float[Array, "L"]:
    """‖g_l‖² of every parameter array, in the order of the tree's leaves."""
    return jnp.stack([jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)])


def backward_share(beta0: float, mutation_rounds: int, round: Int[Array, ""]) -> Float[Array, ""]:
    """β_t: by how much the backward sign −1 is shortened in this round."""
    return beta0 * jnp.maximum(1 - round / mutation_rounds, 0)


def active_mutants(members: int) -> Bool[Array, "M"]:
    """All clients, except the last one of an odd cohort, which stays unmutated."""
    return jnp.arange(members) < members - members % 2


def mutation_signs(key: Key[Array, ""], members: int, layers: int, beta: Float[Array, ""]) -> Float[Array, "M L"]:
    """v_i^l: per layer a shuffled list of equally many 1 and −1 + β; the odd client's row is 0."""
    half = members // 2
    pairs = jnp.concatenate([jnp.ones(half), jnp.full(half, -1.0) + beta])
    columns = jax.vmap(lambda key: jax.random.permutation(key, pairs), out_axes=1)(jax.random.split(key, layers))
    return jnp.concatenate([columns, jnp.zeros((members % 2, layers))])


def start_model(shared: Shared, own: Own) -> PyTree:
    """The trainable arrays that a client starts from."""
    leaves, structure = jax.tree.flatten(shared.params.trainable)
    updates = jax.tree.leaves(shared.update)
    mutated = [leaf + own.coefficients[layer] * g for layer, (leaf, g) in enumerate(zip(leaves, updates, strict=True))]
    trainable = jax.tree.unflatten(structure, mutated)
    if jax.tree.leaves(shared.directions):
        trainable = jax.tree.map(
            lambda leaf, rows: leaf + jnp.tensordot(own.multipliers, rows, axes=1), trainable, shared.directions
        )
    return trainable


def watched_drift(remedy: str) -> tuple[Watch, Watch]:
    """The mean mutation is a server momentum: at 1 and beyond it grows from round to round."""
    advice = (
        f"the mutations' mean coefficient is {{value}} in round {{round}}; from {DRIFT_LIMIT} on, as in {{rounds}} of the "
        f"rounds, a run may diverge. {remedy}"
    )
    return (
        Watch("mutation/drift", "drift", DRIFT_LIMIT),
        Watch("mutation/drift_largest", limit=DRIFT_LIMIT, advice=advice),
    )


def mutating(model: Model, optimizer: optax.GradientTransformation, mutate: Callable) -> Algorithm:
    """A method whose clients start at mutants of the global model and whose results are averaged uniformly.

    Args:
      mutate: `(server, members, key) -> (Own with leading axis [M], directions, metrics)`.
    """
    training = local_training(model, optimizer)

    def init_server(params: Params, clients: int) -> MutationServer:
        zero = jax.tree.map(jnp.zeros_like, params.trainable)
        return MutationServer(params, zero, jnp.zeros((), jnp.int32), ())

    def dispatch(server: MutationServer, cohort: Cohort, key: Any) -> tuple[Shared, Own, dict]:
        own, directions, metrics = mutate(server, len(cohort.clients), key)
        return Shared(server.params, server.update, directions), own, metrics

    def start(shared: Shared, own: Own, memory: tuple, key: Any) -> LocalState:
        return training.start(shared.params._replace(trainable=start_model(shared, own)))

    def step(frozen: PyTree, shared: Shared, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        return training.step(frozen, carry, batch, key)

    def finish(shared: Shared, carry: LocalState, client: Client) -> tuple:
        upload, metrics = report(carry, start_model(shared, client.own), shared.params, client, "uniform")
        return upload, (), metrics

    def combine(server: MutationServer, total: Upload, key: Any) -> tuple[MutationServer, dict]:
        mean, metrics = mean_update(total)
        return server._replace(params=add(server.params, mean), update=mean.trainable, round=server.round + 1), metrics

    return Algorithm(
        init_server=init_server,
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine=combine,
        step_sizes=("alpha",),
        watch=watched_drift("Lower algorithm.alpha."),
    )


@algorithms.register
def fedmut(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    alpha: Annotated[float, Field(ge=0)] = 4.0,
    beta0: Annotated[float, Field(ge=0, le=1)] = 0.3,
    mutation_rounds: Annotated[int, Field(ge=1)] = 50,
) -> Algorithm:
    """Sends each client a mutant of the global model, moved along the last update layer by layer (FedMut).

    Args:
      alpha: α, length of a mutation in units of the last global update.
      beta0: β_0, by how much backward mutations are shortened at first.
      mutation_rounds: T_b, after how many rounds forward and backward mutations are equally long.
    """

    def mutate(server: MutationServer, members: int, key: Any) -> tuple[Own, tuple, dict]:
        layers = len(jax.tree.leaves(server.update))
        beta = backward_share(beta0, mutation_rounds, server.round)
        coefficients = alpha * mutation_signs(key, members, layers, beta)
        moved = layer_squared_norms(server.update).sum() > 0  # in the first round nothing is mutated
        drift = jnp.where(moved, coefficients.mean(), 0)  # the same in all layers
        metrics = {"mutation/drift": drift, "mutation/drift_largest": drift}
        return Own(coefficients, jnp.zeros((members, 0))), (), metrics

    return mutating(model, optimizer, mutate)
