"""HetLoRA: clients of different ranks, averaged with zero padding.

Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024: client k
gets the first r_k ranks of the global adapters; its result is padded with zeros to the full rank and weighted by
‖ΔW_k‖_F, the norm of its product, relative to the cohort's sum of norms.

Deviations: rank self-pruning (a penalty on the last ranks and their removal during training) is left out, so that the number
of trained parameters stays what `levels` says, as equal budgets need; ‖ΔW_k‖_F is taken over all adapted matrices together;
ranks that nobody of a cohort has keep their old values (with zeros in A and B they could never be trained again).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import Expansion
from fedjax_qp.algorithms.ranks import RankServer, holds, rank_masks, ranked
from fedjax_qp.algorithms.sparse import Level
from fedjax_qp.federated import Algorithm, Client, Model


class HetloraUpload(NamedTuple):
    """Summed over the cohort."""

    norm: Float[Array, ""]  # ‖ΔW_k‖_F
    adapters: PyTree  # ‖ΔW_k‖_F · θ_k, zero behind the client's rank
    owners: Float[Array, "r"]  # 1 for the ranks that the client has


def product_norm(adapters: PyTree) -> Float[Array, ""]:
    """‖AB‖_F over all layers and matrices, from r×r matrices: ‖AB‖² = tr(AᵀA · BBᵀ)."""

    def squared(adapter: dict) -> Float[Array, ""]:
        of_a = jnp.einsum("lir,lis->lrs", adapter["a"], adapter["a"])
        of_b = jnp.einsum("lro,lso->lrs", adapter["b"], adapter["b"])
        return (of_a * of_b).sum()

    total = sum((squared(adapter) for adapter in adapters.values()), start=jnp.zeros(()))
    return jnp.sqrt(jnp.maximum(total, 0))  # rounding may leave it below 0


@algorithms.register
def hetlora(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: Expansion = 2,
    levels: tuple[Level, ...] = (0.5, 1.5),
) -> Algorithm:
    """Clients of different LoRA ranks, padded with zeros and weighed by their norms (HetLoRA without self-pruning).

    Args:
      expansion: e, factor on the model's rank: room for the richest clients.
      levels: a client's rank, as a multiple of the rank before expansion; client k has level k modulo their number. With
        the default and an even number of clients their mean is FedIT's rank, if half of that is whole.

    Raises:
      ConfigurationError: a level above the expansion.
    """

    def upload(adapters: PyTree, rank: Int[Array, ""], client: Client) -> HetloraUpload:
        norm = product_norm(adapters)
        return HetloraUpload(
            norm, jax.tree.map(lambda leaf: norm * leaf, adapters), holds(adapters, rank).astype(jnp.float32)
        )

    def combine(server: RankServer, total: HetloraUpload) -> PyTree:
        """The mean weighted by norm; old values where nobody has the rank, or all products are 0."""
        owned = rank_masks(server.adapters, (total.owners > 0).sum())  # everybody has the first ranks
        known = total.norm > 0

        def mean(old: Array, summed: Array, mask: Array) -> Array:
            return jnp.where(mask & known, summed / jnp.where(known, total.norm, 1), old)

        return jax.tree.map(mean, server.adapters, total.adapters, owned)

    return ranked(model, optimizer, expansion=expansion, levels=levels, upload=upload, combine=combine)
