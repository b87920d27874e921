"""Text as windows of characters; the label of a window is the character that follows it."""

import numpy as np
from jaxtyping import Int, UInt8

from fedjax_qp.data.dataset import Dataset
from fedjax_qp.data.examples import Examples

# LEAF's order of characters (Caldas et al., "LEAF: a benchmark for federated settings", arXiv 1812.01097, 2018).
CHARACTERS = "\n !\"&'(),-.0123456789:;>?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "[]" + "abcdefghijklmnopqrstuvwxyz" + "}"
UNKNOWN = len(CHARACTERS)  # the code of every other character
CLASS_NAMES = ("newline", "space", *CHARACTERS[2:], "unknown")
WINDOW = 80  # characters


def codes(text: str) -> UInt8[np.ndarray, "n"]:
    """The code of each character: its place in CHARACTERS, or UNKNOWN."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    table = np.full(128, UNKNOWN, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(UNKNOWN)
    return np.where(points < 128, table[np.minimum(points, 127)], UNKNOWN).astype(np.uint8)


def windows(text: str) -> Examples:
    """Cuts a text into windows that do not overlap, one after another; an end shorter than a window is left out.

    Returns:
      Inputs [n, WINDOW] with n = (len(text) − 1) // WINDOW, and labels [n]: each is the first character of the next window.
    """
    coded = codes(text)
    count = max(len(coded) - 1, 0) // WINDOW
    inputs = coded[: count * WINDOW].reshape(count, WINDOW)
    return Examples(inputs, coded[WINDOW::WINDOW][:count].astype(np.int32))


def character_dataset(
    train: Examples, test: Examples, client_ids: Int[np.ndarray, "N"], notes: tuple[str, ...]
) -> Dataset:
    """The data set of windows; how many characters are outside the vocabulary is added to the notes."""
    unknown = sum(int((array == UNKNOWN).sum()) for part in (train, test) for array in part)
    if unknown:
        total = sum(array.size for part in (train, test) for array in part)
        notes = (*notes, f"{unknown} of {total} characters are outside the vocabulary: they share one code, 'unknown'")
    return Dataset(
        train,
        test,
        len(CLASS_NAMES),
        CLASS_NAMES,
        client_ids=client_ids,
        mean=None,
        std=None,
        notes=notes,
        examples="characters",
    )
