"""What each kind of examples means for a run: which task they make, and what else depends on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedjax_qp.config import Config
from fedjax_qp.data import Dataset, Instructions, check_dataset
from fedjax_qp.data.rows.dataset import check_rows, in_strata
from fedjax_qp.federated import Algorithm
from fedjax_qp.tasks.classification import classification_task
from fedjax_qp.tasks.instructions import instruction_task
from fedjax_qp.tasks.rows import rows_task
from fedjax_qp.tasks.task import Task


class Kind(NamedTuple):
    """One kind of examples."""

    check: Callable[[Any], None]  # of what a source of them returned
    task: Callable[[Config, Any, list[np.ndarray], Algorithm], Task]  # from the data and what each client has of them
    in_classes: Callable[[Any], Any] = lambda dataset: dataset  # the data with one class each, for partitions by class
    clients_have_tests: bool = False  # cut from their own examples, by the run's seed
    tunes_adapters: bool = False  # of a frozen model; then methods and settings that need adapters work


def _classification(config: Config, dataset: Dataset, parts: list[np.ndarray], algorithm: Algorithm) -> Task:
    return classification_task(config, dataset, parts)


def _rows(config: Config, dataset: Dataset, parts: list[np.ndarray], algorithm: Algorithm) -> Task:
    return rows_task(config, dataset, parts)


def _instructions(config: Config, data: Instructions, parts: list[np.ndarray], algorithm: Algorithm) -> Task:
    task = instruction_task(config, data, parts, rank_factor=algorithm.rank_factor)
    return task._replace(dataset=data)


def _unchecked(dataset: Instructions) -> None:
    """Records are checked where they are read."""


KINDS = {
    "images": Kind(check_dataset, _classification),
    "rows": Kind(check_rows, _rows, in_strata),
    "characters": Kind(check_dataset, _classification),
    "instructions": Kind(_unchecked, _instructions, clients_have_tests=True, tunes_adapters=True),
}
"""By the names that data sources and models declare."""
