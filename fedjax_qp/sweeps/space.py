"""The sweep file: YAML mapped strictly onto frozen dataclasses, with every default of a sweep in this file.

A sweep varies fields of one base configuration, each by its dotted name (`algorithm.alpha`, `partition`, `rounds`, …):

    name: sweep-mnist5k
    config: mnist5k.yaml                  # the base, relative to this file
    overrides: {rounds: 20}               # changes to it
    seeds: [0, 1, 2]                      # every trial runs once with each
    search: grid                          # or random, tpe
    space:
      local.epochs: [1, 5]
      local.learning_rate: {low: 0.01, high: 0.1, log: true, points: 4}
    variants:                             # coupled settings, each with a space of its own besides the common one
      - {name: fedavg, settings: {algorithm: fedavg}}
      - {name: fedprox, settings: {algorithm: fedprox}, space: {algorithm.proximal: [0.001, 0.01]}}
    compare: {seeds: [3, 4, 5], baseline: fedavg}     # then the best setting of each variant on seeds that chose nothing

A trial is one point of a variant's space; a run is a trial with one seed. Fields that go together are one dimension:
`"algorithm.alpha, algorithm.margin": [[1, 0], [2, 0.25]]`. On the command line, `key=value` changes the sweep where the key
is one of `Sweep`'s, and the base configuration otherwise: `workers=4 rounds=50 space.rounds=[5,10]`. There it wins over the
file's `overrides`. A whole group replaces that of the base: `overrides: {local: {epochs: 3}}` leaves the defaults for all
else in `local`, and `overrides: {local.epochs: 3}` what the base has.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from fedjax_qp import config as configuration
from fedjax_qp.config import Config
from fedjax_qp.registry import ConfigurationError, require, unknown_name
from fedjax_qp.settings import presets
from fedjax_qp.settings.values import Count, Finite, Line, Name, PathName, Seed, Truth, Whole, shown

MOST_VALUES = 10_000  # of a field, and trials of a sweep: each is a run at least
COMPARISON = "comparison"  # names the study and the folder of the runs that follow the search
Number = Whole | Finite


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("seeds", "names a seed twice: each belongs there once")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_each_once)]

# The sweep gives every run these itself.
_TAKEN = {"name": "the sweep names its runs", "folder": "the sweep keeps its runs in its own", "seed": "use `seeds`"}


@dataclass(frozen=True)
class Range:
    """An interval, both ends included; of whole numbers where the field is one, see `search`."""

    low: Number
    high: Number
    log: Truth = False
    points: Annotated[Whole, Field(ge=2, le=MOST_VALUES)] | None = None  # evenly spaced on the scale; a grid needs them

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Dimension = tuple[Any, ...] | Range  # values to choose from, or an interval


@dataclass(frozen=True)
class Variant:
    """Settings that belong together, for example a method, with the space of its own options."""

    name: Annotated[Name | Literal[""], Field(union_mode="left_to_right")]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    space: dict[str, Dimension] = dataclasses.field(default_factory=dict)
    like: Name | None = None  # another variant: its best settings changed by these, in the comparison only


@dataclass(frozen=True)
class Rank:
    """What makes a trial good: the mean of a metric's last evaluations, averaged over seeds."""

    metric: Line = "test_accuracy"  # a name in the records; inner ones as personal/perplexity/mean
    direction: Literal["max", "min"] | None = None  # null = max for an accuracy, min for everything else
    last: Count = 10  # evaluations

    @property
    def optuna_direction(self) -> Literal["maximize", "minimize"]:
        direction = self.direction or ("max" if "accuracy" in self.metric else "min")
        return "maximize" if direction == "max" else "minimize"


@dataclass(frozen=True)
class EarlyStopping:
    """Gives hopeless trials up by one of Optuna's pruners; variants are judged apart, a trial with all of its seeds."""

    # median: worse than the median of complete trials at that round. halving: not among the better quarter of all trials that
    # have come to rounds after, 4 × after, 16 × after, …; unlike the first it judges trials that run side by side.
    pruner: Literal["median", "halving"] = "median"
    after: Count = 10  # rounds that every trial gets
    least_trials: Annotated[Whole, Field(ge=2)] = 4  # median: complete ones that must be there


