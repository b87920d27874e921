"""Sweep files are strict, and every trial is checked before any compute."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sweeps import points_of, sweep_of, write_sweep

from fedjax_qp import config
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps import search, space
from fedjax_qp.sweeps.space import Range, listed

REPOSITORY = Path(__file__).resolve().parents[2]


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
    assert ["algorithm" in point.settings for point in points] == [False] * 2 + [True] * 6
    assert [point.settings["algorithm.alpha"] for point in points[2:]] == [1, 2, 4] * 2  # its own field varies fastest
    config = search.configure(sweep.base, points[-1].settings, name="x", folder="y", seed=7)
    assert (config.algorithm.name, config.algorithm.options["alpha"]) == ("fedmut", 4)
    assert (config.local.learning_rate, config.seed, config.name, config.folder) == (0.2, 7, "x", "y")


def test_the_same_value_in_two_spellings_is_one_trial(tmp_path):
    points = points_of(sweep_of(tmp_path, space={"local.learning_rate": ["1e-3", 0.001, 1]}))
    assert [point.settings["local.learning_rate"] for point in points] == [0.001, 1.0]


def test_options_stay_when_the_part_is_named_after_them(tmp_path):
    sweep = sweep_of(tmp_path, overrides={"algorithm.alpha": 3, "algorithm": "fedmut"})
    assert sweep.base["algorithm"] == {"name": "fedmut", "alpha": 3}


def test_overrides_reach_the_sweep_or_its_base(tmp_path):
    file = write_sweep(tmp_path, search="random", trials=3, overrides={"rounds": 9})
    overrides = ["trials=5", "rank.last=2", "local.epochs=3", "space.algorithm.weighting=[size, uniform]"]
    sweep = space.load(file, overrides)
    assert (sweep.trials, sweep.rank.last, sweep.base["rounds"]) == (5, 2, 9)
    assert sweep.base["local"]["epochs"] == 3
    assert sweep.space == {"algorithm.weighting": ("size", "uniform")}


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
        ({"variants": 5}, "variants = 5 must be a list"),
        ({"variants": {"name": "a"}}, "must be a list"),
        ({"variants": [None]}, "variants.0 = None must be a mapping"),
        ({"variants": [{"name": "a/b"}]}, "variants.0.name = 'a/b' must be one name"),
        ({"name": ""}, "name = '' must be a name"),
        ({"name": "../../x"}, "name = '../../x' must be one name"),
        ({"rank": {"metric": ""}}, "rank.metric = ''"),
        ({"seeds": [True]}, "seeds.0 = True must be a number"),
        ({"workers": 10**9}, "workers = 1000000000 must be less than"),
        ({"search": "random", "trials": 10**9}, "trials = 1000000000 must be less than or equal to 10000"),
        ({"overrides": 5}, "overrides = 5 must be a mapping"),
        ({"space": {"rounds": {"low": 1, "high": 9, "points": 10**9}}}, "points = 1000000000 must be less than"),
        ({"space": {"local.momentum": {"low": 0, "high": float("inf")}}}, "high = inf"),
        ({"space": {"local.momentum": {"low": False, "high": True}}}, "low = False must be a number"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "a name of its own"),
        ({"variants": [{"name": "a", "settings": {"rounds": 3}, "space": {"rounds": [1]}}]}, "both sets and searches"),
        ({"space": {"rounds, local.epochs": [[1, 2], [3]]}}, r"\[3\] must be a list of 2 values"),
        ({"space": {"rounds, local.epochs": {"low": 1, "high": 2}}}, "needs a list of values"),
        ({"space": {"rounds, local.epochs": [[1, 2]], "rounds": [1]}}, "rounds, or does so twice"),
        ({"variants": [{"name": "comparison"}]}, "which is not 'comparison'"),
        ({"variants": [{"name": "a", "like": "b"}]}, "unknown variant .like. 'b'"),
        ({"variants": [{"name": "a"}, {"name": "b", "like": "a"}]}, "needs `compare`"),
        ({"compare": {"seeds": [1]}}, "compare needs two or more variants"),
    ],
)
def test_bad_sweeps_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        sweep_of(tmp_path, **settings)


PAIR = [{"name": "a", "space": {"local.epochs": [1, 2]}}, {"name": "b", "space": {"local.epochs": [1, 2, 3]}}]


@pytest.mark.parametrize(
    ("variants", "compare", "message"),
    [
        (PAIR, {"seeds": [1]}, "as many settings for each variant.*here a has 2, b has 3"),
        ([PAIR[0], {"name": "c"}], {"seeds": [0, 1]}, "0 already chooses the settings"),
        ([PAIR[0], {"name": "c"}], {"seeds": [1, 1]}, "names a seed twice"),
        ([PAIR[0], {"name": "c"}], {"seeds": [1], "baseline": "d"}, "unknown variant .compare.baseline. 'd'"),
        ([PAIR[0], {"name": "c"}], {"seeds": [1], "rounds": 0}, "compare.rounds = 0"),
        ([PAIR[0], {"name": "c", "settings": {"local.momentum": 2}}], {"seeds": [1]}, "local.momentum = 2"),
        ([PAIR[0], {"name": "c", "like": "a", "settings": {"local.epoch": 2}}], {"seeds": [1]}, "local.epochs"),
    ],
)
def test_bad_comparisons_are_refused_before_any_compute(tmp_path, variants, compare, message):
    with pytest.raises(ConfigurationError, match=message):
        points_of(sweep_of(tmp_path, variants=variants, compare=compare))


def test_variants_may_stand_in_another_file(tmp_path):
    (tmp_path / "tuned.yaml").write_text("variants: [{name: a, settings: {local.epochs: 3}}, {name: b}]")
    file = write_sweep(tmp_path, variants="tuned.yaml")  # beside it
    for sweep in (space.load(file), space.load(write_sweep(tmp_path), [f"variants={tmp_path / 'tuned.yaml'}"])):
        assert [(one.name, one.settings) for one in sweep.variants] == [("a", {"local.epochs": 3}), ("b", {})]
    with pytest.raises(ConfigurationError, match="unknown configuration file"):
        space.load(write_sweep(tmp_path, variants="other.yaml"))


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


@pytest.mark.parametrize("high", [2, 1.5])
def test_the_points_of_a_grid_are_counted_in_the_kind_of_their_fields(tmp_path, high):
    """Between the whole numbers 1 and 2 there are no others, but these fields take any number."""
    fields = ("algorithm.proximal", "local.learning_rate", "local.weight_decay")
    space = {field: {"low": 1, "high": high, "points": 10_000} for field in fields}
    with pytest.raises(ConfigurationError, match="the grid has 1000000000000 trials, more than 10000"):
        points_of(sweep_of(tmp_path, overrides={"algorithm": "fedprox"}, space=space))


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
    assert points_of(sweep)
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


@pytest.mark.parametrize(
    ("field", "interval", "values"),
    [
        ("algorithm.proximal", {"low": 0, "high": 1, "points": 5}, [0, 0.25, 0.5, 0.75, 1]),
        ("algorithm.proximal", {"low": 0, "high": 1.0, "points": 3}, [0, 0.5, 1]),
        ("algorithm.proximal", {"low": 1, "high": 100, "log": True, "points": 3}, [1, 10, 100]),
        ("local.clip_norm", {"low": 1, "high": 2, "points": 3}, [1, 1.5, 2]),  # a float or null
        ("local.epochs", {"low": 1, "high": 4, "points": 4}, [1, 2, 3, 4]),
        ("partition.clients", {"low": 10, "high": 1000, "log": True, "points": 3}, [10, 100, 1000]),
        ("engine.lanes", {"low": 1, "high": 4, "points": 2}, [1, 4]),  # a whole number or auto
    ],
)
def test_a_range_takes_the_kind_of_its_field(tmp_path, field, interval, values):
    """However YAML spells its numbers."""
    sweep = sweep_of(tmp_path, {"partition": "iid"}, overrides={"algorithm": "fedprox"}, space={field: interval})
    found = [point.settings[field] for point in points_of(sweep)]
    assert found == values
    whole = field in ("local.epochs", "partition.clients", "engine.lanes")
    assert all(type(value) is (int if whole else float) for value in found)


def three(low: int, high: int) -> dict[str, int]:
    return {"low": low, "high": high, "points": 3}


def test_the_kind_comes_from_the_variant_s_own_part(tmp_path):
    sweep = sweep_of(
        tmp_path,
        variants=[
            {"name": "a", "settings": {"algorithm": "fedprox"}, "space": {"algorithm.proximal": three(0, 1)}},
            {"name": "b", "space": {"algorithm": ["ditto"], "algorithm.proximal": three(1, 2)}},
        ],
    )  # fmt: skip
    assert [point.settings["algorithm.proximal"] for point in points_of(sweep)] == [0, 0.5, 1, 1, 1.5, 2]


def test_random_draws_between_whole_ends_are_floats_for_a_float_field(tmp_path):
    sweep = sweep_of(
        tmp_path, search="random", trials=20, overrides={"algorithm": "fedprox"},
        space={"algorithm.proximal": {"low": 0, "high": 1}},
    )  # fmt: skip
    found = [point.settings["algorithm.proximal"] for point in points_of(sweep)]
    assert len(set(found)) == 20 and all(0 <= value <= 1 for value in found)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        ({"low": 1, "high": 3, "points": 5}, "points = 5 from 1 to 3 are only 3 different whole numbers: choose points = 3"),
        ({"low": 0.5, "high": 3, "points": 2}, "low = 0.5 must be a whole number, as local.epochs is one"),
    ],
)  # fmt: skip
def test_a_range_that_does_not_suit_whole_numbers_is_refused(tmp_path, interval, message):
    with pytest.raises(ConfigurationError, match=message):
        points_of(sweep_of(tmp_path, space={"local.epochs": interval}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("participation.cohort", 99, "cohort = 99 is more than the 12 clients"),
        ("engine.lanes", 7, "engine.lanes = 7 is more than the 4 clients"),
        ("model", "char_lstm", "model = 'char_lstm' does not fit data = 'digits'"),
        ("evaluation.stop_at_target", True, "there is no target"),
        ("algorithm", "fedit", "tunes the LoRA adapters"),
    ],
)
def test_what_a_run_would_refuse_before_its_data_a_sweep_refuses_beforehand(tmp_path, field, value, message):
    with pytest.raises(ConfigurationError, match=message):
        points_of(sweep_of(tmp_path, space={field: [value]}))


def test_runs_and_sweeps_mean_the_same_by_the_same_overrides(tmp_path):
    overrides = ["algorithm.alpha=2", "local.momentum=0.5", "algorithm=fedmut", "local={epochs: 3}"]
    file = write_sweep(tmp_path)
    of_run = config.load(tmp_path / "base.yaml", overrides)
    for order in (overrides, overrides[::-1]):
        assert config.from_dict(space.load(file, order).base) == of_run
    with pytest.raises(ConfigurationError, match="given twice"):
        space.load(file, ["rounds=1", "overrides.rounds=2"])


def test_the_command_line_replaces_the_file_s_overrides(tmp_path):
    file = write_sweep(
        tmp_path, overrides={"algorithm": "fedqp", "algorithm.form": "box", "rounds": 9, "local.epochs": 4}
    )
    base = space.load(file, ["algorithm=fedavg", "rounds=3", "local={momentum: 0}"]).base
    assert (base["algorithm"], base["rounds"], base["local"]["epochs"]) == ({"name": "fedavg"}, 3, 5)
    assert space.load(file).base["algorithm"] == {"name": "fedqp", "form": "box"}


@pytest.mark.parametrize("overrides", [{"algorithm": "fedmut"}, {"algorithm.name": "fedmut"}])
def test_the_same_name_keeps_the_options_of_the_base_in_every_form(tmp_path, overrides):
    base = {"algorithm": {"name": "fedmut", "alpha": 2}}
    assert sweep_of(tmp_path, base, overrides=overrides).base["algorithm"] == base["algorithm"]
    by_hand = space.load(write_sweep(tmp_path, base), ["algorithm=fedmut"])
    assert by_hand.base["algorithm"] == base["algorithm"]


@pytest.mark.parametrize(
    ("of_file", "given", "part", "expected"),
    [
        ({"algorithm": "fedmut", "algorithm.beta0": 0.3}, "algorithm=fedmut", "algorithm", ("fedmut", 0.3, 2)),
        ({"algorithm.name": "fedmut", "algorithm.beta0": 0.3}, "algorithm=fedmut", "algorithm", ("fedmut", 0.3, 2)),
        ({"algorithm": {"name": "fedmut", "beta0": 0.3}}, "algorithm=fedmut", "algorithm", ("fedmut", 0.3, None)),
        ({"algorithm.beta0": 0.3}, "algorithm=fedmut", "algorithm", ("fedmut", 0.3, 2)),  # the name is the base's
        ({"algorithm.beta0": 0.3}, "algorithm.name=fedmut", "algorithm", ("fedmut", 0.3, 2)),
        ({"algorithm": {"name": "fedmut", "alpha": 3}}, "algorithm.alpha=5", "algorithm", ("fedmut", None, 5)),
        ({"algorithm": {"name": "fedmut", "alpha": 3}}, "algorithm=fedavg", "algorithm", ("fedavg", None, None)),
        ({"algorithm.alpha": 3}, "algorithm=fedavg", "algorithm", ("fedavg", None, None)),
        ({"local": {"epochs": 3}}, "local.epochs=5", "local", (5, 0.9)),
        ({"local": {"epochs": 3}}, "local.momentum=0", "local", (3, 0)),
        ({"local": {"epochs": 3}}, "local={momentum: 0}", "local", (5, 0)),
        ({"local.epochs": 3}, "local.epochs=4", "local", (4, 0.5)),
        ({"local": {"epochs": 3}}, "rounds=1", "local", (3, 0.9)),  # a whole group leaves defaults for the rest
    ],
)
def test_the_command_line_wins_over_the_file(tmp_path, of_file, given, part, expected):
    base = {"algorithm": {"name": "fedmut", "alpha": 2}, "local": {"epochs": 1, "momentum": 0.5}}
    found = space.load(write_sweep(tmp_path, base, overrides=of_file), [given]).base[part]
    names = ("name", "beta0", "alpha") if part == "algorithm" else ("epochs", "momentum")
    assert tuple(found.get(name) for name in names) == expected


def test_paths_of_a_sweep_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_sweep(tmp_path / "x", config="~/x/base.yaml")
    with pytest.raises(ConfigurationError, match="folder = '' must be a path"):
        space.load(file, ["folder=''"])
    sweep = space.load(file, ["folder=~/sweeps"])
    assert sweep.sweep_folder == tmp_path / "sweeps" / "small"
    assert sweep.base["rounds"] == 4
