"""LEAF's JSON files: FEMNIST by writer, Shakespeare by role.

Source: Caldas et al., "LEAF: a benchmark for federated settings", arXiv 1812.01097, 2018. A folder holds `train` and `test`,
each with JSON files of the form {"users": […], "num_samples": […], "user_data": {user: {"x": […], "y": […]}}}.
"""

import json
import os
import string
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fedjax_qp.data.cached import cached
from fedjax_qp.data.dataset import Dataset, build_dataset
from fedjax_qp.data.examples import Examples
from fedjax_qp.data.registry import sources
from fedjax_qp.data.text.characters import WINDOW, character_dataset, codes
from fedjax_qp.registry import ConfigurationError, require
from fedjax_qp.settings.strict import load_json, read_text
from fedjax_qp.settings.values import shown

SIDE = 28  # pixels of FEMNIST's images
LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEYS = ("users", "num_samples", "user_data")


@sources.register("images")
def femnist(*, folder: str) -> Dataset:
    """FEMNIST out of LEAF's JSON files: handwritten digits and letters, 28×28, 62 classes, by writer.

    The partition `natural` makes each writer a client. Values 0 … 1 become bytes, as which they began; ink is dark. The
    arrays are kept in the cache, since reading the JSON of all 800,000 images takes minutes.

    Source: Caldas et al., "LEAF", arXiv 1812.01097, 2018; Cohen et al., "EMNIST", arXiv 1702.05373, 2017.

    Args:
      folder: LEAF's data/femnist/data after its preprocess.sh (`-t sample` splits every writer's images): it holds the
        folders train and test.

    Raises:
      ConfigurationError: a file is missing or has another form; names file and user.
    """
    train, test, writers = _read("femnist", folder, _images)
    note = (
        f"{len(np.unique(writers))} writers with {len(train.labels)} images to train on, {len(test.labels)} to test on"
    )
    dataset = build_dataset(train, test, len(LETTERS), tuple(LETTERS), client_ids=writers)
    return dataset._replace(notes=(note, *dataset.notes))


@sources.register("characters")
def shakespeare_leaf(*, folder: str) -> Dataset:
    """Shakespeare out of LEAF's JSON files: windows of 80 characters and the next character, by role.

    The partition `natural` makes each role a client. LEAF's windows overlap: they move on by one character.

    Source: Caldas et al., "LEAF", arXiv 1812.01097, 2018, which follows McMahan et al., AISTATS 2017.

    Args:
      folder: LEAF's data/shakespeare/data after its preprocess.sh (`-t sample`): it holds the folders train and test.

    Raises:
      ConfigurationError: a file is missing or has another form; names file and user.
    """
    train, test, clients = _read("shakespeare_leaf", folder, _windows)
    note = (
        f"{len(np.unique(clients))} roles with {len(train.labels)} windows to train on, {len(test.labels)} to test on"
    )
    return character_dataset(train, test, clients, (note,))


Convert = Callable[[list, list, str], Examples]


def _read(source: str, folder: str, convert: Convert) -> tuple[Examples, Examples, Int[np.ndarray, "N"]]:
    """Training and test examples, and the client of each training example in the order of the files; cached."""
    root = Path(os.path.expanduser(folder))
    # glob.glob finds nothing where Path.glob raises: in a folder with a name that is too long, or that nobody may read.
    files = {
        part: sorted(root / part / name for name in glob("*.json", root_dir=root / part)) for part in ("train", "test")
    }
    for part, found in files.items():
        require(
            bool(found),
            f"data source {source!r}: no JSON files in {root / part}; folder = {folder!r} must hold LEAF's folders train and "
            "test, which its preprocess.sh makes (with -t sample).",
        )

    def read() -> dict[str, np.ndarray]:
        arrays = {}
        for part, found in files.items():
            users = [pair for file in found for pair in _users(file, convert)]
            _require_once([user for user, _ in users], root / part)
            filled = [examples for _, examples in users if len(examples.labels)]
            require(bool(filled), f"data source {source!r}: the files in {root / part} hold no examples.")
            arrays[f"{part}_inputs"], arrays[f"{part}_labels"] = (
                np.concatenate(parts) for parts in zip(*filled, strict=True)
            )
            arrays[f"{part}_clients"] = np.repeat(np.arange(len(filled)), [len(each.labels) for each in filled])
        return arrays

    try:
        states = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for found in files.values() for file in found
        ]
    except OSError as error:
        raise ConfigurationError(
            f"data source {source!r}: {error.filename} cannot be read ({error.strerror})."
        ) from None
    inputs, labels, clients, test_inputs, test_labels, _ = cached(source, json.dumps(states), read).values()
    return Examples(inputs, labels), Examples(test_inputs, test_labels), clients


