"""Which trials a sweep makes: every point of a grid, random points, or points that Optuna proposes.

All three are functions of the sweep file and, for Optuna, of the results so far: nothing of them has to be saved, and an
interrupted sweep goes on with the trials that it would have made. Random draws depend on the variant's name and on their
number alone, so asking for more trials later only adds some. Fields are drawn in the order of their names, whatever their
order in the file.
"""

import copy
import dataclasses
import itertools
import json
import logging
import math
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_qp import config as configuration
from fedjax_qp.config import PARTS, Config
from fedjax_qp.experiment import check, is_whole_number, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown
from fedjax_qp.sweeps.space import MOST_VALUES, Choices, Dimension, Range, Sweep, Variant, at_share, listed, typed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_TRIES = 50  # draws for one new point, before the space counts as used up


class Point(NamedTuple):
    """What a trial tries."""

    variant: str
    settings: dict[str, Any]  # by field: the variant's own and the searched ones
    drawn: dict[str, int | float] = {}  # noqa: RUF012 (never written to); Optuna: the searched ones as it knows them


class Told(NamedTuple):
    """How a point turned out."""

    point: Point
    value: float | None  # None where there is none: diverged or failed
    complete: bool
    rounds: int


def identity(point: Point) -> str:
    """Two points are the same trial exactly where this is the same."""
    return json.dumps([point.variant, point.settings], sort_keys=True, default=str)


def typed_variants(sweep: Sweep, base: dict[str, Any]) -> list[Variant]:
    """The variants with the common space filled in, every range in numbers of its field's kind.

    Raises:
      ConfigurationError: a range does not suit its field.
    """
    return [_typed(variant, base) for variant in sweep.every_variant()]


def _typed(variant: Variant, base: dict[str, Any]) -> Variant:
    values = copy.deepcopy(base)
    names = {
        key: dimension.choices[0]
        for key, dimension in variant.space.items()
        if isinstance(dimension, Choices) and key.removesuffix(".name") in PARTS
    }
    configuration.change(values, {**variant.settings, **names}.items())
    parts = {part: value["name"] for part in PARTS if isinstance(value := values[part], dict) and "name" in value}
    space = {key: typed(key, dimension, is_whole_number(key, parts)) for key, dimension in variant.space.items()}
    return dataclasses.replace(variant, space=space)


def grid(sweep: Sweep, base: dict[str, Any]) -> list[Point]:
    """Every point of every variant, each once; the last field varies fastest.

    Raises:
      ConfigurationError: some configuration cannot work, or there are too many.
    """
    variants = typed_variants(sweep, base)
    values = [[listed(dimension) or [] for dimension in variant.space.values()] for variant in variants]
    trials = sum(math.prod(map(len, of_variant)) for of_variant in values)
    if trials > MOST_VALUES:
        raise ConfigurationError(
            f"the grid has {trials} trials, more than {MOST_VALUES}: search fewer values, or choose search = 'random'."
        )
    points = [
        checked(base, _point(variant, dict(zip(variant.space, chosen, strict=True))))
        for variant, of_variant in zip(variants, values, strict=True)
        for chosen in itertools.product(*of_variant)
    ]
    return list({identity(point): point for point in points}.values())


def random(sweep: Sweep, base: dict[str, Any]) -> list[Point]:
    """`trials` different points of every variant; fewer where its space has no more.

    Raises:
      ConfigurationError: as in `grid`.
    """
    points: list[Point] = []
    for variant in typed_variants(sweep, base):
        seed = (sweep.search_seed, zlib.crc32(variant.name.encode()))
        draws = (
            {key: _draw(dimension, generator) for key, dimension in sorted(variant.space.items())}
            for generator in (np.random.default_rng((*seed, number)) for number in itertools.count())
        )
        points += _different(base, [], (_point(variant, draw) for draw in draws), sweep.trials or 0)
    return points


def proposals(sweep: Sweep, base: dict[str, Any], told: Sequence[Told]) -> list[Point]:
    """Optuna's next points: at most `batch` for each variant, none once it has its trials or its space is used up.

    Each variant has a study of its own (tree-structured Parzen estimator), made anew from the results every time. Trials
    that were stopped early count as worse than finished ones, diverged and failed ones as worst.

    Raises:
      ConfigurationError: as in `grid`.
    """
    points = []
    for variant in typed_variants(sweep, base):
        before = [one for one in told if one.point.variant == variant.name]
        wanted = min(sweep.batch, (sweep.trials or 0) - len(before))
        if wanted > 0:
            asked = _asked(sweep, variant, before)
            points += _different(base, [one.point for one in before], asked, wanted)
    return points


def check_space(sweep: Sweep, base: dict[str, Any]) -> None:
    """Checks what Optuna may propose: every choice and both ends of every range, one field at a time.

    Raises:
      ConfigurationError: as in `grid`.
    """
    for variant in typed_variants(sweep, base):
        extremes = {key: _extremes(dimension) for key, dimension in variant.space.items()}
        first = {key: values[0] for key, values in extremes.items()}
        changes = [{key: value} for key, values in extremes.items() for value in values]
        for change in changes or [{}]:
            checked(base, _point(variant, {**first, **change}))


