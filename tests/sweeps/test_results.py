"""Tables and figures of made sweeps."""

import json

import pandas as pd
import pytest
from rich.console import Console
from support.sweeps import opened, record_run, sweep_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps.figures import plot_curves, plot_space
from fedjax_qp.sweeps.live import LiveTable
from fedjax_qp.sweeps.results import check_metric, summarise, table, write_results
from fedjax_qp.sweeps.stopping import Curves
from fedjax_qp.sweeps.trials import Store

VARIANTS = [
    {"name": "plain", "space": {"local.learning_rate": [0.1, 0.2]}},
    {"name": "mutated", "settings": {"algorithm": "fedmut"}, "space": {"algorithm.alpha": [1, 2]}},
]


@pytest.fixture
def store(tmp_path) -> Store:
    """plain 0.1: accuracy 0.5, 0.7 by seed; plain 0.2 stopped; mutated 1: 0.8, 0.8; mutated 2: one seed diverged."""
    store = opened(sweep_of(tmp_path, seeds=[0, 1], variants=VARIANTS, rank={"last": 2}))
    values = {
        0: ([0.1, 0.4, 0.6], [0.1, 0.6, 0.8], "complete", "complete"),
        1: ([0.9, 0.9], [0.9, 0.9], "stopped", "stopped"),
        2: ([0.1, 0.8, 0.8], [0.1, 0.8, 0.8], "complete", "complete"),
        3: ([0.1, 0.8, 0.8], [0.1], "complete", "diverged"),
    }
    for number, (first, second, *status) in values.items():
        for seed, accuracies in enumerate((first, second)):
            record_run(store, store.trials[number], seed, accuracies, status[seed])
    return store


def test_trials_in_order(store):
    rows = summarise(store, Curves("test_accuracy"))
    assert [(row.trial.number, row.status) for row in rows] == [
        (2, "complete"),
        (0, "complete"),
        (1, "stopped"),
        (3, "diverged"),
    ]
    assert rows[1].label == "plain learning_rate=0.1"
    value = rows[1].value
    assert value is not None and (value.mean, value.std) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert rows[3].value is None and rows[3].reasons == ("it diverged",)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_a_metric_that_is_not_finite_is_the_worst(tmp_path, direction):
    """Its seed would otherwise be left out, and the trial judged by the others."""
    settings = {
        "seeds": [0, 1],
        "variants": VARIANTS[:1],
        "rank": {"metric": "test_loss", "direction": direction, "last": 1},
    }
    store = opened(sweep_of(tmp_path, **settings))
    for trial, losses in zip(store.trials, ([1.0, None], [2.0, 3.0]), strict=True):
        for seed, loss in enumerate(losses):
            folder = record_run(store, trial, seed, [0.5])
            RunFolder(folder).records_file.write_text(
                json.dumps({"round": 1, "test_loss": loss, "test_accuracy": 0.5}) + "\n"
            )
    better, worse = summarise(store, Curves("test_loss"))
    assert better.trial.number == 1 and better.value is not None and better.value.mean == 2.5
    assert worse.value is None and worse.reasons == ("test_loss is not finite",)
    write_results(store, [better, worse])
    assert "trial 0: test_loss is not finite" in (store.folder / "summary.md").read_text()


def test_the_tidy_table_has_a_row_for_each_evaluation(store):
    rows = summarise(store, Curves("test_accuracy"))
    write_results(store, rows)
    found = pd.read_parquet(store.folder / "results.parquet")
    assert len(found) == 3 + 3 + 2 + 2 + 3 + 3 + 3 + 1
    one = found[(found["trial"] == 0) & (found["seed"] == 1)]
    assert one["test_accuracy"].tolist() == [0.1, 0.6, 0.8] and one["round"].tolist() == [1, 2, 3]
    assert set(one["local.learning_rate"]) == {0.1} and set(one["variant"]) == {"plain"}
    assert one["algorithm.alpha"].isna().all()
    assert set(found[found["variant"] == "mutated"]["algorithm.alpha"]) == {1, 2}
    assert len(pd.read_csv(store.folder / "results.csv")) == len(found)
    summary = pd.read_csv(store.folder / "summary.csv")
    assert summary["trial"].tolist() == [2, 0, 1, 3] and summary["mean"][1] == pytest.approx(0.6)
    text = (store.folder / "summary.md").read_text()
    assert "| 0 | plain learning_rate=0.1 | complete | 3 | 60.00 ± 14.14 |" in text
    assert "trial 3: it diverged" in text


@pytest.mark.parametrize("name", ["results.parquet", "results.csv", "summary.csv", "summary.md"])
def test_results_that_cannot_be_written_are_one_line(store, name):
    (store.folder / name).mkdir()
    with pytest.raises(ConfigurationError, match=f"{name} cannot be written"):
        write_results(store, summarise(store, Curves("test_accuracy")))


