"""Sweep files are strict, and every trial is checked before any compute."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import sweep_of, write_sweep

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweep import search, space
from fedjax_qp.sweep.run import planned
from fedjax_qp.sweep.space import Choices, Range, base_values, from_dict, listed, to_dict

REPOSITORY = Path(__file__).resolve().parents[2]


def points_of(sweep):
    return {"grid": search.grid, "random": search.random}[sweep.search](sweep, base_values(sweep))


def test_a_grid_is_every_point_of_every_variant(tmp_path):
    sweep = sweep_of(
        tmp_path,
        space={"local.learning_rate": [0.1, 0.2]},
        variants=[
            {"name": "plain"},
            {"name": "mutated", "settings": {"algorithm": "fedmut"}, "space": {"algorithm.alpha": [1, 2, 4]}},
        ],
    )
    points = points_of(sweep)
    assert [point.variant for point in points] == ["plain"] * 2 + ["mutated"] * 6
    assert [point.settings["algorithm.alpha"] for point in points[2:]] == [1, 2, 4] * 2  # its own field varies fastest
    config = search.configure(base_values(sweep), points[-1].settings, name="x", folder="y", seed=7)
    assert (config.algorithm.name, config.algorithm.options["alpha"]) == ("fedmut", 4)
    assert (config.local.learning_rate, config.seed, config.name, config.folder) == (0.2, 7, "x", "y")


def test_the_same_value_in_two_spellings_is_one_trial(tmp_path):
    points = points_of(sweep_of(tmp_path, space={"local.learning_rate": ["1e-3", 0.001, 1]}))
    assert [point.settings["local.learning_rate"] for point in points] == [0.001, 1.0]


def test_options_stay_when_the_part_is_named_after_them(tmp_path):
    sweep = sweep_of(tmp_path, overrides=["algorithm.alpha=3", "algorithm=fedmut"])
    assert base_values(sweep)["algorithm"] == {"name": "fedmut", "alpha": 3}


def test_overrides_reach_the_sweep_or_its_base(tmp_path):
    file = write_sweep(tmp_path, search="random", trials=3, overrides={"rounds": 9})
    overrides = ["trials=5", "rank.last=2", "local.epochs=3", "space.algorithm.weighting=[size, uniform]"]
    sweep = space.load(file, overrides)
    assert (sweep.trials, sweep.rank.last, base_values(sweep)["rounds"]) == (5, 2, 9)
    assert sweep.overrides == {"rounds": 9, "local.epochs": 3}
    assert sweep.space == {"algorithm.weighting": Choices(("size", "uniform"))}


def test_round_trip(tmp_path):
    sweep = sweep_of(
        tmp_path,
        space={
            "rounds": {"low": 1, "high": 9, "step": 2},
            "participation.dropout": {"low": 0, "high": 0.5, "points": 3},
        },
        variants=[{"name": "a", "space": {"local.learning_rate": {"low": 0.1, "high": 1, "log": True, "points": 3}}}],
        early_stopping={"after": 2},
    )
    assert from_dict(to_dict(sweep)) == sweep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serch": "grid"}, "unknown setting 'serch'.*did you mean search"),
        ({"rank": {"metrik": "x"}}, "rank.metrik.*rank.metric"),
        ({"early_stopping": {"afer": 2}}, "early_stopping.afer.*early_stopping.after"),
        ({"variants": [{"nam": "a"}]}, "variants.0.nam.*variants.0.name"),
        ({"space": {"rounds": {"lo": 1, "high": 2}}}, "space.rounds.lo.*space.rounds.low"),
        ({"space": {"rounds": 3}}, "space.rounds = 3 needs a list"),
        ({"space": {"rounds": []}}, "space.rounds has no values"),
        ({"space": {"rounds": {"low": 3, "high": 3}}}, "low = 3 must be less than high = 3"),
        ({"space": {"rounds": {"low": 0, "high": 3, "log": True}}}, "low = 0 with log"),
        ({"space": {"rounds": {"low": 1, "high": 3}}}, "a grid needs the number of points"),
        ({"space": {"seed": [1, 2]}}, "use `seeds`"),
        ({"overrides": {"folder": "x"}}, "keeps its runs in its own"),
        ({"search": "random"}, "needs the number of trials"),
        ({"trials": 3}, "tries every point"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"seeds": []}, "seeds"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "a name of its own"),
        ({"variants": [{"name": "a", "settings": {"rounds": 3}, "space": {"rounds": [1]}}]}, "both sets and searches"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        sweep_of(tmp_path, **settings)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("local.learnig_rate", [0.1], "did you mean local.learning_rate"),
        ("algorithm.alpa", [1], "unknown option of algorithm 'fedavg' 'alpa'"),
        ("local.learning_rate", [0.1, -1], r"greater than 0.*in the trial with local.learning_rate=-1"),
        ("algorithm", ["fedavg", "fedmutt"], "did you mean fedmut"),
    ],
)
def test_every_trial_of_a_grid_is_checked(tmp_path, field, values, message):
    with pytest.raises(ConfigurationError, match=message):
        points_of(sweep_of(tmp_path, space={field: values}))


def test_a_hyper_parameter_that_its_algorithm_refuses_is_found(tmp_path):
    """Types are right here; only building the algorithm shows that this margin cannot work."""
    sweep = sweep_of(tmp_path, overrides={"algorithm": "fedqp"}, space={"algorithm.margin": [0.0, 1.5]})
    with pytest.raises(ConfigurationError, match="margin = 1.5"):
        points_of(sweep)


def test_an_unknown_key_on_the_command_line_names_the_nearest(tmp_path):
    with pytest.raises(ConfigurationError, match="did you mean workers"):
        space.load(write_sweep(tmp_path), ["worker=2"])


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs").glob("sweep_*.yaml")), ids=lambda file: file.stem)
def test_every_sweep_file_is_valid_and_opens_with_its_command(file):
    sweep = space.load(file)
    assert planned(sweep, base_values(sweep)) or sweep.search == "optuna"
    head = file.read_text().split("\nname:")[0]
    assert f"fedjax-qp sweep configs/{file.name}" in head
    assert "# Time: " in head and "# Expect: " in head


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e3), st.booleans(), st.integers(2, 9))
def test_points_of_a_range_are_even_and_include_its_ends(low, ratio, log, points):
    values = listed(Range(low, low * ratio, log=log, points=points))
    assert values is not None and len(values) == points
    assert values[0] == pytest.approx(low) and values[-1] == pytest.approx(low * ratio)
    gaps = [b / a if log else b - a for a, b in zip(values[:-1], values[1:], strict=True)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3)


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 7))
def test_steps_of_whole_numbers(low, span, step):
    if step <= span:
        assert listed(Range(low, low + span, step=step)) == list(range(low, low + span + 1, step))


def test_steps_without_rounding_errors():
    assert listed(Range(0.1, 0.5, step=0.1)) == [0.1, 0.2, 0.3, 0.4, 0.5]
