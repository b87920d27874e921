"""Tables and figures of made sweeps."""

import json

import pandas as pd
import pytest
import yaml
from rich.console import Console
from support.sweeps import opened, record_run, sweep_of, trial_with, trials_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.results import summary, table, write_comparison, write_results
from fedjax_qp.sweeps.search import Point, compared, single
from fedjax_qp.sweeps.space import COMPARISON
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
        "plain-000": ([0.1, 0.4, 0.6], [0.1, 0.6, 0.8], "finished", "finished"),
        "plain-001": ([0.9, 0.9], [0.9, 0.9], "given up", "given up"),
        "mutated-000": ([0.1, 0.8, 0.8], [0.1, 0.8, 0.8], "finished", "finished"),
        "mutated-001": ([0.1, 0.8, 0.8], [0.1], "finished", "diverged"),
    }
    for trial in trials_of(store):
        first, second, *reasons = values[trial.name]
        for seed, accuracies in enumerate((first, second)):
            folder = record_run(store, trial, seed, accuracies, reasons[seed])
            write_config(store, folder, trial, seed)
    store.settle()
    return store


def write_config(store: Store, folder, trial, seed: int) -> None:
    """What a comparison and a figure read of a run besides its records."""
    (folder / "config.yaml").write_text(yaml.safe_dump({**store.sweep.base, "name": trial.name, "seed": seed}))