def _users(file: Path, convert: Convert) -> list[tuple[str, Examples]]:
    """The users of one file with their examples."""
    content = load_json(read_text(file), str(file))
    keys = shown(list(content)) if isinstance(content, dict) else type(content).__name__
    require(
        isinstance(content, dict) and all(key in content for key in KEYS),
        f"{file} holds {keys}; LEAF's files have the keys {', '.join(KEYS)}.",
    )
    users, sizes, data = (content[key] for key in KEYS)
    lists = isinstance(users, list) and isinstance(sizes, list) and len(users) == len(sizes)
    require(
        lists and all(isinstance(user, str) for user in users) and isinstance(data, dict),
        f"{file}: users (strings) and num_samples must be lists of one length, and user_data an object.",
    )
    hierarchies = content.get("hierarchies") or users
    require(
        isinstance(hierarchies, list) and len(hierarchies) == len(users),
        f"{file}: hierarchies, where it is given, must be a list as long as users ({len(users)}).",
    )
    unlisted = data.keys() - set(users)
    require(
        not unlisted,
        f"{file}: user_data holds {len(unlisted)} users whom the list users lacks, such as "
        f"{shown(min(unlisted, default=''))}; their examples would be lost.",
    )
    return [
        (user, _of_user(data.get(user), size, f"{file}, user {shown(user)}", convert))
        for user, size in zip(users, sizes, strict=True)
    ]


def _of_user(entry: Any, size: Any, where: str, convert: Convert) -> Examples:
    keys = shown(list(entry)) if isinstance(entry, dict) else type(entry).__name__
    require(
        isinstance(entry, dict) and isinstance(entry.get("x"), list) and isinstance(entry.get("y"), list),
        f"{where}: user_data holds {keys}; it needs the lists x and y.",
    )
    x, y = entry["x"], entry["y"]
    require(
        len(x) == len(y) == size,
        f"{where}: num_samples is {shown(size)}, but x has {len(x)} entries and y {len(y)}.",
    )
    return convert(x, y, where)


def _images(x: list, y: list, where: str) -> Examples:
    for number, image in enumerate(x):
        length = len(image) if isinstance(image, list) else type(image).__name__
        require(length == SIDE**2, f"{where}: x[{number}] has {length} values; an image has {SIDE}×{SIDE} = {SIDE**2}.")
    try:
        pixels = np.asarray(x) if x else np.zeros((0, SIDE**2))
    except ValueError:  # lists among the numbers
        pixels = np.asarray(None)
    require(
        pixels.dtype.kind in "iuf" and pixels.shape == (len(x), SIDE**2), f"{where}: x must hold numbers, nothing else."
    )
    outside = pixels[~((pixels >= 0) & (pixels <= 1))]
    require(not outside.size, f"{where}: x holds {outside[:1]}; values must be between 0 and 1.")
    for number, label in enumerate(y):
        if type(label) is not int or not 0 <= label < len(LETTERS):
            raise ConfigurationError(
                f"{where}: y[{number}] = {shown(label)}; labels are whole numbers from 0 to {len(LETTERS) - 1}."
            )
    pixels = pixels.astype(np.float32).reshape(-1, SIDE, SIDE)
    return Examples(np.round(pixels * 255).astype(np.uint8), np.array(y, np.int32))


def _windows(x: list, y: list, where: str) -> Examples:
    for name, values, length in (("x", x, WINDOW), ("y", y, 1)):
        for number, value in enumerate(values):
            if not isinstance(value, str) or len(value) != length:
                characters = "1 character" if length == 1 else f"{length} characters"
                raise ConfigurationError(
                    f"{where}: {name}[{number}] = {shown(value)} must be a string of {characters}."
                )
    return Examples(codes("".join(x)).reshape(-1, WINDOW), codes("".join(y)).astype(np.int32))


def _require_once(users: list[str], folder: Path) -> None:
    seen = set()
    for user in users:
        require(
            user not in seen,
            f"{folder}: the user {shown(user)} is listed twice; every user must stand in one file, once.",
        )
        seen.add(user)
