"""What a source of images or characters gives, and the checks that every one of them passes."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from fedjax_qp.data.examples import Examples
from fedjax_qp.registry import require

MOST_CLASSES = 100_000  # of a set of labelled images; the largest have 20,000
# Pixels are bytes. Images that use less than a quarter of their range are hardly what was meant.
DARK = 64


Target = Literal["classes", "labels", "numbers"]
"""What is predicted: one of several classes, which of several labels apply, or numbers."""


class Dataset(NamedTuple):
    """Training and test examples of one source: images, rows or windows of text; numpy arrays.

    Partitions index into `train`, so its order is part of the source: that of the original files where it is known.
    """

    train: Examples  # inputs: pixels uint8 [N, H, W, C], codes of characters uint8 [N, T], or rows [N, …]; labels int32 [N],
    # or uint8 [N, classes] (0 and 1) where they are labels, or float32 [N, classes] where they are numbers
    test: Examples
    classes: int  # or labels, or numbers
    class_names: tuple[str, ...] = ()  # () where the source does not name them
    client_ids: Int[np.ndarray, "N"] | None = None  # who made each training example, where the source knows
    mean: tuple[float, ...] | None = (0.5,)  # per channel, of pixels scaled to 0 … 1; None for codes and rows
    std: tuple[float, ...] | None = (0.5,)
    notes: tuple[str, ...] = ()  # what a user should know of the data before a run
    examples: str = ""  # their kind, see `registry.EXAMPLES`; "" = the one that the source declares
    target: Target = "classes"


def build_dataset(
    train: Iterable, test: Iterable, classes: int = 0, names: tuple = (), client_ids: Any = None
) -> Dataset:
    """Checks the arrays of a source and gives them the form that the simulator expects.

    Source: FedMut (AAAI 2024), settings: inputs normalised with mean 0.5 and standard deviation 0.5.

    Args:
      train: images uint8 [N, H, W] or [N, H, W, C], and integer labels [N].
      test: the same for the test set; the image shape must agree.
      classes: number of classes; 0 counts the names, or takes the largest label + 1.
      names: one name a class, or ().
      client_ids: natural client of each training example, integers or strings [N], or None.

    Raises:
      ConfigurationError: the arrays are not such, or do not fit together.
    """
    examples = [_checked(name, *pair) for name, pair in (("train", train), ("test", test))]
    shape, test_shape = (part.inputs.shape[1:] for part in examples)
    require(shape == test_shape, f"training images {shape} and test images {test_shape} must have the same shape.")
    found = np.unique(np.concatenate([part.labels for part in examples]))
    largest = int(found[-1])
    require(
        classes > 0 or len(names) > 0 or largest < max(100, 10 * len(found)),
        f"the largest label is {largest}, but only {len(found)} different labels occur. Number the classes from 0 without "
        "gaps, or name every class (class_names).",
    )
    known = f"{len(names)} classes (as many as class_names has)" if names and not classes else f"{classes} classes"
    classes = classes or len(names) or largest + 1
    require(largest < classes, f"a label is {largest}; with {known} labels are 0 … {classes - 1}.")
    require(len(names) in (0, classes), f"{len(names)} class names for {classes} classes; name all or none.")
    client_ids = owners(client_ids, len(examples[0].labels))
    half = (0.5,) * shape[-1]
    ends = [(int(part.inputs.min()), int(part.inputs.max())) for part in examples]  # a pass over all images
    for name, pixels in zip(("train", "test"), ends, strict=True):
        require(
            pixels != (0, 1),
            f"{name} images have the pixels 0 and 1 only; they must be bytes, 0 … 255: multiply them by 255.",
        )
    notes = (*_notes_on_pixels(ends), *_notes_on_classes(examples, classes))
    return Dataset(
        *examples,
        classes=classes,
        class_names=names,
        client_ids=client_ids,
        mean=half,
        std=half,
        notes=notes,
        examples="images",
    )


def owners(client_ids: Any, examples: int) -> Int[np.ndarray, "N"] | None:
    """The natural client of each training example as an integer; texts are numbered in their order.

    Raises:
      ConfigurationError: they are neither integers nor texts, or not one for each example.
    """
    if client_ids is None:
        return None
    ids = np.asarray(client_ids)
    require(
        ids.shape == (examples,) and ids.dtype.kind in "iuUS",
        f"client_ids is {ids.dtype} {ids.shape}; it must be integers or strings of shape {(examples,)}.",
    )
    return np.unique(ids, return_inverse=True)[1] if ids.dtype.kind in "US" else ids


def check_dataset(dataset: Dataset) -> None:
    """Checks what a source returned, whoever wrote it: on the device an index that leads nowhere is clamped in silence.

    Raises:
      ConfigurationError: labels or codes have no class, examples are missing or not finite, or clients unknown.
    """
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        inputs, labels = (np.asarray(array) for array in part)
        require(
            labels.ndim == 1 and 0 < len(labels) == len(inputs),
            f"the data source returned {len(inputs)} {name} inputs with labels {labels.shape}; every input needs one label, "
            "and at least one input is needed.",
        )
        _check_codes(f"{name} labels", labels, dataset.classes)
        if inputs.dtype.kind == "f":
            require(np.isfinite(inputs).all(), f"the data source returned {name} inputs that are NaN or infinite.")
        elif dataset.mean is None:
            _check_codes(f"{name} inputs", inputs, dataset.classes)
    ids, expected = np.asarray(dataset.client_ids), np.shape(dataset.train.labels)
    require(
        dataset.client_ids is None or ids.shape == expected,
        f"the data source returned client_ids {ids.shape}; their shape must be {expected}, that of the training labels.",
    )
    require(
        dataset.client_ids is None or ids.dtype.kind in "iuUS",
        f"the data source returned client_ids {ids.dtype}; they must be integers or strings.",
    )


def _check_codes(name: str, codes: np.ndarray, classes: int) -> None:
    allowed = f"with {classes} classes they must be integers from 0 to {classes - 1}."
    require(codes.dtype.kind in "iu", f"the data source returned {name} {codes.dtype}; {allowed}")
    least, largest = int(codes.min()), int(codes.max())
    require(least >= 0 and largest < classes, f"the data source returned {name} from {least} to {largest}; {allowed}")


def _checked(name: str, inputs: np.ndarray, labels: np.ndarray) -> Examples:
    require(
        inputs.dtype == np.uint8 and inputs.ndim in (3, 4),
        f"{name} images are {inputs.dtype} {inputs.shape}; they must be uint8 (raw pixels, 0 … 255; the model scales "
        "them) of shape [N, H, W] or [N, H, W, C].",
    )
    require(
        labels.dtype.kind in "iu" and labels.shape == inputs.shape[:1] and len(labels) > 0,
        f"{name} labels are {labels.dtype} {labels.shape} for {len(inputs)} images; they must be integers, one an "
        "image, and at least one.",
    )
    require(0 not in inputs.shape, f"{name} images are {inputs.shape}; height, width and channels must be at least 1.")
    for label in (int(labels.min()), int(labels.max())):
        require(
            0 <= label < MOST_CLASSES,
            f"{name} has the label {label}; labels count from 0 (-1 is unlabelled data) and are below {MOST_CLASSES}.",
        )
    inputs = inputs if inputs.ndim == 4 else inputs[..., None]
    return Examples(np.ascontiguousarray(inputs), labels.astype(np.int32))


def _notes_on_pixels(ends: list[tuple[int, int]]) -> Iterator[str]:
    for name, (least, largest) in zip(("training", "test"), ends, strict=True):
        if least == largest:
            yield f"every pixel of the {name} images is {least}: there is nothing to tell them apart by"
        elif largest < DARK:
            yield f"the largest pixel of the {name} images is {largest}: pixels are bytes, 0 … 255; is the scale right?"


def _notes_on_classes(parts: list[Examples], classes: int) -> Iterator[str]:
    trained, tested = (np.bincount(part.labels, minlength=classes) for part in parts)
    absent = np.flatnonzero(trained == 0)
    if len(absent):
        few = f"{', '.join(map(str, absent[:5]))}{', …' if len(absent) > 5 else ''}"
        hint = "; labels count from 0" if absent.tolist() == [0] else ""
        yield f"{len(absent)} of {classes} classes have no training examples: {few}{hint}"
    if len(absent) >= classes - 1:
        yield f"all training examples are of one class, {trained.argmax()}"
    if unknown := int(tested[absent].sum()):
        yield f"{unknown} of {tested.sum()} test examples are of classes without training examples: nothing teaches them"
    if untested := int((tested == 0).sum() - (tested[absent] == 0).sum()):
        yield f"{untested} of {classes} classes are trained but have no test examples: no test shows what is learnt of them"
