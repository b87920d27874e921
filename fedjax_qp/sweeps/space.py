"""What a sweep tries: a YAML file mapped strictly onto frozen dataclasses, with every default of a sweep in this file.

A sweep varies fields of one base configuration, each by its dotted name (`algorithm.alpha`, `partition`, `rounds`, …):

    name: sweep-mnist5k
    config: mnist5k.yaml                  # the base, relative to this file
    overrides: {rounds: 20}               # changes to it; a list of key=value does as well, see below
    seeds: [0, 1, 2]                      # every trial runs once with each
    search: grid                          # or random, optuna
    space:
      local.epochs: [1, 5]
      local.learning_rate: {low: 0.01, high: 0.1, log: true, points: 4}
    variants:                             # coupled settings, each with a space of its own besides the common one
      - {name: fedavg, settings: {algorithm: fedavg}}
      - {name: fedprox, settings: {algorithm: fedprox}, space: {algorithm.proximal: [0.001, 0.01]}}

A trial is one point of a variant's space; a run is a trial with one seed. On the command line, `key=value` changes the
sweep where the key is one of `Sweep`'s, and the base configuration otherwise: `workers=4 rounds=50 space.rounds=[5,10]`.
There it wins over the file's `overrides`. A whole group replaces that of the base: `overrides: {local: {epochs: 3}}` leaves
the defaults for all else in `local`, and `overrides: {local.epochs: 3}` what the base has.
"""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedjax_qp import config as configuration
from fedjax_qp.config import PARTS, Config
from fedjax_qp.registry import ConfigurationError, unknown_name
from fedjax_qp.settings import presets
from fedjax_qp.settings.values import Count, Finite, Line, Name, PathName, Seed, Truth, Whole, shown

MOST_VALUES = 10_000  # of a field, and trials of a sweep: each is a run at least
Number = Whole | Finite

# The sweep gives every run these itself.
_TAKEN = {"name": "the sweep names its runs", "folder": "the sweep keeps its runs in its own", "seed": "use `seeds`"}


@dataclass(frozen=True)
class Choices:
    """Values to choose from, in YAML a list or `{choices: […]}`."""

    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """An interval, both ends included; of whole numbers where the field is one, see `typed`.

    A grid needs `step` (a distance) or `points` (a number of values, evenly spaced on the scale). Random search and Optuna
    take any value between the ends where neither is given, rounded to four significant digits.
    """

    low: Number
    high: Number
    log: Truth = False
    step: Number | None = None
    points: Annotated[Whole, Field(ge=2, le=MOST_VALUES)] | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step) if number is not None)


Dimension = Choices | Range


@dataclass(frozen=True)
class Variant:
    """Settings that belong together, for example a method, with the space of its own options."""

    name: Annotated[Name | Literal[""], Field(union_mode="left_to_right")]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    space: dict[str, Dimension] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Rank:
    """What makes a trial good: the mean of a metric's last evaluations, averaged over seeds."""

    metric: Line = "test_accuracy"  # a name in the records; inner ones as personal/perplexity/mean
    direction: Literal["max", "min"] | None = None  # null = max for an accuracy, min for everything else
    last: Count = 10  # evaluations

    @property
    def sign(self) -> int:
        """1 where more is better, otherwise -1."""
        direction = self.direction or ("max" if "accuracy" in self.metric else "min")
        return 1 if direction == "max" else -1


@dataclass(frozen=True)
class EarlyStopping:
    """The median rule, see `stopping`."""

    after: Count = 10  # rounds that every trial gets
    least_trials: Annotated[Whole, Field(ge=2)] = 4  # others that must have come as far


