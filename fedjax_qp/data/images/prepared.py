"""Sets of images that tensorflow-datasets has prepared, read without TensorFlow."""

import importlib
import io
import json
import os
import re
import warnings
from glob import glob
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from fedjax_qp.data.cached import brief, cached
from fedjax_qp.data.dataset import MOST_CLASSES, Dataset, build_dataset
from fedjax_qp.registry import ConfigurationError, require, unknown_name


def read_prepared(
    name: str, folder: str | None, splits: tuple = ("train", "test"), label: str | None = None, names: tuple = ()
) -> Dataset:
    """Reads a set that tensorflow-datasets prepared, without TensorFlow; from the second time on out of the cache."""
    directory = _prepared_folder(name, folder)
    # Sizes and times stand for the content: hashing hundreds of megabytes would cost more than it saves.
    try:
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.iterdir())]
    except OSError as error:
        raise ConfigurationError(
            f"a file of the prepared data in {directory} cannot be read ({brief(error)}): prepare it again."
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
    tfds = import_module("tensorflow_datasets", "tensorflow-datasets array-record importlib_resources")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside tensorflow-datasets' own lazy imports
        try:
            return _read_splits(tfds, directory, splits, label)
        except ConfigurationError:
            raise
        except Exception as error:  # of protocol buffers, records and images, each in its own way
            raise ConfigurationError(
                f"the prepared data in {directory} cannot be read ({brief(error)}): is it whole? Otherwise prepare it again."
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
                f"split {split!r} of {directory} cannot be read, or is empty ({brief(error)}). It has "
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


def import_module(module: str, packages: str) -> ModuleType:
    """Imports a module that only some sources need, and says how to install it where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their deprecations are not ours
            return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"this data source needs `pip install {packages}` ({error}).") from None
