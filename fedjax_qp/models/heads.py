"""What a network's outputs mean: the loss, the sums of a test that the program keeps, and the numbers made of them.

One head for each `data.dataset.Target` of rows. All that is summed is a sum over examples, so that batches, lanes and devices
add up; whatever needs more than sums (F1, R², the area under the curve) is made of them on the host.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_qp.data.dataset import Target
from fedjax_qp.federated import Batch

TOP = 5
BINS = 200  # of scores, for areas under the curve: an area is then right to about 1/BINS of the pairs that share a bin
MOST_AREAS = 100  # labels; more histograms would cost more than the network


class Head(NamedTuple):
    """Pure functions of a network's outputs [B, outputs]."""

    losses: Callable[[Array, Batch], Float[Array, "B"]]  # 0 for padded examples
    sums: Callable[[Array, Batch], dict[str, Array]]  # over the mask
    scores: Callable[[dict[str, np.ndarray]], dict[str, float]]  # of the sums over a whole test, on the host


def head(target: Target, outputs: int, *, mean: np.ndarray | None = None, std: np.ndarray | None = None) -> Head:
    """Returns the head for a target.

    Args:
      outputs: classes, labels or numbers.
      mean: of the numbers [outputs], over the training rows; the network learns them standardised.
      std: likewise.
    """
    if target == "classes":
        return _classes(outputs)
    if target == "labels":
        return _labels(outputs)
    assert mean is not None and std is not None
    return _numbers(outputs, mean, std)


def _classes(classes: int) -> Head:
    """Cross-entropy; accuracy, macro F1, top-5 accuracy where there are more classes, the area under the curve of two."""

    def losses(outputs: Array, batch: Batch) -> Array:
        labels = batch.examples.labels[:, None]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels, axis=-1)[:, 0]
        return jnp.where(batch.mask, -chosen, 0)

    def sums(outputs: Array, batch: Batch) -> dict[str, Array]:
        given, found = batch.examples.labels, outputs.argmax(-1)
        labels, predicted = jax.nn.one_hot(given, classes), jax.nn.one_hot(found, classes)
        hits = (found == given) & batch.mask
        kept = {"correct": hits @ labels, "count": batch.mask @ labels, "predicted": batch.mask @ predicted}
        if classes > TOP:
            better = (outputs > jnp.take_along_axis(outputs, given[:, None], axis=-1)).sum(-1)
            kept["top5"] = ((better < TOP) & batch.mask).sum().astype(jnp.float32)
        if classes == 2:
            kept |= _histograms(jax.nn.softmax(outputs)[:, 1:], given[:, None] == 1, batch)
        return kept

    def scores(sums: dict[str, np.ndarray]) -> dict[str, float]:
        found = {"f1": _macro_f1(sums["correct"], sums["predicted"], sums["count"])}
        if "top5" in sums:
            found["top5_accuracy"] = float(sums["top5"] / sums["count"].sum())
        return found | _areas(sums)

    return Head(losses, sums, scores)


def _labels(labels: int) -> Head:
    """Binary cross-entropy of each label; accuracy and F1 by label, and the mean area under their curves."""

    def each(outputs: Array, batch: Batch) -> Float[Array, "B L"]:
        given = batch.examples.labels.astype(outputs.dtype)
        return jax.nn.softplus(outputs) - given * outputs

    def losses(outputs: Array, batch: Batch) -> Array:
        return jnp.where(batch.mask, each(outputs, batch).mean(-1), 0)

    def sums(outputs: Array, batch: Batch) -> dict[str, Array]:
        given, found = batch.examples.labels == 1, outputs > 0
        mask = batch.mask.astype(jnp.float32)
        kept = {
            "loss": jnp.where(batch.mask[:, None], each(outputs, batch), 0).sum(),
            "correct": mask @ (given == found),
            "count": jnp.full(labels, mask.sum()),
            "true_positives": mask @ (given & found),
            "predicted": mask @ found,
            "positives": mask @ given,
        }
        return kept | (_histograms(jax.nn.sigmoid(outputs), given, batch) if labels <= MOST_AREAS else {})

    def scores(sums: dict[str, np.ndarray]) -> dict[str, float]:
        return {"f1": _macro_f1(sums["true_positives"], sums["predicted"], sums["positives"])} | _areas(sums)

    return Head(losses, sums, scores)


def _numbers(outputs: int, mean: np.ndarray, std: np.ndarray) -> Head:
    """The squared error of standardised numbers; the mean squared error in their own unit, and R²."""

    def standardised(batch: Batch) -> Float[Array, "B T"]:
        return (batch.examples.labels - mean.astype(np.float32)) / std.astype(np.float32)

    def losses(outputs: Array, batch: Batch) -> Array:
        return jnp.where(batch.mask, ((outputs - standardised(batch)) ** 2).mean(-1), 0)

    def sums(outputs: Array, batch: Batch) -> dict[str, Array]:
        given, mask = standardised(batch), batch.mask.astype(jnp.float32)
        squares = jnp.where(batch.mask[:, None], (outputs - given) ** 2, 0).sum(0)
        return {"count": mask.sum()[None], "squared_error": squares, "sum": mask @ given, "squares": mask @ given**2}

    def scores(sums: dict[str, np.ndarray]) -> dict[str, float]:
        count, squares = float(sums["count"].sum()), np.asarray(sums["squared_error"], np.float64)
        spread = np.asarray(sums["squares"], np.float64) - np.asarray(sums["sum"], np.float64) ** 2 / count
        return {
            "mse": float((squares * std.astype(np.float64) ** 2).mean() / count),
            "r2": float((1 - squares / spread).mean()),
        }

    return Head(losses, sums, scores)


def _macro_f1(hits: np.ndarray, predicted: np.ndarray, given: np.ndarray) -> float:
    """The mean over classes of 2·hits / (predicted + given), 0 for one that is neither, as scikit-learn has it."""
    total = np.asarray(predicted, np.float64) + np.asarray(given, np.float64)
    present = total > 0
    return float((2 * np.asarray(hits, np.float64)[present] / total[present]).mean())


def _histograms(shares: Float[Array, "B L"], given: Array, batch: Batch) -> dict[str, Array]:
    """How many examples with and without each label have a score in each of `BINS` equal intervals of 0 … 1."""
    place = jax.nn.one_hot(jnp.minimum((shares * BINS).astype(jnp.int32), BINS - 1), BINS)
    kept = batch.mask[:, None].astype(jnp.float32)
    with_it, without = (jnp.einsum("bl,blk->lk", kept * some, place) for some in (given, ~given))
    return {"scores_with": with_it, "scores_without": without}


def _areas(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean area under the curves: how often an example with the label scores above one without, ties counting half."""
    if "scores_with" not in sums:
        return {}
    with_it, without = (np.asarray(sums[name], np.float64) for name in ("scores_with", "scores_without"))
    below = np.cumsum(without, axis=1) - without / 2
    pairs = with_it.sum(1) * without.sum(1)
    areas = (with_it * below).sum(1)[pairs > 0] / pairs[pairs > 0]
    return {"auc": float(areas.mean())} if len(areas) else {}