@dataclass(frozen=True)
class Comparison:
    """What follows the search: the best setting of each variant, each with the same seeds, which chose nothing."""

    seeds: Seeds
    rounds: Count | None = None  # null = as in the search
    last: Count = 10  # evaluations that an accuracy is averaged over
    baseline: Name | None = None  # the variant that differences are taken to, seed by seed


@dataclass(frozen=True)
class Sweep:
    """One sweep."""

    name: Name
    config: PathName  # path of the base configuration
    base: dict[str, Any]  # what it holds, with the overrides and every default; not a setting of the file
    folder: PathName = "runs"  # the sweep's own folder is made in it, under the sweep's name
    seeds: Seeds = (0,)
    search: Literal["grid", "random", "tpe"] = "grid"  # Optuna's sampler
    trials: Annotated[Count, Field(le=MOST_VALUES)] | None = None  # of each variant; random and tpe need it
    search_seed: Annotated[Whole, Field(ge=0)] = 0
    # tpe: trials proposed at once; they run together, and the next proposals know their results
    batch: Annotated[Count, Field(le=MOST_VALUES)] = 8
    space: dict[str, Dimension] = dataclasses.field(default_factory=dict)  # of every variant
    variants: tuple[Variant, ...] = ()  # in the file also the path of another one with a list `variants`
    rank: Rank = dataclasses.field(default_factory=Rank)
    early_stopping: EarlyStopping | None = None
    compare: Comparison | None = None
    # processes of the embedded cluster, see `schedule`
    workers: Annotated[Count, Field(le=4096)] | Literal["auto"] = "auto"
    cluster: Line | None = None  # address of an existing Dask scheduler, for example tcp://10.0.0.1:8786
    runs_per_task: Count | None = None  # null = as many as share a program, divided among the workers
    # of a task that fails or whose worker dies, before it is taken apart
    retries: Annotated[Whole, Field(ge=0, le=1000)] = 2

    @property
    def sweep_folder(self) -> Path:
        return Path(self.folder).expanduser() / self.name

    def every_variant(self) -> tuple[Variant, ...]:
        """The variants with the common space filled in; one without a name where the sweep has none."""
        variants = self.variants or (Variant(""),)
        return tuple(
            one if one.like else dataclasses.replace(one, space={**self.space, **one.space}) for one in variants
        )


def load(path: Path, overrides: list[str] | None = None) -> Sweep:
    """Reads a sweep file; see the module docstring for the overrides.

    Raises:
      ConfigurationError: a key is unknown (the nearest valid ones are named) or missing, or a value is out of range.
    """
    values = configuration.read_mapping(path)
    for key in ("config", "variants"):
        if isinstance(values.get(key), str):
            values[key] = str(presets.located(path).expanduser().parent / Path(values[key]).expanduser())
    of_file = values.pop("overrides", None)
    if isinstance(of_file, dict):
        configuration.locate_plugins(of_file, path.expanduser().parent)
    given = [configuration.parse_override(override) for override in overrides or []]
    configuration.change(values, given, _place)
    return _sweep(values, [of_file, values.pop("overrides", None)])


def from_dict(values: dict[str, Any]) -> Sweep:
    """Builds a sweep from nested dicts, as a file would hold them.

    Raises:
      ConfigurationError: as in `load`.
    """
    return _sweep({key: value for key, value in values.items() if key != "overrides"}, [values.get("overrides")])


def fields(key: str) -> list[str]:
    """The settings that a dimension of a space varies: one, or several that go together."""
    return [field.strip() for field in key.split(",")]


