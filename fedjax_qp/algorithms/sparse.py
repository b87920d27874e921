"""Clients that train only some entries of the expanded adapters: how many, and steps that leave the others at 0."""

from typing import Annotated, Any

import optax
from jaxtyping import PyTree
from pydantic import Field

from fedjax_qp.algorithms.local import LocalState, LocalTraining, local_training
from fedjax_qp.federated import Batch, Model
from fedjax_qp.models.language import lora
from fedjax_qp.registry import ConfigurationError

Level = Annotated[float, Field(gt=0)]


def check_levels(levels: tuple[float, ...], expansion: int) -> None:
    """Checks the clients' resource levels; client k has level k modulo their number.

    Raises:
      ConfigurationError: a client would train more than the expanded adapters have, or there is no level.
    """
    if not levels or max(levels) > expansion:
        raise ConfigurationError(
            f"algorithm.levels = {levels}: a client of level ρ trains ρ/expansion of the expanded adapters, so levels must "
            f"be above 0 and at most algorithm.expansion = {expansion}; at least one is needed."
        )


def masked_training(model: Model, optimizer: optax.GradientTransformation) -> LocalTraining:
    """Local training from `Params` with masks, outside of which adapters stay exactly 0.

    The masks in the model make the gradients there 0 already; masking the result keeps every optimizer from moving them.
    """
    training = local_training(model, optimizer)

    def step(frozen: PyTree, state: LocalState, batch: Batch, key: Any) -> LocalState:
        after = training.step(frozen, state, batch, key)
        trainable = lora.apply_masks(after.params.trainable, after.params.masks)
        return after._replace(params=after.params._replace(trainable=trainable))

    return LocalTraining(training.start, step)
