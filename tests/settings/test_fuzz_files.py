"""Damaged files of every kind, read by the ordinary loaders: refused in one line, or read, and then read right.

Files are cut, flipped, emptied, doubled and re-encoded; values are replaced by ones of another type or of absurd size; keys
are repeated. No loader may raise anything but a ConfigurationError, and none may take longer than PATIENCE. The suite takes a
sample of each kind; all of them, more than two thousand, are marked slow.
"""

import io
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.damage import as_bytes, damaged_bytes, damaged_values

from fedjax_qp import config as configuration
from fedjax_qp.data import check_dataset, check_partition, partitions, sources
from fedjax_qp.data.text.characters import WINDOW, codes
from fedjax_qp.experiment import resolve
from fedjax_qp.registry import ConfigurationError

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
from support.small_gguf import write_model

from fedjax_qp.models.language.gguf import import_gguf
from fedjax_qp.models.language.pretrained import load_weights, read_config
from fedjax_qp.models.language.tokenizer import load_tokenizer

PATIENCE = 20  # seconds
LONGEST = 500  # characters of a message, apart from the path of the test's folder
SAMPLE = 12  # every so-manieth input is in the suite


class _TooLong(BaseException):
    """A loader took longer than PATIENCE; no `except Exception` may swallow it."""


# ---- The kinds of files: an intact one, its damage, and what reads it and checks what was read -----------------------


class Kind(NamedTuple):
    name: str  # of the file, in the folder
    intact: bytes
    cases: Callable[[np.random.Generator], Iterator[tuple[str, bytes]]]
    read: Callable[[Path], None]
    beside: tuple[tuple[str, bytes], ...] = ()  # other files of the folder


def strict_json(file: Path) -> Any:
    """The file by Python's own parser, where no key is repeated."""

    def once(pairs: list) -> dict:
        assert len(dict(pairs)) == len(pairs), "a repeated key was accepted"
        return dict(pairs)

    return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=once)


ARRAYS = {
    "train_inputs": np.random.default_rng(0).integers(0, 256, (12, 4, 4)).astype(np.uint8),
    "train_labels": np.arange(12) % 3,
    "test_inputs": np.random.default_rng(1).integers(0, 256, (6, 4, 4)).astype(np.uint8),
    "test_labels": np.arange(6) % 3,
    "client_ids": np.arange(12) // 4,
    "class_names": np.array(["cat", "dog", "fish"]),
}