def configure(base: dict[str, Any], settings: dict[str, Any], *, name: str, folder: str, seed: int) -> Config:
    """The resolved configuration of one run.

    Raises:
      ConfigurationError: a field does not exist, or its value cannot work.
    """
    values = copy.deepcopy(base)
    configuration.change(values, settings.items())
    values |= {"name": name, "folder": folder, "seed": seed}
    return resolve(configuration.from_dict(values))


def checked(base: dict[str, Any], point: Point) -> Point:
    """Builds a point's configuration and algorithm, without data; returns it with the values as the run sees them.

    So `1e-3`, which YAML reads as a text, and 0.001 are the same trial.
    """
    try:
        config = configure(base, point.settings, name="trial", folder="runs", seed=0)
        check(config)
    except ConfigurationError as error:
        settings = ", ".join(f"{key}={shown(value)}" for key, value in point.settings.items())
        raise ConfigurationError(
            f"{error} (in the trial {point.variant or 'with'} {settings[:200] or 'the base itself'})"
        ) from None
    values = configuration.to_dict(config)
    settings = {key: _as_resolved(values, key, value) for key, value in point.settings.items()}
    return point._replace(settings=settings)


def _as_resolved(values: Any, key: str, given: Any) -> Any:
    for name in key.split("."):
        values = values[name]
    return given if isinstance(values, dict) else values


def _point(variant: Variant, searched: dict[str, Any], drawn: dict[str, Any] | None = None) -> Point:
    in_order = {key: searched[key] for key in variant.space}
    return Point(variant.name, {**variant.settings, **in_order}, drawn or {})


def _different(base: dict[str, Any], known: list[Point], points: Iterator[Point], count: int) -> list[Point]:
    """The first `count` points that are neither known nor repeated, checked; fewer where too many repeat."""
    seen, found, tries = {identity(point) for point in known}, [], 0
    for point in points:
        if len(found) == count or tries == _TRIES:
            break
        point, tries = checked(base, point), tries + 1
        if identity(point) not in seen:
            seen.add(identity(point))
            found.append(point)
            tries = 0
    return found


def _draw(dimension: Dimension, generator: np.random.Generator) -> Any:
    values = listed(dimension)
    if values is not None:
        return values[int(generator.integers(len(values)))]
    assert isinstance(dimension, Range)
    if dimension.whole and not dimension.log:
        return int(generator.integers(int(dimension.low), int(dimension.high), endpoint=True))
    return _rounded(dimension, at_share(dimension, generator.uniform()))


def _rounded(dimension: Range, value: float) -> int | float:
    """Four digits are enough to quote, and fine enough to search."""
    short = round(value) if dimension.whole else float(f"{value:.4g}")
    return min(max(short, dimension.low), dimension.high)


def _extremes(dimension: Dimension) -> list[Any]:
    return list(dimension.choices) if isinstance(dimension, Choices) else [dimension.low, dimension.high]


# --- Optuna -----------------------------------------------------------------------------------------------------------


def _asked(sweep: Sweep, variant: Variant, told: Sequence[Told]) -> Iterator[Point]:
    """Yields proposals forever from a study of the results so far."""
    import optuna

    logging.getLogger("optuna").setLevel(logging.WARNING)
    distributions = {key: _distribution(dimension) for key, dimension in sorted(variant.space.items())}
    seed = zlib.crc32(f"{sweep.search_seed} {variant.name} {len(told)}".encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the liar: what is asked counts as bad
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(direction="maximize" if sweep.rank.sign > 0 else "minimize", sampler=sampler)
    study.add_trials([_frozen(one, distributions) for one in told])
    while True:
        parameters = study.ask(fixed_distributions=distributions).params
        searched = {key: _value(variant.space[key], number) for key, number in parameters.items()}
        yield _point(variant, searched, parameters)


def _distribution(dimension: Dimension) -> "BaseDistribution":
    """A choice is searched by its index, since Optuna knows no lists or mappings; steps of a range by theirs, in order."""
    from optuna import distributions

    values = listed(dimension)
    if isinstance(dimension, Choices):
        return distributions.CategoricalDistribution(range(len(dimension.choices)))
    if values is not None:
        return distributions.IntDistribution(0, len(values) - 1)
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _value(dimension: Dimension, number: int | float) -> Any:
    values = listed(dimension)
    if values is not None:
        return values[int(number)]
    assert isinstance(dimension, Range)
    return _rounded(dimension, number)


def _frozen(told: Told, distributions: dict[str, "BaseDistribution"]) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    shared = {"params": told.point.drawn, "distributions": distributions}
    if told.complete and told.value is not None:
        return create_trial(state=TrialState.COMPLETE, value=told.value, **shared)
    seen = {} if told.value is None else {told.rounds: told.value}
    return create_trial(state=TrialState.PRUNED, intermediate_values=seen, **shared)
