"""Which trials a sweep makes: Optuna's samplers propose them, and each is checked before any compute.

Proposals are functions of the sweep file and, for `tpe`, of the results so far: nothing of them has to be saved, and an
interrupted sweep goes on with the trials that it would have made. Asking for more trials later only adds some. Fields are
drawn in the order of their names, whatever their order in the file.
"""

import copy
import dataclasses
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from fedjax_qp import config as configuration
from fedjax_qp.config import PARTS, Config
from fedjax_qp.experiment import check, is_whole_number, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown
from fedjax_qp.sweeps.space import MOST_VALUES, Dimension, Range, Sweep, Variant, fields, is_tuned, listed, settings_of

_TRIES = 50  # draws for one new point, before the space counts as used up

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Point(NamedTuple):
    """What a trial tries."""

    settings: dict[str, Any]  # by field: the variant's own and the searched ones
    params: Mapping[str, Any] = MappingProxyType({})  # the searched ones as Optuna knows them
    distributions: Mapping[str, BaseDistribution] = MappingProxyType({})  # where they are from


def identity(settings: dict[str, Any]) -> str:
    """Two points of a variant are the same trial exactly where this is the same."""
    return json.dumps(settings, sort_keys=True, default=str)


def searched_variants(sweep: Sweep) -> list[Variant]:
    """The variants with trials, every range in numbers of its field's kind: in a comparison those that have a choice.

    Raises:
      ConfigurationError: a range does not suit its field.
    """
    return [
        _typed(sweep, variant) for variant in sweep.every_variant() if sweep.compare is None or is_tuned(sweep, variant)
    ]


def planned(sweep: Sweep) -> dict[str, list[Point]]:
    """The trials that are known beforehand, by variant, each checked; of `tpe` none, whose space is checked at its ends.

    Raises:
      ConfigurationError: some trial cannot work, or there are too many.
    """
    variants = searched_variants(sweep)
    trials = sum(settings_of(sweep, variant) for variant in variants)
    if trials > MOST_VALUES:
        raise ConfigurationError(
            f"the {sweep.search} has {trials} trials, more than {MOST_VALUES}: search fewer values, or choose search = "
            "'random' with fewer trials."
        )
    if sweep.compare is not None:
        for variant in sweep.every_variant():
            parent = next(one for one in sweep.every_variant() if one.name == (variant.like or variant.name))
            compared(sweep, variant, single(sweep, parent))
    if sweep.search != "tpe":
        return {variant.name: proposals(sweep, variant, []) for variant in variants}
    for variant in variants:
        ends = {key: [one.low, one.high] if isinstance(one, Range) else one for key, one in variant.space.items()}
        first = {key: values[0] for key, values in ends.items()}
        for change in [{key: value} for key, values in ends.items() for value in values] or [{}]:
            checked(sweep, variant.name, settings_with(variant, {**first, **change}))
    return {}


