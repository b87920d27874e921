"""Prediction from rows: classes, labels or numbers, from inputs that the program standardises."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedjax_qp.config import Config
from fedjax_qp.data import Dataset
from fedjax_qp.data.rows.dataset import in_strata
from fedjax_qp.federated import Model
from fedjax_qp.models import classifier, models
from fedjax_qp.models.heads import head
from fedjax_qp.registry import ConfigurationError, require
from fedjax_qp.tasks.classification import prediction_task
from fedjax_qp.tasks.task import Task


def rows_task(config: Config, dataset: Dataset, parts: list[np.ndarray]) -> Task:
    """The task of predicting what belongs to a row.

    Inputs, and numbers to predict, are standardised inside the program by the mean and the standard deviation of all
    training rows; those of the test rows are not looked at.

    Raises:
      ConfigurationError: a setting asks for classes where there are none.
    """
    if dataset.target != "classes":
        _check_settings(config, dataset)
    task = prediction_task(config, dataset, in_strata(dataset), parts, _model(config, dataset))
    return task if dataset.target == "classes" else task._replace(shares=None)


def _model(config: Config, dataset: Dataset) -> Model:
    shape = dataset.train.inputs.shape[1:]
    build = models[config.model.name](shape, dataset.classes, **config.model.options)
    labels = np.asarray(dataset.train.labels, np.float64)
    facts = {"mean": labels.mean(0), "std": _spread(labels)} if dataset.target == "numbers" else {}
    return classifier(
        build,
        classes=dataset.classes,
        scale=standardise(np.asarray(dataset.train.inputs)),
        head=head(dataset.target, dataset.classes, **facts),
        has_classes=dataset.target == "classes",
    )


def standardise(rows: np.ndarray) -> Callable[[Array], Float[Array, "B ..."]]:
    """Returns the function of a batch that subtracts the mean of these rows and divides by their standard deviation.

    Each entry of a row has its own; one that is always the same becomes 0.
    """
    rows = np.asarray(rows, np.float64)
    mean, std = rows.mean(0).astype(np.float32), _spread(rows).astype(np.float32)
    return lambda inputs: (inputs.astype(jnp.float32) - mean) / std


def _spread(values: np.ndarray) -> np.ndarray:
    found = values.std(0)
    return np.where(found > 1e-12 * np.abs(values).max(initial=0), found, 1)


def _check_settings(config: Config, dataset: Dataset) -> None:
    """Accuracies by class are what these settings are about."""
    test = config.partition.options["test"]
    if test != "common":
        raise ConfigurationError(
            f"partition.test = {test!r} deals test rows out by their classes, but data = {config.data.name!r} has "
            f"{dataset.target} to predict: choose common."
        )
    wanted = {"target_accuracy": config.evaluation.target_accuracy, "patience": config.evaluation.patience}
    for name, value in wanted.items():
        require(
            value is None or dataset.target == "labels",
            f"evaluation.{name} = {value} needs accuracies, but data = {config.data.name!r} has numbers to predict: leave it "
            "out.",
        )
