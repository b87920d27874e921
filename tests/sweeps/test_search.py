"""Random points and Optuna's proposals: within the space, different, and the same every time."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sweeps import sweep_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.search import Told, check_space, identity, proposals, random
from fedjax_qp.sweeps.space import base_values

MIXED = {
    "local.learning_rate": {"low": 0.001, "high": 1.0, "log": True},
    "local.momentum": {"low": 0.0, "high": 0.9},
    "local.epochs": {"low": 1, "high": 5},
    "algorithm.weighting": ["size", "uniform"],
}


def inside(point) -> bool:
    values = point.settings
    return (
        0.001 <= values["local.learning_rate"] <= 1
        and 0 <= values["local.momentum"] <= 0.9
        and values["local.epochs"] in range(1, 6)
        and values["algorithm.weighting"] in ("size", "uniform")
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 4))
def test_more_random_trials_only_add(tmp_path_factory, seed, trials, more):
    folder = tmp_path_factory.mktemp("sweep")
    few = sweep_of(folder, search="random", trials=trials, search_seed=seed, space=MIXED)
    many = sweep_of(folder, search="random", trials=trials + more, search_seed=seed, space=MIXED)
    base = base_values(few)
    assert random(many, base)[:trials] == random(few, base)
    assert all(inside(point) for point in random(few, base))


def test_a_small_space_is_used_up(tmp_path):
    sweep = sweep_of(tmp_path, search="random", trials=50, space={"local.epochs": [1, 2, 3]})
    found = [point.settings["local.epochs"] for point in random(sweep, base_values(sweep))]
    assert sorted(found) == [1, 2, 3]


def play(sweep, goodness, rounds=4):
    """Optuna's search with known results."""
    base, told = base_values(sweep), []
    while points := proposals(sweep, base, told):
        told += [Told(point, goodness(point), True, rounds) for point in points]
    return told


def near(point) -> float:
    """Best at a learning rate of 0.05."""
    return -abs(math.log(point.settings["local.learning_rate"] / 0.05))


def test_optuna_repeats_itself_stays_inside_and_stops_at_the_number_of_trials(tmp_path):
    sweep = sweep_of(tmp_path, search="optuna", trials=11, batch=4, space=MIXED)
    told = play(sweep, near)
    assert told == play(sweep, near)
    assert len(told) == 11 == len({identity(one.point) for one in told})
    assert all(inside(one.point) for one in told)


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_the_order_of_fields_means_nothing(tmp_path, method):
    sweep = sweep_of(tmp_path, search=method, trials=14, batch=7, space=MIXED)  # with Optuna, it learns from ten on
    other = dataclasses.replace(sweep, space=dict(reversed(sweep.space.items())))
    base = base_values(sweep)
    if method == "random":
        assert random(sweep, base) == random(other, base)
        assert list(random(other, base)[0].settings) == list(other.space)
    else:
        assert play(sweep, near) == play(other, near)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_optuna_learns_from_what_it_is_told(tmp_path, direction):
    space = {"local.learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    sweep = sweep_of(tmp_path, search="optuna", trials=48, space=space, rank={"direction": direction})
    sign = 1 if direction == "max" else -1
    distances = [abs(near(one.point)) for one in play(sweep, lambda point: sign * near(point))]
    assert sum(distances[-16:]) < 0.5 * sum(distances[:16])


def test_trials_without_a_value_are_told_too(tmp_path):
    sweep = sweep_of(tmp_path, search="optuna", trials=6, batch=3, space=MIXED)
    base = base_values(sweep)
    first = proposals(sweep, base, [])
    told = [Told(first[0], None, False, 1), Told(first[1], 0.5, False, 2), Told(first[2], 0.7, True, 4)]
    assert len(proposals(sweep, base, told)) == 3


def test_each_variant_has_its_own_number_of_trials(tmp_path):
    variants = [{"name": "a"}, {"name": "b", "settings": {"algorithm": "fedmut"}}]
    sweep = sweep_of(
        tmp_path, search="optuna", trials=3, batch=2, variants=variants, space={"local.epochs": [1, 2, 3, 4]}
    )
    told = play(sweep, lambda point: 0.0)
    assert [sum(one.point.variant == name for one in told) for name in "ab"] == [3, 3]


def test_the_ends_of_what_optuna_may_propose_are_checked(tmp_path):
    sweep = sweep_of(tmp_path, search="optuna", trials=3, space={**MIXED, "local.momentum": {"low": 0.0, "high": 1.5}})
    with pytest.raises(ConfigurationError, match=r"local.momentum = 1.5.*less than 1"):
        check_space(sweep, base_values(sweep))