@dataclass(frozen=True)
class Sweep:
    """One sweep."""

    name: Name
    config: PathName  # path of the base configuration
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: PathName = "runs"  # the sweep's own folder is made in it, under the sweep's name
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    search: Literal["grid", "random", "optuna"] = "grid"
    trials: Annotated[Count, Field(le=MOST_VALUES)] | None = None  # of each variant; random and optuna need it
    search_seed: Annotated[Whole, Field(ge=0)] = 0
    batch: Annotated[Count, Field(le=MOST_VALUES)] = (
        8  # optuna: trials proposed at once; they run together, and the next proposals know their results
    )
    space: dict[str, Dimension] = dataclasses.field(default_factory=dict)  # of every variant
    variants: tuple[Variant, ...] = ()
    rank: Rank = dataclasses.field(default_factory=Rank)
    early_stopping: EarlyStopping | None = None
    workers: Annotated[Count, Field(le=4096)] | Literal["auto"] = (
        "auto"  # processes of the embedded cluster, see `schedule`
    )
    cluster: Line | None = None  # address of an existing Dask scheduler, for example tcp://10.0.0.1:8786
    runs_per_task: Count | None = None  # null = as many as share a program, divided among the workers
    retries: Annotated[Whole, Field(ge=0, le=1000)] = (
        2  # of a task that fails or whose worker dies, before it is taken apart
    )

    @property
    def sweep_folder(self) -> Path:
        return Path(self.folder).expanduser() / self.name

    def every_variant(self) -> tuple[Variant, ...]:
        """The variants with the common space filled in; one without a name where the sweep has none."""
        variants = self.variants or (Variant(""),)
        return tuple(dataclasses.replace(one, space={**self.space, **one.space}) for one in variants)


def load(path: Path, overrides: list[str] | None = None) -> Sweep:
    """Reads a sweep file; see the module docstring for the overrides.

    Raises:
      ConfigurationError: a key is unknown (the nearest valid ones are named) or missing, or a value is out of range.
    """
    values = configuration.read_mapping(path)
    of_file = _mapping(values.pop("overrides", None))
    configuration.locate_plugins(of_file, path.expanduser().parent)
    if isinstance(values.get("config"), str):
        values["config"] = str(presets.located(path).expanduser().parent / Path(values["config"]).expanduser())
    given = [configuration.parse_override(override) for override in overrides or []]
    configuration.change(values, given, _place)
    of_command = _mapping(values.get("overrides"))
    named = isinstance(values.get("config"), str) and any(_name(part, of_command) is not None for part in PARTS)
    base = configuration.read_mapping(Path(values["config"])) if named else {}
    values["overrides"] = _merged(of_file, of_command, base)
    return from_dict(values)


def _place(key: str) -> list[str]:
    """Where a setting of the command line stands in a sweep: fields of runs, whose names have dots, in its overrides."""
    fields = [field.name for field in dataclasses.fields(Sweep)]
    of_run = [field.name for field in dataclasses.fields(Config)]
    head, _, rest = key.partition(".")
    if head not in fields and head not in of_run:
        raise unknown_name("setting", key, [*fields, *of_run])
    if head not in fields:
        return ["overrides", key]
    return [head, rest] if rest and head in ("space", "overrides") else key.split(".")