def listed(dimension: Dimension) -> list[Any] | None:
    """The values of a dimension, or None for an interval without a number of points."""
    if not isinstance(dimension, Range):
        return list(dimension)
    if dimension.points is None:
        return None
    import numpy as np  # a typo in the file is answered without it

    space = np.geomspace if dimension.log else np.linspace
    numbers = space(dimension.low, dimension.high, dimension.points)
    # Floating point adds something: 0.30000000000000004 is meant to be 0.3. Whole numbers may coincide.
    return list(dict.fromkeys(round(one) if dimension.whole else float(f"{one:.12g}") for one in numbers))


# --- reading ----------------------------------------------------------------------------------------------------------


def _place(key: str) -> list[str]:
    """Where a setting of the command line stands in a sweep: fields of runs, whose names have dots, in its overrides."""
    of_sweep = [*(field.name for field in dataclasses.fields(Sweep) if field.name != "base"), "overrides"]
    of_run = [field.name for field in dataclasses.fields(Config)]
    head, _, rest = key.partition(".")
    if head not in of_sweep and head not in of_run:
        raise unknown_name("setting", key, [*of_sweep, *of_run])
    if head not in of_sweep:
        return ["overrides", key]
    return [head, rest] if rest and head in ("space", "overrides") else key.split(".")


def _sweep(values: dict[str, Any], overrides: list[Any]) -> Sweep:
    """Args: overrides: of the base, one after the other."""
    values = {key: value for key, value in values.items() if value is not None and key != "base"}
    values["space"] = _space("space", values.get("space", {}))
    values["variants"] = _variants(values.get("variants", []))
    values["base"] = {}
    configuration.check_keys({key: value for key, value in values.items() if key != "space"}, Sweep)
    try:
        sweep = pydantic.TypeAdapter(Sweep).validate_python(values)
    except pydantic.ValidationError as error:
        raise ConfigurationError(configuration.readable(error)) from None
    _check(sweep)
    return dataclasses.replace(sweep, base=_base(sweep.config, overrides))


def _base(config: str, overrides: list[Any]) -> dict[str, Any]:
    values = configuration.read_mapping(Path(config))
    configuration.locate_plugins(values, Path(config).expanduser().parent)
    for changes in overrides:
        changes = _mapping("overrides", changes or {})
        for key in changes:
            _check_field(f"overrides.{key}", key)
        configuration.change(values, changes.items())
    return configuration.to_dict(configuration.from_dict(values))


def _mapping(key: str, value: Any) -> dict[str, Any]:
    require(isinstance(value, dict), f"{key} = {shown(value)} must be a mapping of settings.")
    return value


def _variants(values: Any) -> list[dict[str, Any]]:
    if isinstance(values, str):
        values = configuration.read_mapping(Path(values)).get("variants")
    if not isinstance(values, list | tuple):
        raise ConfigurationError(f"variants = {shown(values)} must be a list such as [{{name: a, settings: {{…}}}}].")
    return [_variant(f"variants.{number}", value) for number, value in enumerate(values)]


def _variant(prefix: str, value: Any) -> dict[str, Any]:
    value = _mapping(prefix, value)
    configuration.check_keys({key: item for key, item in value.items() if key != "space"}, Variant, f"{prefix}.")
    return {**value, "space": _space(f"{prefix}.space", value.get("space") or {})}


def _space(prefix: str, values: Any) -> dict[str, Dimension]:
    return {key: _dimension(f"{prefix}.{key}", key, value) for key, value in _mapping(prefix, values).items()}


def _dimension(where: str, key: str, value: Any) -> Dimension:
    """Reads and checks one dimension."""
    together = len(fields(key))
    if isinstance(value, list | tuple):
        require(value, f"{where} has no values: give at least one, or leave the field out.")
        for one in value if together > 1 else ():
            require(
                isinstance(one, list | tuple) and len(one) == together,
                f"{where}: {shown(one)} must be a list of {together} values, one for each of the fields.",
            )
        return tuple(value)
    if not isinstance(value, dict) or together > 1:
        raise ConfigurationError(
            f"{where} = {shown(value)} needs a list of values, or a range such as {{low: 0.01, high: 1}}."
        )
    configuration.check_keys(value, Range, f"{where}.")
    try:
        dimension = pydantic.TypeAdapter(Range).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigurationError(f"{where}: {configuration.readable(error)}") from None
    _check_range(where, dimension)
    return dimension


