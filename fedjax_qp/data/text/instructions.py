"""Instruction data: what a client of federated instruction tuning trains on, and where it comes from.

A source is a function whose options are keyword-only and which returns `Instructions`. All read local files but
`alpaca_demo`, which asks pip for a package once.
"""

import glob
import itertools
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from fedjax_qp.data.cached import cached
from fedjax_qp.data.registry import sources
from fedjax_qp.data.text.package import fetch
from fedjax_qp.registry import ConfigurationError, require
from fedjax_qp.settings.strict import json_decoder, read_text
from fedjax_qp.settings.values import shown

# A first word stands for a category of its own where at least this share of the records without one begin with it.
FREQUENT_WORD = 0.01
OTHER = "other"

DEMO_PACKAGE, DEMO_VERSION = "llamafactory", "0.9.5"
DEMO_FILE = "alpaca_en_demo.json"
DEMO_SHA256 = "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"


class Record(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    context: str  # "" where there is none
    response: str
    category: str
    where: str = ""  # file, line and number, for messages


class Records(NamedTuple):
    """Records in the order of their files; `labels` lets the partitions of labelled images work on them."""

    records: tuple[Record, ...]
    labels: Int32[np.ndarray, "N"]  # index of the category in `class_names`


class Instructions(NamedTuple):
    """Training and test records of one source; partitions index into `train`."""

    train: Records
    test: Records  # may be empty
    classes: int
    class_names: tuple[str, ...]  # the categories, sorted
    client_ids: Int[np.ndarray, "N"] | None = None  # index of the file that a training record came from
    examples: str = "instructions"


@sources.register("instructions")
def records(*, files: tuple[str, ...] | str, test_file: str | None = None, limit: int | None = None) -> Instructions:
    """Your own records: JSON or JSON lines, with the keys of Alpaca or of Dolly, mixed as you like.

    Keys: `instruction`, `input` or `context` (optional), `output` or `response`, and `category` (optional). Without a
    category, a record gets the first word of its instruction ("write", "explain") as one, in small letters; words that
    begin less than 1 % of such records are "other". That rule is ours; it gives Alpaca a heterogeneous partition.

    Source: Conover et al., "Free Dolly", 2023, and Taori et al., "Stanford Alpaca", 2023, for the keys; Zhang et al.,
    "Towards building the federated GPT" (Shepherd), arXiv 2305.05644, for one file a client (`partition: natural`).

    Args:
      files: a file, a folder (all its .json and .jsonl files) or a pattern such as `data/client_*.json`, or several of
        these. What a folder or a pattern finds is in natural order: client_2 before client_10.
      test_file: records to test on; left out of a folder or pattern that contains it.
      limit: cap on the records read from each training file, for a first try.

    Raises:
      ConfigurationError: a file is missing, empty or no JSON, or a record lacks a key or an answer; names file and line.
    """
    require(limit is None or limit >= 1, f"limit = {limit} must be at least 1, or null for all records.")
    test_path = None if test_file is None else Path(os.path.expanduser(test_file))
    paths = _expand((files,) if isinstance(files, str) else files, test_path)
    by_file = [_read(path, limit) for path in paths]
    client_ids = np.repeat(np.arange(len(by_file)), [len(items) for items in by_file])
    train = [record for items in by_file for record in items]
    return _with_categories(train, [] if test_path is None else _read(test_path, None), client_ids)


@sources.register("instructions")
def alpaca_demo(*, folder: str | None = None) -> Instructions:
    """999 records in Alpaca's format, carried by the source distribution of LLaMA-Factory 0.9.5; no test records.

    The first use lets pip fetch that package (5 MB, without its dependencies), with your own pip settings, and keeps its
    file of records in the cache. Nothing is installed; pip runs the package's build back end to read its metadata.

    Source: Taori et al., "Stanford Alpaca", 2023; Zheng et al., "LlamaFactory", arXiv 2403.13372, 2024.

    Args:
      folder: a folder that holds alpaca_en_demo.json; None takes the cache, or pip.

    Raises:
      ConfigurationError: pip cannot fetch the package, or the file is not the one that is expected.
    """
    if folder is not None:
        return _with_categories(_read(Path(os.path.expanduser(folder)) / DEMO_FILE, None), [], None)
    fingerprint = f"{DEMO_PACKAGE} {DEMO_VERSION} {DEMO_SHA256}"
    content = cached("alpaca_demo", fingerprint, lambda: {"content": np.frombuffer(_fetch_demo(), np.uint8)})
    text = content["content"].tobytes().decode()
    return _with_categories(list(_parse(text, DEMO_FILE)), [], None)


def _expand(files: Iterable[str], test_path: Path | None) -> list[Path]:
    """Returns the files that are meant, each once."""
    found: list[Path] = []
    for given in files:
        try:
            named, matches = _matches(Path(os.path.expanduser(given)))
        except OSError as error:  # a name that is too long
            raise ConfigurationError(
                f"files: {shown(given)} cannot be looked up ({error}): give another path."
            ) from None
        if named:
            found += matches
            continue
        matches = [file for file in matches if test_path is None or file.resolve() != test_path.resolve()]
        require(
            bool(matches),
            f"files: {shown(given)} is no file, no folder with .json or .jsonl files and no pattern that finds files (from "
            f"{Path.cwd()}). Give the path of your records.",
        )
        found += sorted(matches, key=_natural_order)
    require(bool(found), "files is empty: name at least one file, folder or pattern.")
    uses = Counter(path.resolve() for path in [*found, *([] if test_path is None else [test_path])])
    path, count = uses.most_common(1)[0]
    require(count == 1, f"files: {path} is given {count} times (as a file to train on or to test on); name it once.")
    return found


def _matches(path: Path) -> tuple[bool, list[Path]]:
    """Whether the path names one file, and the files that it means."""
    if path.is_file():
        return True, [path]
    if path.is_dir():
        return False, [file for file in path.iterdir() if file.suffix in (".json", ".jsonl")]
    return False, [file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file()]


def _natural_order(path: Path) -> list:
    """A sort key under which numbers in names count as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _read(path: Path, limit: int | None) -> list[Record]:
    found = list(itertools.islice(_parse(read_text(path), str(path)), limit and min(limit, sys.maxsize)))
    require(bool(found), f"{path} holds no records; it must be a JSON list of objects, or JSON lines.")
    return found


def _parse(text: str, name: str) -> Iterator[Record]:
    for number, (line, value) in enumerate(_values(text, name), start=1):
        yield _record(value, f"{name}, line {line}, record {number}")


def _values(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """Yields the items of a JSON list, or JSON values one after another, each with the line on which it begins."""
    blank, gap = re.compile(r"\s*"), re.compile(r"\s*(,?)\s*")

    def skip(place: int) -> int:
        match = blank.match(text, place)
        return match.end() if match else place

    place = skip(0)
    in_list = text.startswith("[", place)
    place = skip(place + in_list)
    line, counted = 1, 0
    while place < len(text) and not (in_list and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = json_decoder(f"{name}, line {line}").raw_decode(text, place)
        except ConfigurationError:  # a repeated key
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{name}, line {line}: not valid JSON ({error}). The file must be a JSON list of objects, or JSON lines."
            ) from None
        yield line, value
        between = gap.match(text, place)
        assert between is not None  # it matches nothing as well
        place = between.end()
        if in_list and place < len(text) and bool(between[1]) == (text[place] == "]"):
            raise ConfigurationError(
                f"{name}: in a list, one comma stands between two records and none at its end; look after the record that "
                f"begins on line {line}."
            )
    require(not in_list or text[place:].strip() == "]", f"{name}: the list ends amiss; is the file whole?")


def _record(value: Any, where: str) -> Record:
    """Checks one record and names its parts in our way."""
    keys = "needed are `instruction` and `output` (or `response`); `input` (or `context`) and `category` are optional"
    require(isinstance(value, dict), f"{where}: this is {type(value).__name__}, not an object; {keys}.")
    all_keys = shown(list(value))[1:-1] or "none"

    def part(*names: str, default: str | None = None) -> str:
        there = [name for name in names if name in value]
        given = f"it has the keys {all_keys}"
        require(len(there) < 2, f"{where}: {' and '.join(there)} mean the same, give one; {given}.")
        if not there:
            require(default is not None, f"{where}: {' or '.join(names)} is missing; {given}; {keys}.")
            return default or ""
        text = value[there[0]]
        require(isinstance(text, str), f"{where}: {there[0]} = {shown(text)} must be a string; {given}; {keys}.")
        check_characters(text, f"{where}: {there[0]}")
        return text

    response, instruction = part("response", "output"), part("instruction")
    context, category = part("context", "input", default=""), part("category", default="")
    require(
        not _blank(response),
        f"{where}: the response is empty, so there is nothing to learn from it. Remove the record or give it an answer; "
        f"it has the keys {all_keys}.",
    )
    require(
        not _blank(instruction),
        f"{where}: the instruction is empty. Remove the record, or put what it asks for there; it has the keys {all_keys}.",
    )
    return Record(instruction, context, response, category.strip(), where)


def check_characters(text: str, where: str) -> None:
    """Checks that a text is made of whole characters, which tokenizers take for granted.

    Raises:
      ConfigurationError: it has half of a surrogate pair.
    """
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise ConfigurationError(
            f"{where} has half of a surrogate pair, {found[0]!a}, which is no character: write both halves, or none."
        )


def _blank(text: str) -> bool:
    """Whether there is nothing to see: spaces, controls and characters of no width."""
    return all(one.isspace() or unicodedata.category(one) in ("Cc", "Cf") for one in text)


def _with_categories(train: list[Record], test: list[Record], client_ids: np.ndarray | None) -> Instructions:
    """Gives every record a category, and the categories numbers."""
    words = Counter(_first_word(record) for record in train if not record.category)
    frequent = {word for word, count in words.items() if count >= FREQUENT_WORD * words.total()}

    def categorised(record: Record) -> Record:
        word = _first_word(record)
        return record if record.category else record._replace(category=word if word in frequent else OTHER)

    train, test = ([categorised(record) for record in part] for part in (train, test))
    names = sorted({record.category for record in (*train, *test)})
    index = {name: label for label, name in enumerate(names)}
    parts = [
        Records(tuple(part), np.array([index[record.category] for record in part], np.int32)) for part in (train, test)
    ]
    return Instructions(*parts, classes=len(names), class_names=tuple(names), client_ids=client_ids)


def _first_word(record: Record) -> str:
    match = re.search(r"\w+", record.instruction)
    return match[0].lower() if match else OTHER


def _fetch_demo() -> bytes:
    remedy = (
        f"Give a folder that holds {DEMO_FILE} as the option `folder` (it is in the folder data of LLaMA-Factory's "
        f"source), or take your own records with the source 'records'."
    )
    names = (f"data/{DEMO_FILE}",)
    return fetch("alpaca_demo", DEMO_PACKAGE, DEMO_VERSION, names, sha256=DEMO_SHA256, remedy=remedy)[0]
