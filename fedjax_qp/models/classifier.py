"""A network as the pure functions that algorithms train: scaled inputs, masked losses, sums over tests."""

import math
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, UInt8

from fedjax_qp.federated import Batch, Model, Params, Parts
from fedjax_qp.models.heads import Head
from fedjax_qp.models.layers import Network
from fedjax_qp.registry import ConfigurationError

MOST_WEIGHTS = 2**31  # 8 GiB, of which every lane holds several copies


def classifier(
    build: Callable[[nnx.Rngs], nnx.Module],
    *,
    mean: tuple[float, ...] | float | None = 0.5,
    std: tuple[float, ...] | float | None = 0.5,
    classes: int,
    scale: Callable[[Array], Array] | None = None,
    head: Head | None = None,
    has_classes: bool = True,
) -> Model:
    """Returns the model of a network on images, rows or windows of text; batches hold `Examples`.

    Parameters and statistics are plain nested dicts, one array for each kernel and each bias.

    Args:
      build: makes the network from its random numbers; see `fedjax_qp.models`. The model has parts if that is a `Network`.
      mean: of the pixels scaled to 0 … 1, one number or one for each channel; None leaves the inputs alone (codes).
      std: likewise.
      classes: number of classes, or of other outputs.
      scale: makes of a batch's inputs what the network sees, in place of mean and std.
      head: loss and tests; None: those of a classifier of images or text.
      has_classes: whether the outputs are scores of classes, so that the model has parts.

    Raises:
      ConfigurationError: the network has more weights than MOST_WEIGHTS.
    """
    # Abstract: shapes only, nothing is computed. The graph definition is the same for every key.
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, *_ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    if (
        weights := sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    ) > MOST_WEIGHTS:
        raise ConfigurationError(
            f"the model has {weights} weights ({weights / 2**28:.0f} GiB); at most {MOST_WEIGHTS} are possible. Take smaller "
            "layers, smaller images or fewer classes."
        )

    def init(key: Key[Array, ""]) -> Params:
        return _params(build(nnx.Rngs(params=key)))

    def scaled(inputs: Array) -> Array:
        if scale is not None:
            return scale(inputs)
        return inputs if mean is None or std is None else normalise(inputs, mean, std)

    def forward(params: Params, batch: Batch, *, train: bool) -> tuple[Float[Array, "B classes"], PyTree]:
        network = nnx.merge(graph, params.trainable, params.statistics)
        logits = network(scaled(batch.examples.inputs), batch.mask, train=train)
        return logits, _params(network).statistics

    def loss(frozen: Any, params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], PyTree]:
        logits, statistics = forward(params, batch, train=True)
        if head is not None:
            return head.losses(logits, batch).sum() / jnp.maximum(batch.mask.sum(), 1), statistics
        return mean_cross_entropy(logits, batch), statistics

    def evaluate(frozen: Any, params: Params, batch: Batch) -> dict[str, Array]:
        logits, _ = forward(params, batch, train=False)
        if head is not None:
            return {"loss": head.losses(logits, batch).sum(), **head.sums(logits, batch)}
        hits = (logits.argmax(-1) == batch.examples.labels) & batch.mask
        labels = jax.nn.one_hot(batch.examples.labels, classes)
        return {"loss": _losses(logits, batch).sum(), "correct": hits @ labels, "count": batch.mask @ labels}

    def whole(params: Params) -> Network:
        return cast(Network, nnx.merge(graph, params.trainable, params.statistics))

    def features(params: Params, batch: Batch, *, train: bool) -> tuple[Float[Array, "B F"], PyTree]:
        network = whole(params)
        found = network.features(scaled(batch.examples.inputs), batch.mask, train=train)
        return found, _params(network).statistics

    def classify(params: Params, features: Float[Array, "B F"]) -> Float[Array, "B classes"]:
        return whole(params).last(features)

    parts = (
        Parts(features, classify, *abstract.last.kernel.shape) if has_classes and _learns_features(abstract) else None
    )
    scores = None if head is None else head.scores
    return Model(init=init, loss=loss, evaluate=evaluate, parts=parts, scores=scores)


def normalise(
    inputs: UInt8[Array, "B H W C"] | Float[Array, "B H W C"],
    mean: tuple[float, ...] | float,
    std: tuple[float, ...] | float,
) -> Float[Array, "B H W C"]:
    """Scales pixels 0 … 255 to 0 … 1 and standardises them; inputs that are floats already are left alone."""
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        return inputs
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return inputs * (1 / (255 * scale)) - shift / scale


def _params(network: nnx.Module) -> Params:
    _, trainable, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
    return Params(nnx.to_pure_dict(trainable), nnx.to_pure_dict(statistics))


def mean_cross_entropy(
    logits: Float[Array, "B classes"] | Float[Array, "B T classes"], batch: Batch
) -> Float[Array, ""]:
    """Over the examples that are no padding; 0 where all are."""
    return _losses(logits, batch).sum() / jnp.maximum(batch.mask.sum(), 1)


def _losses(logits: Float[Array, "B classes"] | Float[Array, "B T classes"], batch: Batch) -> Float[Array, "B"]:
    """Cross-entropy of each example; 0 for padded ones, whose gradient is 0 too.

    With logits of every position it is the mean over the positions: each is to predict the code that follows it, the last
    the label.
    """
    labels = batch.examples.labels[:, None]
    if logits.ndim == 2:
        logits = logits[:, None]
    else:
        labels = jnp.concatenate([batch.examples.inputs[:, 1:].astype(labels.dtype), labels], axis=1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jnp.where(batch.mask, -chosen.mean(-1), 0)


def _learns_features(network: nnx.Module) -> TypeGuard[Network]:
    """Whether there is a last layer, and layers before it: otherwise its input would be the image itself."""
    if not isinstance(network, Network):
        return False
    whole, last = (len(jax.tree.leaves(nnx.state(part, nnx.Param))) for part in (network, network.last))
    return whole > last
