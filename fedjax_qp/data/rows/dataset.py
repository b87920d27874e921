"""What a source of rows gives: its checks, its split, and the strata by which partitions deal rows out."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from fedjax_qp.data.dataset import MOST_CLASSES, Dataset, Target, owners
from fedjax_qp.data.examples import Examples
from fedjax_qp.registry import require

STRATA = 10  # of numbers: tenths of the training rows by the first number


def build_rows(
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    *,
    names: tuple[str, ...] = (),
    client_ids: Any = None,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Checks arrays and gives them the form that the simulator expects.

    What is predicted follows from the labels: whole numbers [N] or texts are classes, whole numbers 0 and 1 [N, L] say which
    of L labels apply, and floats [N] or [N, T] are numbers.

    Args:
      train: inputs [N, …], floats or whole numbers of any shape, and labels.
      test: the same for the test set; the shapes must agree.
      names: of the classes, labels or numbers; () numbers them, or takes the texts.
      client_ids: natural client of each training row, integers or strings [N], or None.
      notes: what a user should know of the data.

    Raises:
      ConfigurationError: the arrays are not such, or do not fit together.
    """
    inputs = [_inputs(name, part[0]) for name, part in (("train", train), ("test", test))]
    require(
        inputs[0].shape[1:] == inputs[1].shape[1:],
        f"training inputs {inputs[0].shape[1:]} and test inputs {inputs[1].shape[1:]} must have the same shape.",
    )
    require(
        inputs[0].dtype == inputs[1].dtype,
        f"training inputs are {inputs[0].dtype} and test inputs {inputs[1].dtype}: give both in one type.",
    )
    labels, names = _coded([np.asarray(train[1]), np.asarray(test[1])], names)
    target = _target(labels[0])
    forms = {"classes": np.int32, "labels": np.uint8, "numbers": np.float32}
    for name, given, rows in zip(("train", "test"), labels, inputs, strict=True):
        require(
            len(given) == len(rows) > 0 and given.shape[1:] == labels[0].shape[1:],
            f"{name} labels are {given.dtype} {given.shape} for {len(rows)} inputs; every input needs one, all of one shape.",
        )
        require(
            given.dtype.kind != "f" or np.isfinite(given).all(),
            f"{name} labels hold NaN or infinity: leave such rows out.",
        )
        require(
            _target(given) == target,
            f"{name} labels are {_target(given)}, but those to train on are {target}: whole numbers are classes, floats are "
            "numbers, and [N, L] of 0 and 1 are labels.",
        )
    if target == "numbers":
        labels = [given.reshape(len(given), -1) for given in labels]
    count = labels[0].shape[1] if target != "classes" else 1 + max(int(given.max()) for given in labels)
    if target == "classes":
        least = min(int(given.min()) for given in labels)
        require(
            least >= 0 and count <= MOST_CLASSES,
            f"labels are {least} … {count - 1}; they count from 0, below {MOST_CLASSES}.",
        )
        count = max(count, len(names), 2)
    require(len(names) in (0, count), f"{len(names)} names for {count} {target}; name all or none.")
    examples = [Examples(rows, given.astype(forms[target])) for rows, given in zip(inputs, labels, strict=True)]
    dataset = Dataset(
        *examples,
        classes=count,
        class_names=names,
        client_ids=owners(client_ids, len(labels[0])),
        mean=None,
        std=None,
        notes=notes,
        examples="rows",
    )
    return dataset._replace(target=target)


def split(labels: Shaped[np.ndarray, "N *rest"], share: float) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "t"]]:
    """Indices to train and to test on, both sorted: a share of each class, or of all rows, the same in every run."""
    order = np.random.default_rng(0).permutation(len(labels))
    groups = [order] if _target(labels) != "classes" else [order[labels[order] == label] for label in np.unique(labels)]
    test = np.sort(np.concatenate([group[: round(share * len(group))] for group in groups]))
    train = np.setdiff1d(order, test)
    require(
        len(train) > 0 and len(test) > 0, f"test_share = {share} of {len(labels)} rows leaves none to train or test on."
    )
    return train, test


