"""Whole experiments built from hostile settings and options, one or two at a time, on every kind of data.

Each input is refused by a ConfigurationError of one short line, or taken exactly as given, and then the experiment uses it.
Nothing else is raised, nothing takes longer than PATIENCE, and no folder is made.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.fuzz import OPTIONS, SETTINGS, found_in
from support.right import RECORDS, check_taken, check_use

from fedjax_qp import config
from fedjax_qp.experiment import Experiment, build, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings import catalogue

PATIENCE = 20  # seconds
LONGEST = 500  # characters of a message
PAIRS = 700

UNUSUAL = ("x" * 300, "x" * 10**5, "Größe 猫", "a\n\0\x1b[31m\ud800")
HOSTILE: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 1 - 1e-9, 10**9, 10**12, 10**30, 1e300, 1e-30, True, None),
    *("", "ten", "nan", "10", *UNUSUAL, [], [[]], [math.nan], [-(10**30)], [1, "x"], {}, {"a": {"b": [1]}}, {1: 2}),
)

IMAGES: dict[str, Any] = {
    "name": "images",
    "data": "digits",
    "partition": {"name": "iid", "clients": 12},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": "fedavg",
    "local": {"epochs": 2, "batch_size": 16},
    "participation": {"cohort": 4},
    "engine": {"lanes": 2, "rounds_per_chunk": 1},
    "evaluation": {"batch_size": 100},
}
PICTURES = {"data": {"name": "arrays", "path": "DATA/pictures.npz"}, "partition": {"name": "natural"}}
TEXT = {
    "data": {"name": "shakespeare", "folder": "DATA/plays", "minimum": 4},
    "partition": "natural",
    "model": {"name": "char_lstm", "hidden": 8, "layers": 1},
}
LANGUAGE = {
    "data": {"name": "records", "files": "DATA/client_*.jsonl"},
    "partition": "natural",
    "model": {"name": "pretrained", "path": "DATA/model", "rank": 2},
    "algorithm": "fedit",
    "text": {"template": "short", "cut_off": 64, "test_records": 2, "pack": False},
    "local": {"optimizer": "adamw", "epochs": 2, "batch_size": 2},
}
OTHERS = {"pictures": PICTURES, "text": TEXT, "language": LANGUAGE}
BASES = {"images": IMAGES, **{name: IMAGES | other for name, other in OTHERS.items()}}

# What an entry needs so that it can be built, where its defaults will not do. Nothing is fetched: where the default of
# `folder` would fetch a package, another is given, and null is not tried.
NEEDED = {
    "femnist": {"folder": "DATA/nowhere"},
    "shakespeare": {"folder": "DATA/plays", "minimum": 4},
    "shakespeare_leaf": {"folder": "DATA/nowhere"},
    "alpaca_demo": {"folder": "DATA/nowhere"},
    "csv": {"path": "DATA/nowhere.csv", "label": "kind"},
    "parquet": {"path": "DATA/nowhere.parquet", "label": "kind"},
    "arrays": {"path": "DATA/pictures.npz"},
    "tfds_images": {"dataset": "mine", "folder": "DATA/nowhere"},
    "records": {"files": "DATA/client_*.jsonl"},
    "json_file": {"path": "DATA/split.json"},
    "iid": {"clients": 12},
    "dirichlet": {"clients": 12, "minimum": 5},
    "shards": {"clients": 12},
    "categories": {"clients": 12},
    "pretrained": {"path": "DATA/model", "rank": 2},
    "char_lstm": {"hidden": 8},
    "perfit": {"warm_up": 1, "score_batches": 1},
}
FETCHED = ("shakespeare", "alpaca_demo")
LEFT_OUT = ("smollm2",)  # the options of `pretrained`, on weights of 270 MB
OF_LANGUAGE = ("text", "local", "participation", "evaluation", "precision", "seed")


class Input(NamedTuple):
    base: str
    changes: dict[str, Any]


class _TooLong(BaseException):
    """An input took longer than PATIENCE; no `except Exception` may swallow it."""


# ---- Inputs ---------------------------------------------------------------------------------------------------------


def nested_settings() -> list[str]:
    """Every setting, those of groups in groups and the groups and parts themselves."""
    trackers = {"wandb": config.Wandb, "mlflow": config.Mlflow}
    inner = [f"tracking.{name}.{field.name}" for name, cls in trackers.items() for field in dataclasses.fields(cls)]
    own = [name for name in SETTINGS if name.partition(".")[0] not in config.PARTS]
    return [*config.PARTS, *config.groups(), *own, *inner]


def base_of(part: str, name: str) -> str:
    entry = next(one for one in catalogue.entries() if catalogue.KINDS[one.registry].part == part and one.name == name)
    pictures = name == "natural" or (part in ("data", "model") and name not in ("mlp", "digits", "mnist5k"))
    return {"instructions": "language", "characters": "text"}.get(entry.suits[0], "pictures" if pictures else "images")


def single(values: tuple[Any, ...] = HOSTILE) -> Iterator[Input]:
    for setting in nested_settings():
        for base in ("images", "language") if setting.partition(".")[0] in OF_LANGUAGE else ("images",):
            yield from (Input(base, {setting: value}) for value in values)
    for group in (*config.PARTS, *config.groups()):  # names that nobody has
        yield from (Input("images", {f"{group}.{name}": 1}) for name in ("", *UNUSUAL))
    for base in ("images", "pictures"):  # options of every partition
        yield from (Input(base, {"partition.test": value}) for value in values)
        yield from (Input(base, {"partition.test": "own", "partition.test_share": value}) for value in values)
    for part, name, option in OPTIONS:
        if name not in LEFT_OUT:
            needed = {part: name, **{f"{part}.{key}": value for key, value in NEEDED.get(name, {}).items()}}
            for value in values:
                if not (name in FETCHED and option == "folder" and value is None):
                    yield Input(base_of(part, name), {**needed, f"{part}.{option}": value})


def pairs(count: int) -> Iterator[Input]:
    """Two changes at once, the values drawn from hostile ones and from such as may be taken."""
    numbers = np.random.default_rng(0)
    values = (*HOSTILE, *(1, 2, 3, 5, 0.1, 0.5, 0.999, 2.0, "auto", "own", "uniform", False, [4], [4, 4], "1e-3"))
    found = list(single((None,)))
    while count:
        first, second = (found[number] for number in numbers.integers(len(found), size=2))
        if first.base == second.base and not first.changes.keys() & second.changes.keys():
            count -= 1
            changes: dict[str, Any] = {}
            for one in (first, second):
                changes |= drawn_value(one, [values[number] for number in numbers.permutation(len(values))]).changes
            yield Input(first.base, changes)


def drawn_value(one: Input, values: list[Any]) -> Input:
    """With the first value that its type takes, if one does: a pair that is refused for one of its values shows little."""
    key = list(one.changes)[-1]
    for value in values:
        changes = {**one.changes, key: value}
        settings = placed(BASES[one.base], Path())
        if not (key == "data.folder" and value is None):
            with contextlib.suppress(ConfigurationError):
                config.change(settings, changes.items())
                resolve(config.from_dict(settings))
                return Input(one.base, changes)
    return one


# ---- Trying ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (144, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(144) % 4
    arrays = {"train_inputs": images[:120], "train_labels": labels[:120], "client_ids": np.arange(120) % 12}
    np.savez(folder / "pictures.npz", **arrays, test_inputs=images[120:], test_labels=labels[120:])
    split = {str(client): list(range(client, 1440, 12)) for client in range(12)}
    (folder / "split.json").write_text(json.dumps({"train_data": split, "num_users": 12}))
    (folder / "plays").mkdir()
    speeches = [f"{name}.\n{'to be or not ' * 40}\n" for name in ("HAM", "OPH", "FOOL", "KING")]
    (folder / "plays" / "hamlet_gut.txt").write_text("ACT I.\n\n" + "\n".join(speeches))
    for client, count in enumerate(RECORDS):
        lines = [
            json.dumps({"instruction": f"Say it {n} times", "output": "One day. " * (n + 1)}) for n in range(count)
        ]
        (folder / f"client_{client}.jsonl").write_text("\n".join(lines))
    model = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k"
    if model.is_dir():
        (folder / "model").symlink_to(model)
    return folder


@pytest.fixture
def bases(data, tmp_path, monkeypatch) -> dict[str, dict[str, Any]]:
    """The configurations that are changed, in an empty folder in which no folder may appear."""

    def too_long(*_: object) -> None:
        raise _TooLong

    monkeypatch.setenv("FEDJAX_QP_CACHE", str(data / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(data / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, too_long)
    there = {name: base for name, base in BASES.items() if name != "language" or (data / "model").exists()}
    yield {name: placed(base, data) for name, base in there.items()}
    signal.signal(signal.SIGALRM, before)


def placed(value: Any, data: Path) -> Any:
    if isinstance(value, dict):
        return {key: placed(inner, data) for key, inner in value.items()}
    return value.replace("DATA/", f"{data}/") if isinstance(value, str) and value.startswith("DATA/") else value


def attempt(
    base: dict[str, Any], changes: dict[str, Any], like: Experiment | None
) -> tuple[str, str, Experiment | None]:
    """What came of an input: refused, taken, or a fault with its description."""
    begin = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    experiment = None
    try:
        values = placed(base, Path())  # a copy
        config.change(values, changes.items())
        given = config.from_dict(values)
        experiment = build(given, like)
        check_taken(resolve(given), changes)
        check_use(experiment)
    except ConfigurationError as error:
        message = shortened(str(error), changes)
        if "\n" in message or len(message) > LONGEST:
            return "fault", f"a message of {len(message)} characters: {message!r:.700}", None
        assert message
        return ("refused", "", None) if experiment is None else ("fault", f"taken, but then: {message:.200}", None)
    except _TooLong:
        return "fault", f"longer than {PATIENCE} s", None
    except AssertionError as error:
        return "fault", f"taken, but wrong: {error!s:.300}", None
    except BaseException as error:
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__}: {error!s:.150} ({place.filename}:{place.lineno})", None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    late = time.monotonic() - begin > PATIENCE
    left = os.listdir()
    return ("fault", f"late, or a folder: {left}", None) if late or left else ("taken", "", experiment)


def shortened(message: str, changes: dict[str, Any]) -> str:
    """Without paths that may well be long."""
    for value in changes.values():
        message = message.replace(value, "…") if isinstance(value, str) and len(value) > 1 else message
    return message


def faults(bases: dict[str, dict], inputs: Iterator[Input], data: Path) -> tuple[Counter, list[str], float]:
    counts, found, slowest = Counter(), [], 0.0
    like: dict[str, Experiment] = {}
    for name, base in bases.items():
        outcome, fault, experiment = attempt(base, {}, None)
        assert outcome == "taken" and experiment is not None, f"{name}: {fault}"
        like[name] = experiment
    for base, changes in inputs:
        if base in bases:
            begin = time.monotonic()
            outcome, fault, _ = attempt(bases[base], placed(changes, data), like[base])
            slowest = max(slowest, time.monotonic() - begin)
            counts[outcome] += 1
            if outcome == "fault":
                found.append(f"{base}, {str(changes)[:200]}: {fault}")
    return counts, found, slowest


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("inputs", [single, lambda: pairs(PAIRS)], ids=["single", "pairs"])
def test_hostile_settings(bases, data, inputs: Callable[[], Iterator[Input]]):
    begin = time.process_time()
    counts, found, slowest = faults(bases, inputs(), data)
    print(f"\n{dict(counts)}, slowest {slowest:.1f} s, {time.process_time() - begin:.0f} s of CPU")
    assert not found, "\n".join(found)


# ---- By hand --------------------------------------------------------------------------------------------------------

# Of 12 clients with the 1,442 training digits, and of 4 with 6, 9, 7 and 8 records.
TAKEN = [
    ("images", "local.epochs=1.0", 1),
    ("images", "local.epochs='2'", 2),
    ("images", "local.learning_rate=1e-3", 0.001),
    ("images", "local.learning_rate=1", 1.0),
    ("images", "local.weight_decay=-0.0", 0.0),
    ("images", "local.momentum=0.9999999", 0.9999999),
    ("images", "local.maximum_steps=null", None),
    ("images", "rounds=0x10", 16),
    ("images", "seed=2147483647", 2**31 - 1),
    ("images", "participation.cohort=12", 12),
    ("images", "participation.stragglers=1", 1.0),
    ("images", "evaluation.target_accuracy=1", 1.0),
    ("images", "evaluation.batch_size=1000000", 10**6),
    ("images", "partition.clients=1442", 1442),
    ("images", "model.hidden=[]", ()),
    ("images", "model.hidden=[8.0]", (8,)),
    ("images", "tracking.wandb={}", {"project": "fedjax_qp", "entity": None, "mode": "offline"}),
    ("language", "text.test_records=5", 5),
    ("language", "text.train_records=1", 1),
    ("language", "data.limit=3", 3),
    ("language", "model.rank=64", 64),
]
REFUSED = [
    ("images", "local.epochs=1.5", "epochs = 1.5 must be a whole number"),
    ("images", "local.epochs=true", "epochs = True must be a number"),
    ("images", "rounds=1e2", "rounds = '1e2' must be a whole number"),
    ("images", "rounds=1:30", "rounds = '1:30' must be a whole number"),
    ("images", "rounds=[4]", "rounds = .4. must be a whole number"),
    ("images", "seed=2147483648", "seed = 2147483648 must be less than 2147483648"),
    ("images", "seed=-1", "seed = -1 must be greater than or equal to 0"),
    ("images", "local.momentum=1", "momentum = 1.*less than 1"),
    ("images", "local.momentum=0.99999999", "momentum = 0.99999999.*less than 1, also in float32"),
    ("images", "local.learning_rate=1e-50", "learning_rate = '1e-50'.*float32"),
    ("images", "local.clip_norm=0", "clip_norm = 0 must be greater than 0"),
    ("images", "participation.dropout=1", "dropout = 1.*less than 1"),
    ("images", "participation.straggler_work=0", "straggler_work = 0 must be greater than 0"),
    ("images", "participation.cohort=13", "cohort = 13 is more than the 12 clients"),
    ("images", "evaluation.target_accuracy=90", "target_accuracy = 90 must be less than or equal to 1"),
    ("images", "partition.clients=1443", "clients = 1443 must be between 1 and 1442"),
    ("images", "partition.test_share=1", "test_share = 1 must be less than 1"),
    ("images", "model.hidden=8", "hidden = 8 must be a list"),
    ("images", "model.hidden=[0]", "every size must be between 1"),
    ("images", "algorithm={name: fedqp, margin: 0.999999999}", "margin = 0.999999999 is not in"),
    ("images", "algorithm={name: fedadam, beta2: 0.999999999}", "beta2 = 0.999999999 .*less than 1"),
    ("images", "name=null", "name = None"),
    ("images", "data={name: cifar10, folder: ''}", "folder = '' must be a line of text, not empty"),
    ("images", "tracking.mlflow.uri=''", "uri = '' must be a line of text, not empty"),
    ("images", "folder=" + "x" * 300, "must be at most 4096 bytes long, and 255 between two slashes"),
    ("language", "text.cut_off=1", "cut_off = 1 must be greater than or equal to 2"),
    ("language", "text.test_records=6", "client 0 has 6 examples, too few to hold out test = 6"),
    ("language", "text.test_records=0", "test_records = 0 must be greater than or equal to 1"),
    ("language", "data.limit=0", "limit = 0 must be at least 1"),
    ("language", "model.rank=65", "rank = 65 .* must be 1 to 64"),
    ("language", "model.targets=[]", "targets"),
    ("language", "model.targets=[q_proj, q_proj]", "'q_proj' stands twice: name each once"),
    ("language", "model.targets=q_proj", "targets = 'q_proj' must be a list"),
    ("language", "model.dropout=1", "dropout = 1.*less than 1"),
]


def of_bases(bases: dict[str, dict], base: str) -> dict[str, Any]:
    if base not in bases:
        pytest.skip("the folder ../shared with a small language model is not here")
    return placed(bases[base], Path())


@pytest.mark.parametrize(("base", "override", "value"), TAKEN)
def test_values_that_are_taken(bases, base, override, value):
    settings = of_bases(bases, base)
    key, given = config.parse_override(override)
    config.change(settings, [(key, given)])
    experiment = build(config.from_dict(settings))
    found = found_in(experiment.config, key)
    assert found == value and type(found) is type(value)
    check_use(experiment)


@pytest.mark.parametrize(("base", "override", "message"), REFUSED)
def test_values_that_are_refused(bases, base, override, message):
    settings = of_bases(bases, base)
    config.change(settings, [config.parse_override(override)])
    with pytest.raises(ConfigurationError, match=message) as error:
        build(config.from_dict(settings))
    assert "\n" not in str(error.value) and len(str(error.value)) <= LONGEST