def _merged(of_file: dict[str, Any], given: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The file's overrides under those of the command line, which also drop what belonged to what they replace.

    As in `config.change`, another name for a part drops the part's options.

    Args:
      base: the configuration that both change.
    """
    renamed = {
        part
        for part in PARTS
        if (name := _name(part, given)) is not None and name != (_name(part, of_file) or _name(part, base))
    }
    groups = [f"{key}." for key, value in given.items() if key not in PARTS or not isinstance(value, str)]
    merged = {
        key: copy.deepcopy(value)
        for key, value in of_file.items()
        if key.partition(".")[0] not in renamed and not key.startswith(tuple(groups))
    }
    for key, value in given.items():
        path = f"{key}.name" if key in PARTS and isinstance(value, str) else key
        outer = next((one for one in merged if path.startswith(f"{one}.") and isinstance(merged[one], dict)), None)
        if outer is None:
            merged[key] = value
        else:
            configuration.change(merged[outer], [(path.removeprefix(f"{outer}."), value)])
    return merged


def _name(part: str, values: dict[str, Any]) -> Any:
    """The name that settings give a part, in any of three spellings; None where they give none."""
    found = values.get(part, values.get(f"{part}.name"))
    return found.get("name") if isinstance(found, dict) else found


def from_dict(values: dict[str, Any]) -> Sweep:
    """Builds a sweep from nested dicts, in which a dimension is a list or a mapping.

    Raises:
      ConfigurationError: as in `load`.
    """
    values = {key: value for key, value in values.items() if value is not None}
    configuration.check_keys(values, Sweep)
    values["overrides"] = _mapping(values.get("overrides"))
    values["space"] = _space("space", values.get("space", {}))
    values["variants"] = _variants(values.get("variants", []))
    try:
        sweep = pydantic.TypeAdapter(Sweep).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigurationError(configuration.readable(error)) from None
    _check(sweep)
    return sweep


def to_dict(sweep: Sweep) -> dict[str, Any]:
    """The inverse of `from_dict`."""
    values = dataclasses.asdict(sweep)
    values["space"] = _plain_space(sweep.space)
    values["seeds"] = list(sweep.seeds)
    values["variants"] = [
        {"name": one.name, "settings": one.settings, "space": _plain_space(one.space)} for one in sweep.variants
    ]
    return values


def base_values(sweep: Sweep) -> dict[str, Any]:
    """The base configuration with its overrides, as plain dicts with every default.

    Raises:
      ConfigurationError: the base cannot be read, or one of its settings cannot work.
    """
    values = configuration.read_mapping(Path(sweep.config))
    configuration.locate_plugins(values, Path(sweep.config).expanduser().parent)
    configuration.change(values, sweep.overrides.items())
    return configuration.to_dict(configuration.from_dict(values))


def typed(key: str, dimension: Dimension, whole: bool) -> Dimension:
    """A range in numbers of its field's kind, however the file spells them: `low: 0, high: 1` may be a range of floats.

    Raises:
      ConfigurationError: the field takes whole numbers, and the range is not made of them, or has fewer than its points.
    """
    if isinstance(dimension, Choices):
        return dimension
    numbers = {name: getattr(dimension, name) for name in ("low", "high", "step")}
    kind = int if whole else float
    for name, number in numbers.items():
        if number is not None and kind(number) != number:
            raise ConfigurationError(f"{key}: {name} = {number} must be a whole number, as {key} is one.")
    found = dataclasses.replace(
        dimension, **{name: kind(number) for name, number in numbers.items() if number is not None}
    )
    values = listed(found)
    if values is not None and dimension.points is not None and len(values) < dimension.points:
        raise ConfigurationError(
            f"{key}: points = {dimension.points} from {found.low} to {found.high} are only {len(values)} different whole "
            f"numbers: choose points = {len(values)}, or a wider range."
        )
    return found


def listed(dimension: Dimension) -> list[Any] | None:
    """The values of a dimension, or None for an interval that has neither step nor number of points."""
    if isinstance(dimension, Choices):
        return list(dimension.choices)
    if dimension.step is not None:
        return [_number(dimension, dimension.low + index * dimension.step) for index in range(_steps(dimension))]
    if dimension.points is None:
        return None
    shares = [index / (dimension.points - 1) for index in range(dimension.points)]
    numbers = [_number(dimension, at_share(dimension, share)) for share in shares]
    return list(dict.fromkeys(numbers))  # whole numbers may coincide


def _steps(dimension: Range) -> int:
    assert dimension.step is not None
    return int((dimension.high - dimension.low) / dimension.step + 1e-9) + 1


def at_share(dimension: Range, share: float) -> float:
    """The number at a share (0 to 1) of an interval, on its scale."""
    low, high = dimension.low, dimension.high
    return low * (high / low) ** share if dimension.log else low + share * (high - low)


def _number(dimension: Range, value: float) -> int | float:
    """Cuts off what floating point adds: 0.30000000000000004 is meant to be 0.3."""
    return round(value) if dimension.whole else float(f"{value:.12g}")


# --- reading ----------------------------------------------------------------------------------------------------------


def _mapping(overrides: Any) -> dict[str, Any]:
    """Overrides as a mapping, also where they are a list of key=value."""
    if isinstance(overrides, list | tuple):
        found: dict[str, Any] = {}
        given = [configuration.parse_override(str(override)) for override in overrides]
        configuration.change(found, given, lambda key: [key])
        return found
    return dict(_is_mapping("overrides", overrides or {}))


def _is_mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{key} = {shown(value)} must be a mapping of settings.")
    return value


def _variants(values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list | tuple):
        raise ConfigurationError(f"variants = {shown(values)} must be a list such as [{{name: a, settings: {{…}}}}].")
    return [_variant(number, value) for number, value in enumerate(values)]


def _variant(number: int, value: Any) -> dict[str, Any]:
    prefix = f"variants.{number}"
    value = _is_mapping(prefix, value)
    configuration.check_keys({key: item for key, item in value.items() if key != "space"}, Variant, f"{prefix}.")
    return {**value, "space": _space(f"{prefix}.space", value.get("space") or {})}


def _space(prefix: str, values: Any) -> dict[str, Dimension]:
    return {key: _dimension(f"{prefix}.{key}", value) for key, value in _is_mapping(prefix, values).items()}


def _dimension(key: str, value: Any) -> Dimension:
    """Reads and checks one dimension."""
    if isinstance(value, list | tuple):
        value = {"choices": list(value)}
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{key} = {shown(value)} needs a list of values, or a range such as {{low: 0.01, high: 1}}."
        )
    cls = Choices if "choices" in value else Range
    configuration.check_keys(value, cls, f"{key}.")
    try:
        dimension = pydantic.TypeAdapter(cls).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigurationError(f"{key}: {configuration.readable(error)}") from None
    if isinstance(dimension, Range):
        _check_range(key, dimension)
    elif not dimension.choices:
        raise ConfigurationError(f"{key} has no values: give at least one, or leave the field out.")
    return dimension


def _check_range(key: str, dimension: Range) -> None:
    low, high, step = dimension.low, dimension.high, dimension.step
    if not low < high:
        raise ConfigurationError(f"{key}: low = {low} must be less than high = {high}.")
    if not math.isfinite(high - low):
        raise ConfigurationError(f"{key}: from {low} to {high} is too wide a range.")
    if dimension.log and low <= 0:
        raise ConfigurationError(f"{key}: low = {low} with log must be greater than 0.")
    if step is not None and not 0 < step <= high - low:
        raise ConfigurationError(f"{key}: step = {step} must be greater than 0 and at most {high - low}.")
    if step is not None and (dimension.log or dimension.points):
        raise ConfigurationError(f"{key}: step = {step} does not go with log or points: use points, or leave them out.")
    if step is not None and _steps(dimension) > MOST_VALUES:
        raise ConfigurationError(
            f"{key}: step = {step} makes {_steps(dimension)} values from {low} to {high}, more than {MOST_VALUES}: choose a "
            "larger one."
        )


def _check(sweep: Sweep) -> None:
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigurationError(f"seeds = {list(sweep.seeds)} names a seed twice: each belongs there once.")
    names = [variant.name for variant in sweep.variants]
    if len(set(names)) < len(names) or "" in names:
        raise ConfigurationError(f"variants are named {names}: every one needs a name of its own.")
    if sweep.search == "grid" and sweep.trials is not None:
        raise ConfigurationError(
            f"trials = {sweep.trials} with search = 'grid', which tries every point: leave it out."
        )
    if sweep.search != "grid" and sweep.trials is None:
        raise ConfigurationError(f"search = {sweep.search!r} needs the number of trials, for example trials=20.")
    for key in sweep.overrides:
        _check_field(f"overrides.{key}", key)
    for variant in sweep.every_variant():
        for key in (*variant.settings, *variant.space):
            _check_field(f"the field {key}", key)
            if key.partition(".")[0] == "plugins":
                raise ConfigurationError(
                    "plugins are the same in all trials: name them in the base, or in `overrides`."
                )
        twice = sorted(variant.settings.keys() & variant.space.keys())
        if twice:
            raise ConfigurationError(f"variant {variant.name!r} both sets and searches {', '.join(twice)}: do one.")
        for key, dimension in variant.space.items():
            if sweep.search == "grid" and listed(dimension) is None:
                raise ConfigurationError(f"{key}: a grid needs the number of points (or a step) of this range.")


def _check_field(what: str, key: str) -> None:
    if key in _TAKEN:
        raise ConfigurationError(f"{what} cannot be set by a sweep: {_TAKEN[key]}.")


def _plain_space(space: dict[str, Dimension]) -> dict[str, Any]:
    return {
        key: list(dimension.choices) if isinstance(dimension, Choices) else _plain_range(dimension)
        for key, dimension in space.items()
    }


def _plain_range(interval: Range) -> dict[str, Any]:
    values = dataclasses.asdict(interval)
    return {name: value for name, value in values.items() if value is not None and value is not False}
