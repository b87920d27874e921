"""Configuration: YAML mapped strictly onto frozen dataclasses. Every default of a run is in this file.

Only the interchangeable parts (`data`, `partition`, `model`, `algorithm`) have further options: the keyword arguments of the
function they name. `experiment.build` checks those, so that the resolved configuration shows every value in use.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedjax_qp.files import write_whole
from fedjax_qp.registry import MOST_REASONS, ConfigurationError, reason, unknown_name
from fedjax_qp.settings import plugins, presets, strict
from fedjax_qp.settings.values import (
    Count,
    Finite,
    Line,
    Name,
    NotNegative,
    PathName,
    Positive,
    Probability,
    Seed,
    Share,
    Truth,
    Whole,
    shown,
)


@dataclass(frozen=True)
class Part:
    """A named entry of a registry with its options, in YAML `{name: dirichlet, beta: 0.1}`."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Local:
    """A client's work in a round."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Probability = 0.9  # sgd only
    weight_decay: NotNegative = 0.0
    clip_norm: Positive | None = None
    epochs: Count = 5
    batch_size: Count = 50
    maximum_steps: Count | None = None  # cuts a client's work off; null = E·ceil(n/B) steps
    accumulate: Count = 1  # batches averaged into one optimizer step, see `experiment.local_optimizer`


@dataclass(frozen=True)
class Text:
    """How records become token sequences; only for instruction data."""

    template: Literal["alpaca", "short", "chat"] = "alpaca"
    train_on: Literal["response", "all"] = "response"  # the tokens that count in the loss
    cut_off: Annotated[Whole, Field(ge=2, le=10**6)] = (
        512  # tokens of a record, prompt included; also the sequences' length
    )
    longer: Literal["cut", "drop"] = "cut"  # what happens to a longer record; the end is cut off
    pack: Truth = True  # several records in a sequence, each seeing only itself
    test_records: Count = 16  # held out by each client
    train_records: Count | None = None  # cap per client; null = all remaining records


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round."""

    cohort: Count = 10  # clients per round
    dropout: Probability = 0.0  # chance that a sampled client never reports
    stragglers: Share = 0.0  # chance that a client does only part of its work
    straggler_work: Annotated[Finite, Field(gt=0, le=1)] = 0.5  # that part, as a share of its local steps


@dataclass(frozen=True)
class Engine:
    """How the work is laid out on devices; results do not depend on it beyond float rounding."""

    parallel: Literal["auto", "vmap", "shard_map", "pmap"] = "auto"  # auto: vmap on one device, shard_map on several
    devices: Count | Literal["auto"] = "auto"  # auto: one or all, measured with lanes: auto; with a number of lanes one
    model_devices: Count = 1  # devices that share the frozen weights of each group of lanes
    lanes: Count | Literal["auto"] = "auto"  # clients trained side by side; auto measures and picks
    memory_gigabytes: Positive | None = None  # memory budget per device for lanes: auto; null = 80 % of the device
    rounds_per_chunk: Count = 10  # rounds in one program; also the distance of checkpoints
    client_store: Literal["device", "host"] = "device"  # of the clients' memories
    data_store: Literal["device", "host"] = "device"  # of the training examples; host: devices get those of their lanes

    @property
    def asked_devices(self) -> int:
        """Devices among which the lanes are to be split; auto asks for one at least."""
        return 1 if self.devices == "auto" else self.devices


@dataclass(frozen=True)
class Evaluation:
    """When the model is tested, and when a run ends early."""

    every: Count = 1  # rounds
    batch_size: Annotated[Count, Field(le=10**6)] = 500
    target_accuracy: Annotated[Finite, Field(gt=0, le=1)] | None = None  # reports "rounds to reach"
    stop_at_target: Truth = False
    patience: Count | None = None  # evaluations without a better accuracy before the run stops


@dataclass(frozen=True)
class Checkpoints:
    """When states are saved, and how many are kept."""

    every_chunks: Count = 1
    keep: Count = 2  # the newest ones; the best is kept besides


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    project: Line = "fedjax_qp"
    entity: Line | None = None  # null = that of the login
    mode: Literal["offline", "online"] = "offline"


@dataclass(frozen=True)
class Mlflow:
    """MLflow."""

    experiment: Line = "fedjax_qp"
    uri: Line | None = None  # of the tracking store or server; null = mlflow.db beside the run folders


@dataclass(frozen=True)
class Tracking:
    """Where copies of the records go; results do not depend on it. `tracking.wandb={}` turns one on with its defaults."""

    tensorboard: Truth = True
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None


