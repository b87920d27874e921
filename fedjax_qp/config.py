"""Configuration: YAML mapped strictly onto frozen dataclasses. Every default of a run is in this file.

Only the interchangeable parts (`data`, `partition`, `model`, `algorithm`) have further options: the keyword arguments of the
function they name. `experiment.build` checks those, so that the resolved configuration shows every value in use.
"""

import dataclasses
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedjax_qp.registry import ConfigurationError, reason, unknown_name

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
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
    cut_off: Annotated[int, Field(ge=2)] = 512  # tokens of a record, prompt included; also the sequences' length
    longer: Literal["cut", "drop"] = "cut"  # what happens to a longer record; the end is cut off
    pack: bool = True  # several records in a sequence, each seeing only itself
    test_records: Count = 16  # held out by each client
    train_records: Count | None = None  # at most so many for each client; null = all the others


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round."""

    cohort: Count = 10  # clients per round
    dropout: Probability = 0.0  # chance that a sampled client never reports
    stragglers: Annotated[float, Field(ge=0, le=1)] = 0.0  # chance that a client does only part of its work
    straggler_work: Annotated[float, Field(gt=0, le=1)] = 0.5  # that part, as a share of its local steps


@dataclass(frozen=True)
class Engine:
    """How the work is laid out on devices; results do not depend on it beyond float rounding."""

    parallel: Literal["auto", "vmap", "shard_map", "pmap"] = "auto"  # auto: vmap on one device, shard_map on several
    devices: Count | Literal["auto"] = "auto"  # auto: one or all, measured with lanes: auto; with a number of lanes one
    model_devices: Count = 1  # devices that share the frozen weights of each group of lanes
    lanes: Count | Literal["auto"] = "auto"  # clients trained side by side; auto measures and picks
    memory_gigabytes: Positive | None = None  # that auto may plan with on each device; null = 80 % of what there is
    rounds_per_chunk: Count = 10  # rounds in one program; also the distance of checkpoints
    client_store: Literal["device", "host"] = "device"  # of the clients' memories
    data_store: Literal["device", "host"] = "device"  # of the training examples; host: devices get those of their lanes

    @property
    def lane_devices(self) -> int:
        """Devices among which the lanes are split, once that is settled."""
        assert self.devices != "auto", "devices.settle and lanes.choose_layout leave no auto"
        return self.devices


@dataclass(frozen=True)
class Evaluation:
    every: Count = 1  # rounds
    batch_size: Count = 500
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None  # reports "rounds to reach"
    stop_at_target: bool = False
    patience: Count | None = None  # stop after so many evaluations without a better accuracy


@dataclass(frozen=True)
class Checkpoints:
    every_chunks: Count = 1
    keep: Count = 2  # the newest ones; the best is kept besides


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    project: str = "fedjax_qp"
    entity: str | None = None  # null = that of the login
    mode: Literal["offline", "online"] = "offline"


@dataclass(frozen=True)
class Mlflow:
    experiment: str = "fedjax_qp"
    uri: str | None = None  # of the tracking store or server; null = mlflow.db beside the run folders


@dataclass(frozen=True)
class Tracking:
    """Where copies of the records go; results do not depend on it. `tracking.wandb={}` turns one on with its defaults."""

    tensorboard: bool = True
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str
    data: Part
    partition: Part
    model: Part
    algorithm: Part
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Count = 100
    folder: str = "runs"
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
        return Path(self.folder) / f"{self.name}-seed{self.seed}"


PARTS = ("data", "partition", "model", "algorithm")


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a configuration from nested dicts.

    Raises:
      ConfigurationError: a key is unknown (the nearest valid ones are named) or missing, or a value is out of range.
    """
    check_keys(values, Config)
    prepared = {key: _part(key, value) if key in PARTS else value for key, value in values.items()}
    try:
        return pydantic.TypeAdapter(Config).validate_python(prepared)
    except pydantic.ValidationError as error:
        raise ConfigurationError(readable(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """The inverse of `from_dict`: plain nested dicts, parts flattened as in YAML."""
    values = dataclasses.asdict(config)
    for key in PARTS:
        part = values[key]
        values[key] = {"name": part["name"], **part["options"]}
    return values


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies overrides such as `algorithm.alpha=2`.

    An override that changes the name of a part (`algorithm.name=fedavg`, or shorter `algorithm=fedavg`) drops the
    part's other options: they belonged to another function.
    """
    values = read_mapping(Path(path))
    if "config" in values and "algorithm" not in values:
        raise ConfigurationError(f"{path} is a sweep: use `fedjax-qp sweep {path}`.")
    for override in overrides or []:
        assign(values, *parse_override(override))
    return from_dict(values)


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Raises:
      ConfigurationError: no such file (those there are are named), or it holds something else.
    """
    if not path.is_file():
        folder = next((place for place in (path, path.parent) if place.is_dir()), Path("configs"))
        near = sorted(str(file) for file in folder.glob("[!.]*.yaml"))
        raise unknown_name("configuration file", str(path), near)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} holds {type(values).__name__}, not a mapping of settings.")
    return values


def save(config: Config, path: Path) -> None:
    """Writes a configuration; a kill in the middle leaves the old file."""
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    partial.replace(path)


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
        raise ConfigurationError(f"override {override!r} is not of the form key=value (for example rounds=20).")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"override {override!r}: {text!r} is not a YAML value.") from None


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets one setting, such as `algorithm.alpha`, in nested dicts; see `load` for the names of parts.

    Raises:
      ConfigurationError: the key leads into a single value.
    """
    *folders, last = key.split(".")
    if key in PARTS and isinstance(value, str):
        folders, last = [key], "name"
    for folder in folders:
        if folder in PARTS and isinstance(values.get(folder), str):
            values[folder] = {"name": values[folder]}
        if values.get(folder) is None:  # absent, or a group of settings that is off
            values[folder] = {}
        values = values[folder]
        if not isinstance(values, dict):
            raise ConfigurationError(f"{key} = {value!r}: {folder!r} is a single value and has no parts.")
    if folders and folders[0] in PARTS and last == "name" and values.get("name") != value:
        values.clear()
    values[last] = value


def _part(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigurationError(f"{key} = {value!r} needs a name, for example `{key}: {{name: …}}`.")
    return {"name": value["name"], "options": {k: v for k, v in value.items() if k != "name"}}


def check_keys(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Unknown keys are errors; pydantic would say so too, but without the nearest valid one."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            raise unknown_name("setting", f"{prefix}{key}", [prefix + name for name in fields])
        inner = _group(fields[key].type)
        if inner is not None and not (value is None and inner is not fields[key].type):
            if not isinstance(value, dict):
                raise ConfigurationError(f"{prefix}{key} = {value!r} must be a mapping of settings.")
            check_keys(value, inner, f"{prefix}{key}.")


def groups() -> dict[str, type]:
    """The groups of settings of a run that are not parts, by name."""
    found = {field.name: _group(field.type) for field in dataclasses.fields(Config)}
    return {name: group for name, group in found.items() if group is not None}


def _group(annotation: Any) -> type | None:
    """The dataclass of a group of settings, also of one that may be null."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else ()
    kinds = [kind for kind in (annotation, *options) if isinstance(kind, type)]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and kind is not Part), None)


def readable(error: pydantic.ValidationError) -> str:
    """Pydantic's findings in one line: setting, value, reason. A setting of several types has a reason for each."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        name = ".".join(part for part in parts if not part.startswith(("function", "constrained", "literal")))
        given = "" if item["type"] == "missing" else f" = {item['input']!r}"
        reasons.setdefault(name + given, []).append(reason(item["type"], item["msg"]))
    return "; ".join(f"{setting} {', or '.join(found)}" for setting, found in reasons.items()) + "."