def saved(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def hostile_arrays(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    rows = len(array)
    for kind in ("float64", "float16", "int8", "uint64", "bool", "U5", "S5", "datetime64[s]", "complex64", ">i4"):
        yield kind, np.ones(rows, np.int64).astype(kind)
    for value in (-1, 2, 3, 99, 10**6, 2**31, 2**32 + 1, 2**62):
        yield f"last {value}", np.array([*range(rows - 1), value]) % max(value, rows)
        yield f"all {value}", np.full(rows, value)
    yield "uint64", np.full(rows, 2**64 - 1, np.uint64)
    yield "NaN", np.full(rows, np.nan)
    yield "one too many", np.concatenate([array, array[:1]])
    yield "none", array[:0]
    yield "a column", np.asarray(array)[..., None]
    yield "one-hot", np.eye(3, dtype=int)[np.arange(rows) % 3]
    yield "no axis", np.asarray(array[0])
    yield "four axes", np.zeros((rows, 2, 2, 2, 2), np.uint8)
    yield "structure", np.zeros(rows, [("a", int), ("b", float)])
    for shape in ((0, 4), (4, 0), (4, 4, 0), (0, 0), (1, 1), (300, 1, 3)):
        yield f"images {shape}", np.zeros((rows, *shape), np.uint8)
    for largest in (1, 2, 16):
        yield f"pixels up to {largest}", (np.arange(rows * 16).reshape(rows, 4, 4) % (largest + 1)).astype(np.uint8)


def archives(numbers: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield from damaged_bytes(saved(ARRAYS), numbers)
    for key, array in ARRAYS.items():
        yield f"without {key}", saved({name: other for name, other in ARRAYS.items() if name != key})
        for name, other in hostile_arrays(array):
            yield f"{key}: {name}", saved({**ARRAYS, key: other})


def read_archive(file: Path) -> None:
    dataset = sources.build("arrays", path=str(file))
    check_dataset(dataset)
    raw = np.load(file)
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        assert examples.labels.tolist() == raw[f"{part}_labels"].tolist() and examples.labels.max() < dataset.classes
        np.testing.assert_array_equal(examples.inputs.reshape(raw[f"{part}_inputs"].shape), raw[f"{part}_inputs"])
    assert dataset.classes <= max(100, 10 * len(np.unique(dataset.train.labels)))
    assert dataset.class_names in ((), tuple(raw["class_names"].tolist()) if "class_names" in raw else ())
    if dataset.client_ids is not None:
        parts = partitions.build("natural", dataset, np.random.default_rng(0))
        groups = {tuple(np.flatnonzero(raw["client_ids"] == value)) for value in np.unique(raw["client_ids"])}
        assert {tuple(part) for part in parts} == groups


SPLIT = {"num_users": 3, "train_data": {"0": [0, 3, 5], "1": [1, 2, 9, 10], "2": [4, 6, 7, 8, 11]}}


def read_split(file: Path) -> None:
    whole = io.BytesIO(saved(ARRAYS))
    arrays = np.load(whole)
    dataset = sources["arrays"].__globals__["build_dataset"](
        (arrays["train_inputs"], arrays["train_labels"]), (arrays["test_inputs"], arrays["test_labels"])
    )
    parts = partitions.build("json_file", dataset, np.random.default_rng(0), path=str(file))
    check_partition(parts, dataset, complete=True)
    lists = strict_json(file)["train_data"]
    assert [part.tolist() for part in parts] == [sorted(lists[str(number)]) for number in range(len(lists))]
    assert sorted(np.concatenate(parts)) == list(range(12))


PIXELS = np.random.default_rng(2).integers(0, 256, (3, 784))
TEXT = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows"
WRITERS = {
    "users": ["ann", "bob"],
    "num_samples": [2, 1],
    "hierarchies": [],
    "user_data": {
        "ann": {"x": (PIXELS[:2] / 255).tolist(), "y": [3, 61]},
        "bob": {"x": (PIXELS[2:] / 255).tolist(), "y": [35]},
    },
}
ROLES = {
    "users": ["HAM", "FOOL"],
    "num_samples": [2, 1],
    "user_data": {
        "HAM": {"x": [TEXT[:WINDOW], TEXT[1 : 1 + WINDOW]], "y": [TEXT[WINDOW], TEXT[1 + WINDOW]]},
        "FOOL": {"x": [TEXT[5 : 5 + WINDOW]], "y": [TEXT[5 + WINDOW]]},
    },
}


def of_leaf(content: dict) -> tuple[list, list]:
    """All x and all y, in the order of the users."""
    assert set(content["users"]) == set(content["user_data"])
    entries = [content["user_data"][user] for user in content["users"]]
    return [x for entry in entries for x in entry["x"]], [y for entry in entries for y in entry["y"]]


def read_writers(file: Path) -> None:
    dataset = sources.build("femnist", folder=str(file.parent.parent))
    check_dataset(dataset)
    x, y = of_leaf(strict_json(file))
    assert dataset.train.labels.tolist() == y
    np.testing.assert_array_equal(
        dataset.train.inputs.reshape(len(y), -1), np.round(np.array(x, np.float32) * 255).astype(np.uint8)
    )


def read_roles(file: Path) -> None:
    dataset = sources.build("shakespeare_leaf", folder=str(file.parent.parent))
    check_dataset(dataset)
    x, y = of_leaf(strict_json(file))
    assert [row.tolist() for row in dataset.train.inputs] == [codes(window).tolist() for window in x]
    assert dataset.train.labels.tolist() == codes("".join(y)).tolist()


RECORDS = [
    {"instruction": "Write a line.", "input": "About roses.", "output": "Roses are red.", "category": "poem"},
    {"instruction": "Say two.", "response": "Two.", "context": ""},
    {"instruction": "Add 1 and 1.", "output": "2"},
]


def record_files(numbers: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    lines = [json.dumps(record) for record in RECORDS]
    yield from damaged_bytes("\n".join(lines).encode(), numbers)
    yield "as a list", json.dumps(RECORDS).encode()
    yield "with empty lines", "\n\n".join(lines).encode()
    yield "with CR and LF", "\r\n".join(lines).encode()
    yield "two lists", (json.dumps(RECORDS) * 2).encode()
    for number, record in enumerate(RECORDS):
        for name, line in damaged_values(record, numbers, 40):
            text = "\n".join([*lines[:number], line, *lines[number + 1 :]])
            yield f"record {number}, {name}", text.encode("utf-8", "surrogatepass")


def read_records(file: Path) -> None:
    dataset = sources.build("records", files=str(file))
    for record in dataset.train.records:
        assert record.response.strip()
        for text in (record.instruction, record.context, record.response, record.category):
            text.encode("utf-8")  # a lone surrogate has no bytes, and no tokenizer takes it
    text, values, place = file.read_text(encoding="utf-8-sig"), [], 0
    if text.lstrip().startswith("["):
        return
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: pairs)
    while place < len(text):  # values may also follow one another in a line, or fill several
        if text[place] in " \t\n\r,":
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        values.append(value)
    assert all(len(dict(pairs)) == len(pairs) for pairs in values), "a repeated key was accepted"
    assert len(values) == len(dataset.train.records)


SETTINGS = """\
name: fuzz
rounds: 2
seed: 3
data: digits
partition: {name: dirichlet, clients: 6, beta: 0.5, minimum: 5}
model: {name: mlp, hidden: [8]}
algorithm: {name: fedprox, proximal: 0.1}
local: {optimizer: sgd, learning_rate: 0.05, momentum: 0.0, epochs: 1, batch_size: 20}
participation: {cohort: 4, dropout: 0.1}
evaluation: {every: 1, batch_size: 100}
engine: {lanes: 2, rounds_per_chunk: 2}
"""


def settings(numbers: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    yield from damaged_bytes(SETTINGS.encode(), numbers)
    import yaml

    yield from as_bytes(damaged_values(yaml.safe_load(SETTINGS), numbers, 150))  # YAML contains JSON
    for line in SETTINGS.splitlines():
        yield f"twice {line:.12}", (SETTINGS + line + "\n").encode()
    aliases = "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))
    for text in (
        "&a [*a]",
        "!!python/object/apply:os.system [true]",
        f"a0: &a0 [1]\n{aliases}",
        "? [1]\n: 2",
        "<<: 3",
        "2026-99-99",
    ):
        yield f"{text:.20}", (SETTINGS + text).encode()
        yield f"name: {text:.20}", SETTINGS.replace("fuzz", text).encode()


def read_settings(file: Path) -> None:
    config = resolve(configuration.load(file))
    values = configuration.to_dict(config)
    assert configuration.to_dict(resolve(configuration.from_dict(values))) == values

    def finite(value: Any) -> bool:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return all(map(finite, parts)) and not (isinstance(value, float) and not math.isfinite(value))

    assert finite(values), "a number that is not finite was accepted"


# A model of the smallest size, imported from a GGUF file as llama.cpp's own package writes it.
def model_files(intact: bytes) -> Callable[[np.random.Generator], Iterator[tuple[str, bytes]]]:
    """Damage of a GGUF file: most of it where it matters, in the description before the tensors."""

    def cases(numbers: np.random.Generator) -> Iterator[tuple[str, bytes]]:
        description = intact.rindex(b"weight")
        yield from ((name, content) for name, content in damaged_bytes(intact, numbers, 20))
        for place in numbers.integers(0, 600, 60):  # the numbers of the model, before its tokens
            value = int(numbers.choice([0, 1, 2, 127, 128, 255]))
            yield f"byte {place} = {value}", intact[:place] + bytes([value]) + intact[place + 1 :]
        for place in numbers.integers(600, description, 40):
            value = int(numbers.integers(256))
            yield f"byte {place} = {value}", intact[:place] + bytes([value]) + intact[place + 1 :]
        for place in numbers.integers(0, 600, 20):
            yield f"8 bytes of 255 at {place}", intact[:place] + b"\xff" * 8 + intact[place + 8 :]

    return cases


def read_gguf(file: Path) -> None:
    folder = import_gguf(file, file.with_suffix(""))
    config = read_config(folder)
    load_weights(folder, config)
    check_ids(load_tokenizer(folder))


def check_ids(tokenizer: Any) -> None:
    ids = tokenizer("hi 12 é猫")["input_ids"]
    assert all(type(number) is int and 0 <= number < len(tokenizer) for number in ids)


def read_tokenizer(file: Path) -> None:
    check_ids(load_tokenizer(file.parent))
    strict_json(file)


def read_model(file: Path) -> None:
    config = read_config(file.parent)
    for value in config._asdict().values() if hasattr(config, "_asdict") else vars(config).values():
        assert not isinstance(value, float) or (math.isfinite(value) and value > 0)
    load_weights(file.parent, config)
    strict_json(file)


# ---- The tests ------------------------------------------------------------------------------------------------------


def json_kind(name: str, content: Any, read: Callable[[Path], None], count: int, **beside: Any) -> Kind:
    intact = json.dumps(content).encode()

    def cases(numbers: np.random.Generator) -> Iterator[tuple[str, bytes]]:
        yield from damaged_bytes(intact, numbers)
        yield from as_bytes(damaged_values(content, numbers, count))

    return Kind(name, intact, cases, read, **beside)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("model")
    intact = write_model(folder / "model.gguf").read_bytes()
    model = import_gguf(folder / "model.gguf", folder / "model")
    contents = {file.name: file.read_bytes() for file in model.iterdir()}

    def beside(name: str) -> dict[str, tuple]:
        return {"beside": tuple((other, content) for other, content in contents.items() if other != name)}

    small = {part: json.loads(contents[part]) for part in ("config.json", "tokenizer.json")}
    return {
        "npz": Kind("mine.npz", saved(ARRAYS), archives, read_archive),
        "split": json_kind("split.json", SPLIT, read_split, 120),
        "leaf images": json_kind(
            "train/a.json", WRITERS, read_writers, 120, beside=(("test/a.json", json.dumps(WRITERS).encode()),)
        ),
        "leaf text": json_kind(
            "train/a.json", ROLES, read_roles, 120, beside=(("test/a.json", json.dumps(ROLES).encode()),)
        ),
        "records": Kind("a.jsonl", "\n".join(map(json.dumps, RECORDS)).encode(), record_files, read_records),
        "settings": Kind("a.yaml", SETTINGS.encode(), settings, read_settings),
        "tokenizer": json_kind(
            "tokenizer.json", small["tokenizer.json"], read_tokenizer, 60, **beside("tokenizer.json")
        ),
        "model": json_kind("config.json", small["config.json"], read_model, 150, **beside("config.json")),
        "gguf": Kind("model.gguf", intact, model_files(intact), read_gguf),
    }


KINDS = ("npz", "split", "leaf images", "leaf text", "records", "settings", "tokenizer", "model", "gguf")


def fault(kind: Kind, folder: Path, content: bytes) -> str:
    """What is wrong with how a file is read; "" if it is refused in a line, or read right."""
    for name, other in (*kind.beside, (kind.name, content)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(other)
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(folder / kind.name)
    except ConfigurationError as error:
        message = str(error).replace(str(folder), "")
        if "\n" in message or len(message) > LONGEST:
            return f"a message of {len(message)} characters and {message.count(chr(10))} line breaks: {message!r:.200}"
    except _TooLong:
        return f"longer than {PATIENCE} s"
    except AssertionError as error:
        return f"accepted, but wrong: {str(error) or repr(error):.200}"
    except BaseException as error:  # also the panics of tokenizers
        return f"{type(error).__name__}: {error!s:.150}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "" if time.monotonic() - begin < PATIENCE else "too slow"


def faults(kind: Kind, folder: Path, every: int) -> tuple[int, list[str]]:
    cases = list(kind.cases(np.random.default_rng(0)))
    found = []
    for number in range(every // 2, len(cases), every):
        name, content = cases[number]
        if problem := fault(kind, folder / str(number), content):
            found.append(f"{name}: {problem}")
    return len(range(every // 2, len(cases), every)), found


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    def too_long(*_: object) -> None:
        raise _TooLong

    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.signal(signal.SIGALRM, before)


def test_the_intact_files_are_read(kinds, tmp_path):
    assert tuple(kinds) == KINDS
    for name, kind in kinds.items():
        assert fault(kind, tmp_path / name, kind.intact) == "", name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damaged_files(kinds, tmp_path, kind):
    tried, found = faults(kinds[kind], tmp_path, SAMPLE)
    assert tried >= 10 and not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kinds, tmp_path, kind):
    tried, found = faults(kinds[kind], tmp_path, 1)
    print(f"\n{kind}: {tried} damaged files, {len(found)} faults")
    assert tried >= 100 and not found, "\n".join(found)