@dataclass(frozen=True)
class Config:
    """One run."""

    name: Name
    data: Part
    partition: Part
    model: Part
    algorithm: Part
    plugins: tuple[PathName, ...] = ()  # files (.py, relative to the configuration's) or modules, see `plugins`
    seed: Seed = 0
    rounds: Count = 100
    folder: PathName = "runs"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of matrix products in training and tests
    local: Local = dataclasses.field(default_factory=Local)
    text: Text = dataclasses.field(default_factory=Text)
    participation: Participation = dataclasses.field(default_factory=Participation)
    engine: Engine = dataclasses.field(default_factory=Engine)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)

    @property
    def run_folder(self) -> Path:
        return Path(self.folder).expanduser() / f"{self.name}-seed{self.seed}"


PARTS = ("data", "partition", "model", "algorithm")


def _checked_by_hand(cls: type, prefix: str) -> None:
    """Gives a group of settings that is built in Python the errors that it has in YAML."""
    build = cls.__init__

    @functools.wraps(build)
    def checked(self: Any, *arguments: Any, **settings: Any) -> None:
        check_keys(dict.fromkeys(settings), cls, prefix)  # names only
        try:
            build(self, *arguments, **settings)
        except pydantic.ValidationError as error:
            raise ConfigurationError(readable(error, prefix)) from None

    cls.__init__ = checked


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a configuration from nested dicts.

    Raises:
      ConfigurationError: a key is unknown (the nearest valid ones are named) or missing, or a value is out of range.
    """
    check_keys(values, Config)
    prepared = {key: _part(key, value) if key in PARTS else value for key, value in values.items()}
    locate_plugins(prepared, Path())
    try:
        return pydantic.TypeAdapter(Config).validate_python(prepared)
    except pydantic.ValidationError as error:
        raise ConfigurationError(readable(error)) from None


def locate_plugins(values: dict[str, Any], home: Path) -> None:
    """Makes the paths of plug-ins absolute, in nested dicts of settings.

    Args:
      home: what they are relative to.
    """
    given = values.get("plugins")
    if isinstance(given, list | tuple) and all(isinstance(name, str | Path) for name in given):
        values["plugins"] = plugins.located(given, home)


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`: plain nested dicts, parts flattened as in YAML, plug-ins only where there are some."""
    values = dataclasses.asdict(config)
    for key in PARTS:
        part = values[key]
        values[key] = {"name": part["name"], **part["options"]}
    named = list(values.pop("plugins"))
    if named:
        values["plugins"] = named
    return values


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, or a preset (`@mnist5k`), and applies overrides such as `algorithm.alpha=2`, see `change`."""
    values = read_mapping(Path(path))
    locate_plugins(values, Path(path).expanduser().parent)
    if "config" in values and "algorithm" not in values:
        raise ConfigurationError(f"{path} is a sweep: use `fedjax-qp sweep {path}`.")
    change(values, [parse_override(override) for override in overrides or []])
    return from_dict(values)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings, or a preset.

    Raises:
      ConfigurationError: the file does not exist (the message lists similar ones), or it holds something else.
    """
    file = Path(os.path.expanduser(presets.located(path)))
    if not os.path.isfile(file):  # unlike Path.is_file it also takes what can be no path
        folder = next((place for place in (file, file.parent) if os.path.isdir(place)), Path("configs"))
        near = sorted(str(other) for other in folder.glob("[!.]*.yaml")) or [f"@{name}" for name in presets.names()]
        raise unknown_name("configuration file", str(path), near)
    values = strict.load_yaml(strict.read_text(file), str(path))
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} holds {type(values).__name__}, not a mapping of settings.")
    return values


