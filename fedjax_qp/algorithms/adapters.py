"""Federated LoRA without masks: which factors are trained, which are averaged, and how far a client keeps its own.

Every client keeps its adapters θ_i as it left them ("tuned"); in the next round it starts from λθ̄ + (1 − λ)θ_i where a
factor is averaged and from θ_i where it is not. λ is `personal_mix`; 1 is plain averaging.

Source: Zhang et al. 2024, "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT; FedAvg on LoRA);
Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (FFA-LoRA: A stays at its random start);
Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (FedSA-LoRA: A is averaged, B is the
client's own). `personal_mix` and the local rounds at the end are ours, as controls for PerFIT.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import LocalState, Weighting, client_weight, local_training, loss_metrics
from fedjax_qp.federated import Algorithm, Batch, Client, Model, Params
from fedjax_qp.models.language import lora
from fedjax_qp.registry import is_zero

Mix = Annotated[float, Field(ge=0, le=1)]
Expansion = Annotated[int, Field(ge=1, le=1000)]
Rounds = Annotated[int, Field(ge=0, le=2**31 - 1)]
Factor = Callable[[str], bool]  # "a" or "b" → whether it is meant
BYTES = 4  # an adapter entry travels as float32


class AdapterServer(NamedTuple):
    adapters: PyTree  # θ̄
    round: Int[Array, ""]


class AdapterMemory(NamedTuple):
    """What a client keeps between rounds."""

    adapters: PyTree  # θ_i as the client left them
    trained: Int[Array, ""]  # number of the last round it took part in, from 1; 0 = never


class Report(NamedTuple):
    """Summed over the cohort."""

    weight: Float[Array, ""]
    adapters: list  # weight · θ_i, the averaged factors only


def factors(tree: PyTree, meant: Factor) -> list[Array]:
    """The leaves of the meant factors, in tree order."""
    return [leaf for path, leaf in jax.tree.leaves_with_path(tree) if meant(factor_of(path))]


def factor_of(path: tuple) -> str:
    """The factor that a leaf of an adapter tree belongs to: the last key of its path."""
    return path[-1].key


def everything(factor: str) -> bool:
    return True


def nothing(factor: str) -> bool:
    return False


def only(name: str) -> Factor:
    """The factor of this name alone."""
    return lambda factor: factor == name


def blend(average: PyTree, own: PyTree, mix: Array | float) -> PyTree:
    """mix·average + (1 − mix)·own, exactly the average at 1 and exactly the own at 0."""
    return jax.tree.map(
        lambda a, o: jnp.where(mix >= 1, a, jnp.where(mix <= 0, o, mix * a + (1 - mix) * o)), average, own
    )


def training_metrics(state: LocalState, begun: PyTree) -> dict[str, Array]:
    """How a client's training went: its mean loss, and how far it moved from where it began."""
    moved = jax.tree.map(jnp.subtract, state.params.trainable, begun)
    return loss_metrics(state) | {"client/update_norm": optax.tree.norm(moved)}


def bytes_of(entries: Array | int, most: int) -> Array:
    """Bytes of adapter entries that are sent.

    Exact in int32 where `most` entries fit, the largest number that there can be; else in float32, which keeps 7 digits.
    """
    fits = BYTES * most <= jnp.iinfo(jnp.int32).max
    return BYTES * jnp.asarray(entries, jnp.int32 if fits else jnp.float32)


def entry_metrics(trained: Array | int, *, sent: Array | int, received: Array | int, most: int) -> dict[str, Array]:
    """What a client's budget is judged by: entries it trains, and the bytes of those it sends and receives.

    Args:
      most: of the entries that can be sent or received; see `bytes_of`.
    """
    return {
        "client/trained_entries": jnp.asarray(trained, jnp.int32),
        "client/upload_bytes": bytes_of(sent, most),
        "client/download_bytes": bytes_of(received, most),
    }