def proposals(sweep: Sweep, variant: Variant, trials: Sequence[FrozenTrial]) -> list[Point]:
    """The points of a grid or a random search; of `tpe` those of the present batch, none while the last one runs.

    Args:
      variant: from `searched_variants`.
      trials: of this variant so far.

    Raises:
      ConfigurationError: some configuration cannot work.
    """
    known, count = [], settings_of(sweep, variant)
    if sweep.search == "tpe":
        known = list(trials[: len(trials) // sweep.batch * sweep.batch])
        count = min(sweep.batch, count - len(known))
    if count <= 0 or any(not trial.state.is_finished() for trial in known):
        return []
    asked = _asked(sweep, variant, known)
    if sweep.search == "grid":  # which Optuna shuffles; the last field varies fastest
        asked = iter(sorted(itertools.islice(asked, count), key=lambda point: _place(variant, point)))
    return _different(sweep, variant, known, asked, count)


def compared(sweep: Sweep, variant: Variant, settings: dict[str, Any]) -> dict[str, Any]:
    """The checked settings with which a variant takes part in the comparison.

    Args:
      settings: the chosen ones, of the variant itself or of the one that it is like.
    """
    rounds = {} if sweep.compare is None or sweep.compare.rounds is None else {"rounds": sweep.compare.rounds}
    own = variant.settings if variant.like else {}
    return checked(sweep, variant.name, {**settings, **own, **rounds})


def single(sweep: Sweep, variant: Variant) -> dict[str, Any]:
    """The settings of a variant that has no choice, or the first ones of another."""
    searched = {key: one.low if isinstance(one, Range) else one[0] for key, one in _typed(sweep, variant).space.items()}
    return checked(sweep, variant.name, settings_with(variant, searched))


def settings_with(variant: Variant, searched: dict[str, Any]) -> dict[str, Any]:
    """A variant's own settings and the searched ones, those of a dimension of several fields one by one."""
    found = dict(variant.settings)
    for key in variant.space:
        names = fields(key)
        found |= {key: searched[key]} if len(names) == 1 else dict(zip(names, searched[key], strict=True))
    return found


def configure(base: dict[str, Any], settings: dict[str, Any], *, name: str, folder: str, seed: int) -> Config:
    """The resolved configuration of one run.

    Raises:
      ConfigurationError: a field does not exist, or its value cannot work.
    """
    values = copy.deepcopy(base)
    configuration.change(values, settings.items())
    values |= {"name": name, "folder": folder, "seed": seed}
    return resolve(configuration.from_dict(values))


def checked(sweep: Sweep, variant: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Builds the configuration and algorithm of some settings, without data; returns them as the run sees them.

    So `1e-3`, which YAML reads as a text, and 0.001 are the same trial.
    """
    try:
        config = configure(sweep.base, settings, name="trial", folder="runs", seed=0)
        check(config)
    except ConfigurationError as error:
        said = ", ".join(f"{key}={shown(value)}" for key, value in settings.items())
        raise ConfigurationError(
            f"{error} (in the trial {variant or 'with'} {said[:200] or 'the base itself'})"
        ) from None
    values = configuration.to_dict(config)
    return {key: _as_resolved(values, key, value) for key, value in settings.items()}


def _as_resolved(values: Any, key: str, given: Any) -> Any:
    for name in key.split("."):
        values = values[name]
    return given if isinstance(values, dict) else values


def _different(
    sweep: Sweep, variant: Variant, known: Sequence[FrozenTrial], asked: Iterator[Point], count: int
) -> list[Point]:
    """The first `count` points that are neither known nor repeated, checked; fewer where too many repeat."""
    seen, found, tries = {identity(trial.user_attrs["settings"]) for trial in known}, [], 0
    for point in asked:
        point = point._replace(settings=checked(sweep, variant.name, point.settings))
        tries += 1
        if identity(point.settings) not in seen:
            seen.add(identity(point.settings))
            found.append(point)
            tries = 0
        if len(found) == count or (tries == _TRIES and sweep.search != "grid"):
            break
    return found


# --- Optuna -----------------------------------------------------------------------------------------------------------


def _asked(sweep: Sweep, variant: Variant, known: Sequence[FrozenTrial]) -> Iterator[Point]:
    """Yields what Optuna proposes, forever."""
    distributions = {key: _distribution(dimension) for key, dimension in sorted(variant.space.items())}
    seed = zlib.crc32(f"{sweep.search_seed} {variant.name} {len(known)}".encode())
    study = optuna.create_study(direction=sweep.rank.optuna_direction, sampler=_sampler(sweep, variant, seed))
    study.add_trials(known)
    while True:
        params = study.ask(fixed_distributions=distributions).params
        searched = {key: _value(variant.space[key], param) for key, param in params.items()}
        yield Point(settings_with(variant, searched), params, distributions)


def _place(variant: Variant, point: Point) -> list[float]:
    """Where a point stands in a grid."""
    return [point.distributions[key].to_internal_repr(point.params[key]) for key in variant.space]


def _sampler(sweep: Sweep, variant: Variant, seed: int) -> BaseSampler:
    if sweep.search == "grid":
        return GridSampler({key: list(map(_param, listed(one) or ())) for key, one in variant.space.items()}, seed=seed)
    return RandomSampler(seed) if sweep.search == "random" else TPESampler(seed=seed)


def _distribution(dimension: Dimension) -> BaseDistribution:
    values = listed(dimension)
    if values is not None:
        return CategoricalDistribution([_param(value) for value in values])
    assert isinstance(dimension, Range)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _param(value: Any) -> bool | int | float | str | None:
    """A value as Optuna knows it, which has no lists or mappings."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value


def _value(dimension: Dimension, param: Any) -> Any:
    """The inverse of `_param`."""
    values = listed(dimension)
    return param if values is None else next(value for value in values if _param(value) == param)


# --- ranges -----------------------------------------------------------------------------------------------------------


def _typed(sweep: Sweep, variant: Variant) -> Variant:
    values = copy.deepcopy(sweep.base)
    names = {
        key: one[0]
        for key, one in variant.space.items()
        if not isinstance(one, Range) and key.removesuffix(".name") in PARTS
    }
    configuration.change(values, {**variant.settings, **names}.items())
    parts = {part: value["name"] for part in PARTS if isinstance(value := values[part], dict) and "name" in value}
    return dataclasses.replace(
        variant,
        space={
            key: _of_kind(key, one, is_whole_number(key, parts)) if isinstance(one, Range) else one
            for key, one in variant.space.items()
        },
    )


def _of_kind(key: str, dimension: Range, whole: bool) -> Range:
    """A range in numbers of its field's kind, however the file spells them: `low: 0, high: 1` may be a range of floats."""
    kind = int if whole else float
    found = dataclasses.replace(dimension, low=kind(dimension.low), high=kind(dimension.high))
    for name in ("low", "high"):
        if getattr(found, name) != (number := getattr(dimension, name)):
            raise ConfigurationError(f"{key}: {name} = {number} must be a whole number, as {key} is one.")
    values = listed(found)
    if values is not None and dimension.points is not None and len(values) < dimension.points:
        raise ConfigurationError(
            f"{key}: points = {dimension.points} from {found.low} to {found.high} are only {len(values)} different whole "
            f"numbers: choose points = {len(values)}, or a wider range."
        )
    return found
