"""A language model with adapters as the pure functions that algorithms train: loss over target tokens, sums, merging."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedjax_qp.federated import Batch, Model, Params
from fedjax_qp.models.language import lora
from fedjax_qp.models.language.llama import LlamaConfig, forward
from fedjax_qp.models.language.token_loss import TokenLosses, token_losses
from fedjax_qp.registry import ConfigurationError

LARGEST_ALPHA = 1e6  # far beyond any use; adapters are float32


def language_model(
    config: LlamaConfig,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    rematerialise: bool = False,
) -> Model:
    """Returns the model of low-rank adapters on a frozen Llama; batches hold `Sequences`, `frozen` the base weights.

    The scale alpha / rank is fixed here, also for `Params` whose adapters have another rank. `Params.statistics` may hold
    changes of the base, {"q_proj": [layers, inputs, outputs], …}, which are added to its matrices and not trained (FLoRA).

    Args:
      config: the base's architecture.
      rank: of the adapters.
      alpha: the adapters' product is multiplied by alpha / rank.
      dropout: share of the adapters' inputs that is dropped in training, 0 ≤ dropout < 1.
      targets: which matrices get adapters: names, globs or regular expressions.
      rematerialise: less memory for more time, see `forward`.

    Returns:
      `init`, `loss` (mean negative log likelihood of the target tokens), `evaluate` (sums: "loss" [], "correct" [1], "count"
      [1], where one target token counts 1) and `merge` (frozen, trainable, masks=()) -> frozen.

    Raises:
      ConfigurationError: a target matches nothing, or a number is out of range.
    """
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"LoRA dropout = {dropout}; it must be at least 0 and below 1. 0 switches it off.")
    if not 0 < alpha <= LARGEST_ALPHA:
        raise ConfigurationError(
            f"LoRA alpha = {alpha}; it must be above 0 and at most {LARGEST_ALPHA:g}. Common values are rank and 2 · rank."
        )
    lora.adapter_shapes(config, rank, targets)
    scale = alpha / rank

    def init(key: Key[Array, ""]) -> Params:
        return Params(lora.init_adapters(config, key, rank, targets), (), ())

    def loss(frozen: Any, params: Params, batch: Batch, key: Any) -> tuple[Float[Array, ""], PyTree]:
        losses, counts = next_token_losses(
            config, frozen, params, batch, scale=scale, dropout=dropout, key=key, rematerialise=rematerialise
        )
        return losses.loss.sum() / jnp.maximum(counts.sum(), 1), params.statistics

    def evaluate(frozen: Any, params: Params, batch: Batch) -> dict[str, Array]:
        losses, counts = next_token_losses(config, frozen, params, batch, scale=scale)
        correct, count = (mask.sum(dtype=jnp.float32)[None] for mask in (losses.correct, counts))
        return {"loss": losses.loss.sum(), "correct": correct, "count": count}

    def merge(frozen: Any, trainable: PyTree, masks: PyTree = ()) -> dict:
        return lora.merge(frozen, trainable, scale, masks)

    def counted(batch: Batch) -> Int[Array, ""]:
        return _countable(batch.examples.segments, batch.examples.targets, batch.mask).sum()

    return Model(init=init, loss=loss, evaluate=evaluate, merge=merge, counted=counted)


def next_token_losses(
    config: LlamaConfig,
    frozen: Any,
    params: Params,
    batch: Batch,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    key: Key[Array, ""] | None = None,
    rematerialise: bool = False,
) -> tuple[TokenLosses, Bool[Array, "B T-1"]]:
    """Returns the loss of each token but the first, and which of them count.

    Args:
      batch: examples are `Sequences`; token t is predicted from t − 1 and counts if it is a target of the same segment.
      scale: of the adapters, alpha / rank.
      dropout: of the adapters' inputs, when there is a key.
      key: for dropout, or None.
      rematerialise: less memory for more time, see `forward`.
    """
    examples = batch.examples
    hidden = forward(
        config,
        lora.changed(frozen, params.statistics),
        params.trainable,
        params.masks,
        examples.tokens,
        examples.positions,
        examples.segments,
        scale=scale,
        dropout=dropout,
        key=key,
        rematerialise=rematerialise,
    )
    counts = _countable(examples.segments, examples.targets, batch.mask)
    head = frozen["embed"] if config.tied else frozen["head"]["kernel"]
    return token_losses(hidden[:, :-1], head, examples.tokens[:, 1:], counts, tied=config.tied), counts


def _countable(
    segments: Int[Array, "B T"], targets: Bool[Array, "B T"], mask: Bool[Array, "B"]
) -> Bool[Array, "B T-1"]:
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return targets[:, 1:].astype(bool) & same & mask[:, None]