def adapter_averaging(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: int,
    trained: Factor = everything,
    averaged: Factor = everything,
    personal_mix: float = 1.0,
    local_after: int | None = None,
    proximal: float = 0.0,
    weighting: Weighting = "size",
) -> Algorithm:
    """Averages some factors of the adapters; see the module docstring.

    Args:
      expansion: e, factor on the model's rank (and its alpha, so that the scale stays).
      trained: factors that clients train; the others stay at their start.
      averaged: factors that the server averages; the others are the client's own.
      personal_mix: λ.
      local_after: number of federated rounds after which clients train on alone; None = all rounds are federated.
      proximal: μ of FedProx's penalty ½μ‖θ − θ̄‖².
    """

    def label(tree: PyTree) -> PyTree:
        return jax.tree.map_with_path(lambda path, _: "train" if trained(factor_of(path)) else "keep", tree)

    split = optax.partition({"train": optimizer, "keep": optax.set_to_zero()}, label)
    training = local_training(model, split)

    def personal(server: AdapterServer, memory: AdapterMemory) -> PyTree:
        """The adapters of a client after the last aggregation: its next start."""
        never = memory.trained == 0
        mix = jnp.where(never, 1.0, personal_mix)
        if local_after is not None:
            mix = jnp.where(memory.trained > local_after, 0.0, mix)

        def leaf(path: tuple, average: Array, own: Array) -> Array:
            return blend(average, own, mix) if averaged(factor_of(path)) else jnp.where(never, average, own)

        return jax.tree.map_with_path(leaf, server.adapters, memory.adapters)

    def start(shared: AdapterServer, own: tuple, memory: AdapterMemory, key: Any) -> LocalState:
        return training.start(Params(personal(shared, memory), ()))

    def step(frozen: PyTree, shared: AdapterServer, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        def pull(adapters: PyTree) -> PyTree:
            return jax.tree.map(lambda here, there: proximal * (here - there), adapters, shared.adapters)

        return training.step(frozen, carry, batch, key, None if is_zero(proximal) else pull)

    def finish(shared: AdapterServer, carry: LocalState, client: Client) -> tuple:
        adapters = carry.params.trainable
        weight = client_weight(weighting, client)
        upload = Report(weight, [weight * leaf for leaf in factors(adapters, averaged)])
        metrics = training_metrics(carry, personal(shared, client.memory))
        sent = lora.count(factors(adapters, lambda factor: averaged(factor) and trained(factor)))
        if local_after is not None:
            sent = jnp.where(shared.round < local_after, sent, 0)
        most = int(lora.count(adapters))
        metrics |= entry_metrics(lora.count(factors(adapters, trained)), sent=sent, received=sent, most=most)
        return upload, AdapterMemory(adapters, shared.round + 1), metrics

    def combine(server: AdapterServer, total: Report, key: Any) -> tuple[AdapterServer, dict[str, Array]]:
        federated = jnp.asarray(True) if local_after is None else server.round < local_after
        means = iter(total.adapters)

        def leaf(path: tuple, old: Array) -> Array:
            if not averaged(factor_of(path)):
                return old
            return jnp.where(federated, next(means) / jnp.where(total.weight > 0, total.weight, 1), old)

        adapters = jax.tree.map_with_path(leaf, server.adapters)
        update = jax.tree.map(jnp.subtract, adapters, server.adapters)
        return AdapterServer(adapters, server.round + 1), {"update/norm": optax.tree.norm(update)}

    def tuned(server: AdapterServer, memory: AdapterMemory) -> Params:
        """A client's adapters as it left them; the average for one that never took part."""
        never = memory.trained == 0
        return Params(jax.tree.map(lambda a, o: jnp.where(never, a, o), server.adapters, memory.adapters), ())

    def serve(server: AdapterServer, memory: AdapterMemory | tuple) -> Params:
        return Params(personal(server, memory) if isinstance(memory, AdapterMemory) else server.adapters, ())

    return Algorithm(
        init_server=lambda params, clients: AdapterServer(params.trainable, jnp.zeros((), jnp.int32)),
        init_client=lambda params: AdapterMemory(params.trainable, jnp.zeros((), jnp.int32)),
        dispatch=lambda server, cohort, key: (server, (), {}),
        start=start,
        step=step,
        finish=finish,
        combine=combine,
        serve=serve,
        tuned=tuned,
        tunes_adapters=True,
        rank_factor=expansion,
    )


@algorithms.register
def fedit(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: Expansion = 1,
    personal_mix: Mix = 1.0,
    local_after: Rounds | None = None,
    proximal: Annotated[float, Field(ge=0)] = 0.0,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedIT: federated averaging of LoRA adapters.

    Args:
      expansion: e, factor on the model's rank (and its alpha, so that the scale stays).
      personal_mix: λ, share of the average in a client's next start; 1 is FedIT.
      local_after: federated rounds, after which clients tune on alone ("FedIT, then local tuning").
      proximal: μ of FedProx; 0 is FedIT.
    """
    return adapter_averaging(
        model,
        optimizer,
        expansion=expansion,
        personal_mix=personal_mix,
        local_after=local_after,
        proximal=proximal,
        weighting=weighting,
    )


@algorithms.register
def local_lora(model: Model, optimizer: optax.GradientTransformation, *, expansion: Expansion = 1) -> Algorithm:
    """Every client tunes its own adapters alone; nothing is sent."""
    return adapter_averaging(model, optimizer, expansion=expansion, averaged=nothing)


@algorithms.register
def ffa_lora(
    model: Model, optimizer: optax.GradientTransformation, *, expansion: Expansion = 2, weighting: Weighting = "size"
) -> Algorithm:
    """FFA-LoRA: A stays at its random start, B is trained and averaged. Expansion 2 trains about as much as FedIT."""
    b = only("b")
    return adapter_averaging(model, optimizer, expansion=expansion, trained=b, averaged=b, weighting=weighting)


@algorithms.register
def fedsa_lora(
    model: Model, optimizer: optax.GradientTransformation, *, expansion: Expansion = 1, weighting: Weighting = "size"
) -> Algorithm:
    """FedSA-LoRA: both factors are trained, A is averaged, B is the client's own."""
    return adapter_averaging(model, optimizer, expansion=expansion, averaged=only("a"), weighting=weighting)
