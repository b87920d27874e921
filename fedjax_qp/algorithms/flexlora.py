"""FlexLoRA: clients of different ranks, averaged as products and dealt out again by a truncated SVD.

Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024: the server forms ΔW = Σ_k p_k A_k B_k and gives client k the first r_k singular directions.

Deviations: the dense ΔW is never formed (QR of the stacked factors, then an SVD of the small core, which is the same);
the server keeps the first singular directions up to the expanded rank, and is evaluated with these.
The singular values go into B, so that A has orthonormal columns: our reading, the text leaves it open.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import Expansion
from fedjax_qp.algorithms.local import Weighting, client_weight
from fedjax_qp.algorithms.ranks import RankServer, full_rank, ranked, stacked
from fedjax_qp.algorithms.sparse import Level
from fedjax_qp.federated import Algorithm, Client, Model
from fedjax_qp.registry import ConfigurationError


class FlexloraUpload(NamedTuple):
    weight: Float[Array, ""]  # 0 for those who did not report
    adapters: PyTree


def truncated_svd(
    a: Float[Array, "inputs s"], b: Float[Array, "s outputs"], rank: int
) -> tuple[Float[Array, "inputs r"], Float[Array, "r outputs"]]:
    """The best approximation of a·b of a rank, in factors: singular directions by falling singular value, values in b.

    Raises:
      ConfigurationError: the matrix has fewer singular directions.
    """
    if rank > min(a.shape[0], b.shape[1]):
        raise ConfigurationError(
            f"FlexLoRA: expanded rank {rank} for a matrix of {a.shape[0]} × {b.shape[1]}; at most its smaller side. "
            "Lower the model's rank or algorithm.expansion."
        )
    left, left_core = jnp.linalg.qr(a)
    right, right_core = jnp.linalg.qr(b.T)
    u, values, v = jnp.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u[:, :rank], values[:rank, None] * (v[:rank] @ right.T)


@algorithms.register
def flexlora(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: Expansion = 2,
    levels: tuple[Level, ...] = (0.5, 1.5),
    weighting: Weighting = "size",
) -> Algorithm:
    """Clients of different LoRA ranks; the server averages full updates and cuts them back by SVD (FlexLoRA).

    Args:
      expansion: e, factor on the model's rank: room for the richest clients.
      levels: a client's rank, as a multiple of the rank before expansion; client k has level k modulo their number. With
        the default and an even number of clients their mean is FedIT's rank, if half of that is whole.

    Raises:
      ConfigurationError: a level above the expansion.
    """

    def upload(adapters: PyTree, rank: Int[Array, ""], client: Client) -> FlexloraUpload:
        return FlexloraUpload(client_weight(weighting, client), adapters)

    def combine_each(server: RankServer, uploads: FlexloraUpload) -> PyTree:
        total = uploads.weight.sum()
        rank = full_rank(server.adapters)
        product = stacked(uploads.weight / jnp.where(total > 0, total, 1), uploads.adapters)
        of_layers = jax.vmap(lambda adapter: truncated_svd(adapter["a"], adapter["b"], rank))
        return {name: dict(zip("ab", of_layers(adapter), strict=True)) for name, adapter in product.items()}

    return ranked(model, optimizer, expansion=expansion, levels=levels, upload=upload, combine_each=combine_each)
