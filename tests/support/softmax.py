"""Softmax regression on the digits of `small`, and once more in numpy: what the oracles of whole methods are made of.

In numpy the weights are one matrix [pixels + 1, classes], whose last row is the bias, in float64; or one for each layer, for
the methods that need a hidden one.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import (
    CLIENTS,
    COHORT,
    Federation,
    Played,
    digits,
    images,
    play,
    small_plan,
    small_work,
)
from fedjax_qp.models import models
from fedjax_qp.models.classifier import classifier

RATE, ROUNDS = 0.1, 4


class Work(NamedTuple):
    """What a client does in a round."""

    client: int
    size: int
    batches: list[tuple[np.ndarray, np.ndarray]]  # inputs [n, pixels + 1] and labels [n]


@cache
def softmax(units: tuple[int, ...] = ()) -> Federation:
    """Plain SGD; clients take 1 to 5 steps a round."""
    dataset = digits()
    build = models.build("mlp", dataset.train.inputs.shape[1:], dataset.classes, hidden=units)
    model = classifier(build, mean=dataset.mean, std=dataset.std, classes=dataset.classes)
    return images()._replace(model=model, optimizer=optax.sgd(RATE))


def first_weights() -> np.ndarray:
    return as_matrix(softmax().model.init(jax.random.key(0)).trainable)


def as_matrix(trainable) -> np.ndarray:
    (matrix,) = as_matrices(trainable)
    return matrix


def as_matrices(trainable) -> list[np.ndarray]:
    """One for each layer."""
    layers = [trainable[name] for name in sorted(trainable)]
    return [np.vstack([layer["kernel"], layer["bias"]]).astype(np.float64) for layer in layers]


def examples(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(digits().train.inputs)[indices].reshape(len(indices), -1) / 255
    return with_ones((pixels - 0.5) / 0.5), np.asarray(digits().train.labels)[indices]


def own_examples(client: int) -> tuple[np.ndarray, np.ndarray]:
    """All training examples of a client."""
    return examples(softmax().parts[client])


def cohorts() -> Iterator[list[Work]]:
    """The rounds that `trained` makes."""
    for number in range(ROUNDS):
        plan = small_plan(number, 1, lanes=1, capacity=1, work=small_work(softmax()))
        members = []
        for slot, (client, size) in enumerate(zip(plan.cohorts.clients[0], plan.cohorts.sizes[0], strict=True)):
            batches = plan.lanes.examples[0, 0][plan.lanes.slots[0, 0] == slot]
            members.append(Work(int(client), int(size), [examples(batch[batch >= 0]) for batch in batches]))
        yield members


def gradient(weights: np.ndarray, batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Of the mean cross-entropy."""
    inputs, labels = batch
    return inputs.T @ errors(inputs @ weights, labels)


def errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean cross-entropy's gradient by the logits."""
    scores = np.exp(logits - logits.max(1, keepdims=True))
    return (scores / scores.sum(1, keepdims=True) - np.eye(logits.shape[1])[labels]) / len(labels)


def with_ones(rows: np.ndarray) -> np.ndarray:
    return np.hstack([rows, np.ones((len(rows), 1))])


@cache
def trained(name: str, units: tuple[int, ...] = (), one_step: bool = False, **options: Any) -> Played:
    """A method after `ROUNDS` rounds without the engine; `one_step`: all clients take one step and take part always."""
    federation, cohort = softmax(units), COHORT
    if one_step:
        federation, cohort = federation._replace(batch=max(map(len, federation.parts))), CLIENTS
    algorithm = algorithms.build(name, federation.model, federation.optimizer, **options)
    return play(algorithm, federation, ROUNDS, cohort=cohort)