def _check_range(key: str, dimension: Range) -> None:
    low, high = dimension.low, dimension.high
    require(low < high, f"{key}: low = {low} must be less than high = {high}.")
    require(math.isfinite(high - low), f"{key}: from {low} to {high} is too wide a range.")
    require(low > 0 or not dimension.log, f"{key}: low = {low} with log must be greater than 0.")


def _check(sweep: Sweep) -> None:
    names = [variant.name for variant in sweep.variants]
    require(
        len(set(names)) == len(names) and "" not in names and COMPARISON not in names,
        f"variants are named {names}: every one needs a name of its own, which is not {COMPARISON!r}.",
    )
    require(
        sweep.search != "grid" or sweep.trials is None,
        f"trials = {sweep.trials} with search = 'grid', which tries every point: leave it out.",
    )
    require(
        sweep.search == "grid" or sweep.trials is not None,
        f"search = {sweep.search!r} needs the number of trials, for example trials=20.",
    )
    for variant in sweep.every_variant():
        _check_variant(sweep, variant)
    if sweep.compare is not None:
        _check_comparison(sweep, sweep.compare)


def _check_variant(sweep: Sweep, variant: Variant) -> None:
    given = [*variant.settings, *(field for key in variant.space for field in fields(key))]
    for key in given:
        _check_field(f"the field {key}", key)
        require(key != "plugins", "plugins are the same in all trials: name them in the base, or in `overrides`.")
    twice = sorted({key for key in given if given.count(key) > 1})
    require(not twice, f"variant {variant.name!r} both sets and searches {', '.join(twice)}, or does so twice: do one.")
    for key, dimension in variant.space.items():
        require(
            sweep.search != "grid" or listed(dimension) is not None,
            f"{key}: a grid needs the number of points (or a step) of this range.",
        )
    if variant.like is None:
        return
    others = [one.name for one in sweep.variants if one.like is None]
    if variant.like not in others:
        raise unknown_name("variant (like)", variant.like, others)
    require(
        not variant.space and sweep.compare is not None,
        f"variant {variant.name!r} is like {variant.like!r}, so it has no space of its own, and needs `compare`.",
    )


def _check_comparison(sweep: Sweep, compare: Comparison) -> None:
    names = [variant.name for variant in sweep.variants]
    require(len(names) > 1, "compare needs two or more variants: give each method one.")
    if compare.baseline is not None and compare.baseline not in names:
        raise unknown_name("variant (compare.baseline)", compare.baseline, names)
    tried = {one.name: settings_of(sweep, one) for one in sweep.every_variant() if is_tuned(sweep, one)}
    shared = sorted({*compare.seeds} & {*sweep.seeds}) if tried else []
    require(
        not shared,
        f"compare.seeds = {list(compare.seeds)}: {', '.join(map(str, shared))} already chooses the settings (seeds = "
        f"{list(sweep.seeds)}): compare on others.",
    )
    require(
        len(set(tried.values())) <= 1,
        "compare needs as many settings for each variant that has a choice, or it favours one; here "
        f"{', '.join(f'{name} has {count}' for name, count in tried.items())}.",
    )


def is_tuned(sweep: Sweep, variant: Variant) -> bool:
    """Whether the search chooses among several settings of a variant."""
    return variant.like is None and settings_of(sweep, variant) > 1


def settings_of(sweep: Sweep, variant: Variant) -> int:
    """How many settings of a variant the search tries."""
    if sweep.search == "grid" or not variant.space:
        return math.prod(len(listed(dimension) or ()) for dimension in variant.space.values())
    return sweep.trials or 0


def _check_field(what: str, key: str) -> None:
    if key in _TAKEN:
        raise ConfigurationError(f"{what} cannot be set by a sweep: {_TAKEN[key]}.")