def test_trials_in_order(store):
    found = summary(store)
    assert found["trial"].tolist() == ["mutated-000", "plain-000", "plain-001", "mutated-001"]
    assert found["status"].tolist() == ["complete", "complete", "stopped", "diverged"]
    rows = found.to_dict("records")
    assert rows[1]["settings"] == "learning_rate=0.1" and rows[0]["algorithm.alpha"] == 1
    assert (rows[1]["mean"], rows[1]["std"]) == (pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert all(pd.isna(row["mean"]) for row in rows[2:]) and rows[2]["reason"] == "given up"


@pytest.mark.parametrize("direction", ["max", "min"])
def test_a_metric_that_is_not_finite_is_the_worst(tmp_path, direction):
    """Its seed would otherwise be left out, and the trial judged by the others."""
    rank = {"metric": "test_loss", "direction": direction, "last": 1}
    store = opened(sweep_of(tmp_path, seeds=[0, 1], variants=VARIANTS[:1], rank=rank))
    for trial, losses in zip(trials_of(store), ([1.0, None], [2.0, 3.0]), strict=True):
        for seed, loss in enumerate(losses):
            folder = record_run(store, trial, seed, [0.5])
            write_config(store, folder, trial, seed)
            (folder / "records.jsonl").write_text(
                json.dumps({"round": 1, "test_loss": loss, "test_accuracy": 0.5}) + "\n"
            )
    store.settle()
    better, worse = summary(store).to_dict("records")
    assert (better["trial"], better["mean"], better["reason"]) == ("plain-001", 2.5, "")
    assert (worse["status"], worse["reason"]) == ("diverged", "test_loss is not finite")
    write_results(store)
    assert "plain-000: test_loss is not finite" in (store.folder / "summary.md").read_text()


def test_the_tidy_table_has_a_row_for_each_evaluation(store):
    write_results(store)
    found = pd.read_csv(store.folder / "results.csv")
    assert len(found) == 3 + 3 + 2 + 2 + 3 + 3 + 3 + 1
    rows = found.to_dict("records")
    one = [row for row in rows if row["trial"] == "plain-000" and row["seed"] == 1]
    assert [(row["round"], row["test_accuracy"]) for row in one] == [(1, 0.1), (2, 0.6), (3, 0.8)]
    assert {(row["phase"], row["variant"], row["local.learning_rate"]) for row in one} == {("runs", "plain", 0.1)}
    assert all(pd.isna(row["algorithm.alpha"]) for row in one)
    assert {row["algorithm.alpha"] for row in rows if row["variant"] == "mutated"} == {1, 2}
    trials = pd.read_csv(store.folder / "summary.csv").to_dict("records")
    assert [row["trial"] for row in trials] == summary(store)["trial"].tolist()
    assert trials[1]["mean"] == pytest.approx(0.6)
    text = (store.folder / "summary.md").read_text()
    assert "| plain-000 | learning_rate=0.1 | complete | 3 | 60.00 ± 14.14 |" in text
    assert "mutated-001: diverged" in text


@pytest.mark.parametrize("name", ["results.csv", "summary.csv", "summary.md"])
def test_results_that_cannot_be_written_are_one_line(store, name):
    (store.folder / name).mkdir()
    with pytest.raises(ConfigurationError, match=f"{name} cannot be written"):
        write_results(store)


def test_settings_of_several_types_fit_into_a_table(tmp_path):
    dealt = {"name": "iid", "clients": 5}
    space = {"engine.lanes": ["auto", 2], "model.hidden": [[8], [8, 8]], "partition": [dealt, "natural"]}
    with opened(sweep_of(tmp_path, space=space)) as store:
        for trial in trials_of(store):
            write_config(store, record_run(store, trial, 0, [0.5]), trial, 0)
        store.settle()
        write_results(store)
        found = pd.read_csv(store.folder / "results.csv")
    assert set(found["engine.lanes"]) == {"auto", "2"} and set(found["model.hidden"]) == {"[8]", "[8, 8]"}
    assert set(map(str, found["partition"])) == {'{"clients": 5, "name": "iid"}', "natural"}


def test_a_metric_that_nobody_records_is_named_with_the_nearest(tmp_path):
    with opened(sweep_of(tmp_path, rank={"metric": "test_acuracy"})) as store:
        assert store.settle() == []  # nothing has ended yet
        record_run(store, trials_of(store)[0], 0, [0.5])
        with pytest.raises(ConfigurationError, match="test_acuracy.*did you mean test_accuracy"):
            store.settle()


def test_figures_are_drawn_of_what_varies(store):
    write_results(store)
    drawn = {file.name for file in store.folder.glob("*.png") if file.stat().st_size > 1000}
    assert drawn == {"curves.png"}  # of both variants only one trial each is complete
    for trial in (trial_with(store, 0.2), trial_with(store, "fedmut", 2)):
        for seed in (0, 1):
            record_run(store, trial, seed, [0.3])
    store.close()
    with opened(store.sweep) as again:
        write_results(again)
    drawn = {file.name for file in store.folder.glob("*.png") if file.stat().st_size > 1000}
    assert drawn == {"curves.png", "space-plain.png", "space-mutated.png"}


def test_nothing_recorded_writes_nothing(tmp_path):
    with opened(sweep_of(tmp_path)) as store:
        write_results(store)
        assert not list(store.folder.glob("*.csv")) and summary(store)["status"].tolist() == ["waiting"]


def test_the_table_of_a_terminal(store):
    console = Console(force_terminal=True, width=100, record=True)
    console.print(table(store.sweep, summary(store), most=2))
    text = console.export_text()
    assert "mutated-000" in text and "80.00 ± 0.00" in text and "… and 2 more" in text


def test_a_comparison_is_paired_and_leaves_out_what_diverged(tmp_path):
    variants = [{"name": "plain"}, {"name": "mutated", "settings": {"algorithm": "fedmut"}}]
    settings = {"variants": variants, "compare": {"seeds": [3, 4], "baseline": "plain", "last": 1}}
    with opened(sweep_of(tmp_path, **settings)) as store:
        for variant in store.sweep.every_variant():
            chosen = compared(store.sweep, variant, single(store.sweep, variant))
            store.add(COMPARISON, variant.name, [Point(chosen)], variant.name)
        values = {"plain": (0.5, 0.25), "mutated": (0.75, 0.5)}
        plain, mutated = trials_of(store)
        for trial in (plain, mutated):
            for seed, value in zip((3, 4), values[trial.name], strict=True):
                write_config(store, record_run(store, trial, seed, [0.1, value]), trial, seed)
        assert write_comparison(store, [0, 1], ["as it is"]) is not None
        text = (store.folder / "comparison.md").read_text()
        assert "| mutated | 2 | 62.50 ± 17.68 |" in text and "+25.00 ± 0.00 |" in text and "- as it is" in text
        chosen = yaml.safe_load((store.folder / "tuned.yaml").read_text())["variants"]
        assert [one["name"] for one in chosen] == ["plain", "mutated"]
        (store.phase(COMPARISON).run_folders(mutated)[1] / "failure.json").write_text("{}")
        write_comparison(store, [0, 1], [])
        text = (store.folder / "comparison.md").read_text()
        assert "| mutated | 1 | 75.00 |" in text and "Diverged, and in no mean: mutated-seed4." in text