def test_settings_of_several_types_fit_into_parquet(tmp_path):
    dealt = {"name": "iid", "clients": 5}
    space = {"engine.lanes": ["auto", 2], "model.hidden": [[8], [8, 8]], "partition": [dealt, "natural"]}
    sweep = sweep_of(tmp_path, space=space)
    with opened(sweep) as store:
        for trial in store.trials:
            record_run(store, trial, 0, [0.5])
        write_results(store, summarise(store, Curves("test_accuracy")))
        found = pd.read_parquet(store.folder / "results.parquet")
    assert set(found["engine.lanes"]) == {"auto", "2"} and set(found["model.hidden"]) == {"[8]", "[8, 8]"}
    assert set(found["partition"]) == {'{"clients": 5, "name": "iid"}', "natural"}


def test_a_metric_that_nobody_records_is_named_with_the_nearest(tmp_path):
    with opened(sweep_of(tmp_path, rank={"metric": "test_acuracy"})) as store:
        assert check_metric(store) is False  # nothing has ended yet
        record_run(store, store.trials[0], 0, [0.5])
        with pytest.raises(ConfigurationError, match="test_acuracy.*did you mean test_accuracy"):
            check_metric(store)


def panels(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_curves_show_every_variant(store, tmp_path):
    curves = Curves("test_accuracy")
    figure = plot_curves(store, summarise(store, curves), curves, tmp_path / "curves.png")
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.get_lines()] == [
        "mutated alpha=1 (trial 2)",
        "plain learning_rate=0.1 (trial 0)",
        "plain learning_rate=0.2 (trial 1)",
    ]
    assert list(axes.get_lines()[1].get_ydata()) == pytest.approx([10, 50, 70])  # per cent
    band = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert max(band) == pytest.approx(70 + 100 * 0.02**0.5)
    assert axes.get_ylabel() == "test_accuracy (%)"


@pytest.mark.parametrize(
    ("space", "images", "lines"),
    [
        ({"local.epochs": [1, 2, 3]}, 0, 1),
        ({"local.epochs": [1, 2, 3], "algorithm.weighting": ["size", "uniform"]}, 1, 0),
        ({"local.epochs": [1, 2], "local.momentum": [0, 0.5], "algorithm.weighting": ["size", "uniform"]}, 0, 8 + 3),
    ],
)
def test_one_field_two_fields_more_fields(tmp_path, space, images, lines):
    with opened(sweep_of(tmp_path, space=space)) as store:
        for trial in store.trials:
            record_run(store, trial, 0, [0.1 * trial.number])
        rows = summarise(store, Curves("test_accuracy"))
        figure = plot_space(store.sweep, rows, tmp_path / "space.png")
    assert figure is not None and (tmp_path / "space.png").stat().st_size > 0
    axes = figure.axes[0]
    assert (len(axes.images), len(axes.get_lines()) if lines != 1 else len(axes.containers)) == (images, lines)


def test_a_heat_map_holds_the_values_in_place(tmp_path):
    space = {"local.epochs": [2, 1], "local.momentum": [0.0, 0.5]}
    with opened(sweep_of(tmp_path, space=space)) as store:
        for trial in store.trials:
            settings = trial.point.settings
            record_run(store, trial, 0, [0.1 * settings["local.epochs"] + settings["local.momentum"]])
        figure = plot_space(store.sweep, summarise(store, Curves("test_accuracy")), tmp_path / "space.png")
    assert figure is not None
    assert figure.axes[0].images[0].get_array().tolist() == [[pytest.approx(10), pytest.approx(20)], [60, 70]]


def test_random_points_in_two_dimensions_are_drawn_as_points(tmp_path):
    space = {
        "local.learning_rate": {"low": 0.01, "high": 1.0, "log": True},
        "local.momentum": {"low": 0.0, "high": 0.9},
    }
    with opened(sweep_of(tmp_path, search="random", trials=20, space=space)) as store:
        for trial in store.trials:
            record_run(store, trial, 0, [0.01 * trial.number])
        figure = plot_space(store.sweep, summarise(store, Curves("test_accuracy")), tmp_path / "space.png")
    assert figure is not None
    axes = figure.axes[0]
    assert len(axes.collections[0].get_offsets()) == 20 and axes.get_xscale() == "log" and axes.get_yscale() == "linear"


def test_nothing_varied_draws_nothing(tmp_path):
    with opened(sweep_of(tmp_path)) as store:
        record_run(store, store.trials[0], 0, [0.5])
        assert plot_space(store.sweep, summarise(store, Curves("test_accuracy")), tmp_path / "space.png") is None


def test_the_screen_without_a_terminal_names_each_trial_once(store, capsys):
    newest = store.trials[3]
    (store.run_folder(newest, 1) / "outcome.json").unlink()
    with LiveTable(store, Curves("test_accuracy"), Console(width=100)) as shown:
        shown.update()
        record_run(store, newest, 1, [0.1, 0.2, 0.4])
        shown._next = 0.0
        shown.update()
        shown._next = 0.0
        shown.update()
    said = capsys.readouterr().out
    assert said == "4 of 4 trials: 3 (mutated alpha=2) complete, test_accuracy 0.55\n"


def test_the_screen_of_a_terminal(store):
    console = Console(force_terminal=True, width=100, record=True)
    with LiveTable(store, Curves("test_accuracy"), console) as shown:
        shown.update()
    console.print(table(store.sweep, summarise(store, Curves("test_accuracy")), most=2))
    text = console.export_text()
    assert "4 of 4 trials ended, 0 running" in text and "… and 2 more" in text
