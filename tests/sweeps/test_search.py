"""Optuna's proposals: within the space, different, and the same every time."""

import dataclasses
import math

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial
from support.sweeps import points_of, sweep_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.search import identity, planned, proposals, searched_variants

MIXED = {
    "local.learning_rate": {"low": 0.001, "high": 1.0, "log": True},
    "local.momentum": {"low": 0.0, "high": 0.9},
    "local.epochs": {"low": 1, "high": 5},
    "algorithm.weighting": ["size", "uniform"],
}


def inside(values) -> bool:
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
    assert len(points_of(few)) == trials and points_of(many)[:trials] == points_of(few)
    assert all(inside(point.settings) for point in points_of(few))


def test_a_small_space_is_used_up(tmp_path):
    sweep = sweep_of(tmp_path, search="random", trials=50, space={"local.epochs": [1, 2, 3]})
    assert sorted(point.settings["local.epochs"] for point in points_of(sweep)) == [1, 2, 3]


@pytest.mark.parametrize("search", ["grid", "random"])
def test_fields_that_go_together_are_one_dimension(tmp_path, search):
    pairs = [[1, 0.0], [2, 0.25]]
    sweep = sweep_of(
        tmp_path,
        search=search,
        trials=None if search == "grid" else 20,
        overrides={"algorithm": "fedqp"},
        space={"algorithm.alpha, algorithm.margin": pairs, "local.epochs": [1, 2]},
    )
    found = [tuple(point.settings.values()) for point in points_of(sweep)]
    assert sorted(found) == [(1, 0, 1), (1, 0, 2), (2, 0.25, 1), (2, 0.25, 2)]
    assert points_of(sweep)[0].settings.keys() == {"algorithm.alpha", "algorithm.margin", "local.epochs"}


def told(point, value: float | None, state: TrialState = TrialState.COMPLETE):
    """A trial as a study knows it."""
    return create_trial(
        state=state,
        value=value,
        params=dict(point.params),
        distributions=dict(point.distributions),
        user_attrs={"settings": point.settings},
    )


def play(sweep, goodness):
    """The search of the first variant with known results; returns the settings in their order."""
    variant, trials = searched_variants(sweep)[0], []
    while points := proposals(sweep, variant, trials)[
        len(trials) % sweep.batch :
    ]:  # without those of the present batch
        trials += [told(point, goodness(point.settings)) for point in points]
    return [trial.user_attrs["settings"] for trial in trials]


def near(values) -> float:
    """Best at a learning rate of 0.05."""
    return -abs(math.log(values["local.learning_rate"] / 0.05))


def test_tpe_repeats_itself_stays_inside_and_stops_at_the_number_of_trials(tmp_path):
    sweep = sweep_of(tmp_path, search="tpe", trials=11, batch=4, space=MIXED)
    tried = play(sweep, near)
    assert tried == play(sweep, near)
    assert len(tried) == 11 == len({identity(one) for one in tried})
    assert all(inside(one) for one in tried)


def test_a_batch_that_a_kill_cut_off_is_proposed_again(tmp_path):
    sweep = sweep_of(tmp_path, search="tpe", trials=12, batch=4, space=MIXED)
    variant = searched_variants(sweep)[0]
    first = proposals(sweep, variant, [])
    ended = [told(point, near(point.settings)) for point in first]
    second = proposals(sweep, variant, ended)
    running = [told(point, None, TrialState.RUNNING) for point in second]
    for cut in range(4):
        assert proposals(sweep, variant, [*ended, *running[:cut]]) == second
    assert proposals(sweep, variant, [*ended, *running]) == []  # they are to run first


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_the_order_of_fields_means_nothing(tmp_path, method):
    sweep = sweep_of(tmp_path, search=method, trials=14, batch=7, space=MIXED)  # it learns from ten on
    other = dataclasses.replace(sweep, space=dict(reversed(sweep.space.items())))
    tried = [
        play(one, near) if method == "tpe" else [point.settings for point in points_of(one)] for one in (sweep, other)
    ]
    assert tried[0] == tried[1] and len(tried[0]) == 14
    assert list(tried[1][0]) == list(other.space)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_tpe_learns_from_what_it_is_told(tmp_path, direction):
    space = {"local.learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    sweep = sweep_of(tmp_path, search="tpe", trials=48, space=space, rank={"direction": direction})
    sign = 1 if direction == "max" else -1
    distances = [abs(near(values)) for values in play(sweep, lambda values: sign * near(values))]
    assert sum(distances[-16:]) < 0.5 * sum(distances[:16])


def test_trials_without_a_value_are_told_too(tmp_path):
    sweep = sweep_of(tmp_path, search="tpe", trials=6, batch=3, space=MIXED)
    variant = searched_variants(sweep)[0]
    first = proposals(sweep, variant, [])
    ends = [(None, TrialState.FAIL), (None, TrialState.PRUNED), (0.7, TrialState.COMPLETE)]
    trials = [told(point, *end) for point, end in zip(first, ends, strict=True)]
    assert len(proposals(sweep, variant, trials)) == 3


def test_the_ends_of_what_tpe_may_propose_are_checked(tmp_path):
    sweep = sweep_of(tmp_path, search="tpe", trials=3, space={**MIXED, "local.momentum": {"low": 0.0, "high": 1.5}})
    with pytest.raises(ConfigurationError, match=r"local.momentum = 1.5.*less than 1"):
        planned(sweep)


def test_optuna_knows_the_values_of_a_grid(tmp_path):
    """What is no number or text for Optuna is written as JSON."""
    space = {"partition": ["natural", {"name": "iid", "clients": 5}], "local.learning_rate": [0.1, 0.2]}
    points = points_of(sweep_of(tmp_path, space=space))
    assert {(point.params["local.learning_rate"], point.params["partition"]) for point in points} == {
        (rate, name) for rate in (0.1, 0.2) for name in ("natural", '{"clients": 5, "name": "iid"}')
    }
    study = optuna.create_study()
    study.add_trials([told(point, 1.0) for point in points])
    assert len(study.trials) == 4