def check_rows(dataset: Dataset) -> None:
    """Checks what a source of rows returned, whoever wrote it.

    Raises:
      ConfigurationError: it is not what `build_rows` gives.
    """
    build_rows(dataset.train, dataset.test, names=dataset.class_names, client_ids=dataset.client_ids)


def in_strata(dataset: Dataset) -> Dataset:
    """The data set with one class a row, as partitions by label need it.

    The classes themselves; of labels the first that applies, or none; of numbers the tenth of the training rows in which the
    first number lies.
    """
    train, test = (np.asarray(part.labels) for part in (dataset.train, dataset.test))
    if dataset.target == "classes":
        return dataset
    if dataset.target == "labels":
        count, names = dataset.classes + 1, (*dataset.class_names, "none") if dataset.class_names else ()
        coded = [np.where(part.any(1), part.argmax(1), dataset.classes) for part in (train, test)]
    else:
        edges = np.unique(np.quantile(train[:, 0], np.linspace(0, 1, STRATA + 1)[1:-1]))
        count, names = len(edges) + 1, _ranges(edges)
        coded = [np.digitize(part[:, 0], edges) for part in (train, test)]
    examples = (
        part._replace(labels=c.astype(np.int32)) for part, c in zip((dataset.train, dataset.test), coded, strict=True)
    )
    return Dataset(*examples, classes=count, class_names=names, client_ids=dataset.client_ids)


def _ranges(edges: np.ndarray) -> tuple[str, ...]:
    inner = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:], strict=False)]
    return (f"below {edges[0]:.4g}", *inner, f"from {edges[-1]:.4g}")


def _inputs(name: str, given: Any) -> np.ndarray:
    """Inputs in the type in which the device keeps them; the program makes them floats."""
    rows = np.asarray(given)
    require(
        rows.ndim >= 1 and len(rows) > 0, f"{name} inputs are {rows.dtype} {rows.shape}; at least one row is needed."
    )
    require(
        rows.dtype.kind in "fiub" and 0 not in rows.shape,
        f"{name} inputs are {rows.dtype} {rows.shape}; they must be numbers, at least one a row.",
    )
    if rows.dtype.kind == "f":
        rows = rows.astype(np.float32)
        require(np.isfinite(rows).all(), f"{name} inputs hold NaN or infinity: fill the gaps, or leave such rows out.")
    elif rows.dtype.itemsize > 2:
        small = np.abs(rows.astype(np.float64)).max() < 2**31
        rows = rows.astype(np.int32 if small else np.float32)
    return np.ascontiguousarray(rows.astype(np.uint8) if rows.dtype.kind == "b" else rows)


def _coded(labels: list[np.ndarray], names: Iterable[str]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Texts and truth values as classes."""
    if all(part.dtype.kind in "USOb" and part.ndim == 1 for part in labels):
        texts = [part.astype(str) for part in labels]
        found = np.unique(np.concatenate(texts))
        return [np.searchsorted(found, part) for part in texts], tuple(found.tolist())
    require(
        not any(part.dtype.kind in "USO" for part in labels),
        f"labels are {labels[0].dtype} {labels[0].shape} and {labels[1].dtype} {labels[1].shape}; texts must be [N] in both.",
    )
    return [part.astype(np.uint8) if part.dtype.kind == "b" else part for part in labels], tuple(names)


def _target(labels: np.ndarray) -> Target:
    require(
        labels.dtype.kind in "iufbUSO" and labels.ndim in (1, 2),
        f"labels are {labels.dtype} {labels.shape}; they must be whole numbers [N] (classes), 0 and 1 [N, L] (labels), or "
        "floats [N] or [N, T] (numbers).",
    )
    if labels.dtype.kind == "f":
        return "numbers"
    if labels.ndim == 1:
        return "classes"
    require(
        np.isin(labels, (0, 1)).all(), f"labels are whole numbers {labels.shape}; in this shape they must be 0 and 1."
    )
    return "labels"