def save(config: Config, path: Path) -> None:
    """Writes a configuration; a kill in the middle leaves the old file."""
    write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the settings in which two configurations differ, with both values."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} → {b!r}")
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def parse_override(override: str) -> tuple[str, Any]:
    """Takes `key=value` apart; the value is YAML.

    Raises:
      ConfigurationError: there is no `=`, or the value is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigurationError(f"override {shown(override)} is not of the form key=value (for example rounds=20).")
    return key, strict.load_yaml(text, f"override {shown(override)}")


def change(
    values: dict[str, Any], changes: Iterable[tuple[str, Any]], split: Callable[[str], list[str]] | None = None
) -> None:
    """Sets settings by their dotted names, such as `algorithm.alpha`, in nested dicts; their order means nothing.

    A change of a part's name (`algorithm.name=fedavg`, or shorter `algorithm=fedavg`) drops the part's other options:
    they belonged to another function. Options that are among the changes are set after it.

    Args:
      split: takes a name apart; by default at its dots. With one, a part's name alone stays what it is: `values` are then
        changes themselves, where `algorithm: fedavg` says less than `algorithm: {name: fedavg}`.

    Raises:
      ConfigurationError: two changes contradict each other, or one leads into a single value.
    """
    wanted: dict[tuple[str, ...], Any] = {}
    for key, value in changes:
        path = tuple(key.split(".") if split is None else split(key))
        path = (key, "name") if split is None and key in PARTS and isinstance(value, str) else path
        if path in wanted and not _same(wanted[path], value):
            raise ConfigurationError(f"{key} is given twice, as {shown(wanted[path])} and {shown(value)}: keep one.")
        wanted[path] = value
    for path, value in wanted.items():
        _check_against_outer(wanted, path, value)
    for path in sorted(wanted, key=lambda path: (len(path), path[-1] != "name")):  # groups before what is in them
        _assign(values, path, wanted[path])


def _check_against_outer(wanted: dict[tuple[str, ...], Any], path: tuple[str, ...], value: Any) -> None:
    """`local={epochs: 3}` says nothing against `local.momentum=0`, but something against `local.epochs=5`."""
    for length in range(1, len(path)):
        outer = path[:length]
        if outer not in wanted:
            continue
        found = wanted[outer]
        for name in path[length:]:
            found = found.get(name, value) if isinstance(found, dict) else found
        if not (found is value or _same(found, value)):
            raise ConfigurationError(
                f"{'.'.join(path)} = {shown(value)} contradicts {'.'.join(outer)} = {shown(wanted[outer])}: keep one."
            )


def _same(first: Any, second: Any) -> bool:
    """Whether two values are the same, true and 1 being different."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _assign(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *folders, last = path
    key = ".".join(path)
    for folder in folders:
        if folder in PARTS and isinstance(values.get(folder), str):
            values[folder] = {"name": values[folder]}
        if values.get(folder) is None:  # absent, or a group of settings that is off
            values[folder] = {}
        values = values[folder]
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"{shown(key)} = {shown(value)}: {shown(folder)} is a single value and has no parts."
            )
    if len(path) == 2 and path[0] in PARTS and last == "name" and values.get("name", value) != value:
        values.clear()
    values[last] = copy.deepcopy(value)  # a later change may lead into it


def _part(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigurationError(f"{key} = {shown(value)} needs a name, for example `{key}: {{name: …}}`.")
    return {"name": value["name"], "options": {k: v for k, v in value.items() if k != "name"}}


def check_keys(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Unknown keys are errors; pydantic would say so too, but without the nearest valid one."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name("setting", f"{prefix}{key}", [prefix + name for name in fields], every_name())
        inner = _group(fields[key].type)
        if inner is not None and not (value is None and inner is not fields[key].type):
            if not isinstance(value, dict):
                raise ConfigurationError(f"{prefix}{key} = {shown(value)} must be a mapping of settings.")
            check_keys(value, inner, f"{prefix}{key}.")


def every_name() -> list[str]:
    """The dotted names of all settings of a run, with options that many parts have."""
    own = [field.name for field in dataclasses.fields(Config)]
    inner = [f"{group}.{field.name}" for group, cls in groups().items() for field in dataclasses.fields(cls)]
    return [*own, *inner, "partition.clients", "partition.beta", "algorithm.alpha", "algorithm.proximal"]


def groups() -> dict[str, type]:
    """The groups of settings of a run that are not parts, by name."""
    found = {field.name: _group(field.type) for field in dataclasses.fields(Config)}
    return {name: group for name, group in found.items() if group is not None}


def annotation(setting: str) -> Any:
    """The type of a setting that is no part's option, by its dotted name; None where there is none."""
    cls: Any = Config
    *outer, last = setting.split(".")
    for name in outer:
        cls = _group({field.name: field.type for field in dataclasses.fields(cls)}.get(name)) if cls else None
    return {field.name: field.type for field in dataclasses.fields(cls)}.get(last) if cls else None


def _group(annotation: Any) -> type | None:
    """The dataclass of a group of settings, also of one that may be null."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else ()
    kinds = [kind for kind in (annotation, *options) if isinstance(kind, type)]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and kind is not Part), None)


_MOST_SETTINGS = 3  # in a message


def readable(error: pydantic.ValidationError, prefix: str = "") -> str:
    """Pydantic's findings in one line: setting, value, reason. A setting of several types has a reason for each.

    Args:
      prefix: of the settings' names, such as "local.".
    """
    reasons: dict[str, dict[str, None]] = {}
    for item in error.errors(include_url=False):
        name = prefix + ".".join(str(part) for part in item["loc"] if not _of_a_type(part))
        given = "" if item["type"] == "missing" else f" = {shown(item['input'])}"
        reasons.setdefault(name + given, {})[reason(item["type"], item["msg"])] = None
    found = [f"{setting} {', or '.join(list(why)[:MOST_REASONS])}" for setting, why in reasons.items()]
    more = f"; and {len(found) - _MOST_SETTINGS} more" if len(found) > _MOST_SETTINGS else ""
    return "; ".join(found[:_MOST_SETTINGS]) + more + "."


def _of_a_type(part: str | int) -> bool:
    """Whether a piece of a place is the name of one of several types that pydantic has tried, not of a setting."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("int", "float", "str", "bool"))


for _group_name, _cls in (groups() | {"tracking.wandb": Wandb, "tracking.mlflow": Mlflow}).items():
    _checked_by_hand(_cls, f"{_group_name}.")
