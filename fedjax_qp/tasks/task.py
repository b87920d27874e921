"""The common form of all tasks."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree

from fedjax_qp.data import Dataset
from fedjax_qp.data.text.instructions import Instructions
from fedjax_qp.engine import PersonalTests, TestSet
from fedjax_qp.federated import Model
from fedjax_qp.models.language.adapted import AdaptedModel


class Task(NamedTuple):
    """Data and model of a run as the engine takes them; host arrays."""

    model: Model
    frozen: PyTree  # weights that nobody trains; () where there are none
    train: PyTree  # arrays [N, ...]
    test: TestSet
    personal: PersonalTests | None  # each client's own test examples, where the task has them
    parts: list[Int[np.ndarray, "n"]]  # per client, indices of its training examples
    sizes: list[int]  # per client, its weight by size
    counts: Int[np.ndarray, "K C"]  # training records per client and class, for the partition's table and figure
    class_names: tuple[str, ...]
    shares: Float[np.ndarray, "K C"] | None  # per client, its mixture of the classes; None where tests count tokens
    dataset: Dataset | Instructions | None = None  # what it was made of, where another run may be made of the same
    frozen_axes: PyTree = None  # of each frozen array, the axis along which devices may share it, or None
    language: AdaptedModel | None = None  # of instruction tuning
    notes: tuple[str, ...] = ()  # what a user should know of the data before the run
