"""Comparisons of small made runs, against numbers worked out by hand."""

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fedjax_qp import compare
from fedjax_qp.compare import Spread
from fedjax_qp.records import FILE
from fedjax_qp.registry import ConfigurationError

SETTINGS = {
    "rounds": 4,
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 10},
    "model": {"name": "mlp"},
    "algorithm": {"name": "fedavg", "weighting": "size"},
    "engine": {"lanes": 1},
}


def made_run(root: Path, name: str, seed: int, accuracies: list[float], **changes) -> Path:
    """A run folder with an evaluation in every round; the worst decile lies 0.2 below the accuracy."""
    folder = root / f"{name}-seed{seed}-{len(list(root.iterdir()))}"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": seed, **SETTINGS, **changes}))
    lines = [
        {
            "round": n,
            "train_loss": 1.0,
            "test_accuracy": value,
            "client_accuracy": {"min": value - 0.3, "q10": value - 0.2, "q90": value + 0.1},
        }
        for n, value in enumerate(accuracies, 1)
    ]
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def three_seeds_each(tmp_path) -> list[compare.Run]:
    """Accuracy of the last two evaluations: fedavg 0.50, 0.60, 0.70 and fedqp 0.52, 0.64, 0.76 for seeds 0, 1, 2."""
    qp = {"algorithm": {"name": "fedqp", "alpha": 2.0}}
    folders = [
        made_run(tmp_path, "fedavg", 2, [0.1, 0.8, 0.69, 0.71]),
        made_run(tmp_path, "fedavg", 0, [0.1, 0.2, 0.48, 0.52]),
        made_run(tmp_path, "fedavg", 1, [0.1, 0.2, 0.55, 0.65]),
        made_run(tmp_path, "fedqp", 0, [0.1, 0.2, 0.52, 0.52], **qp),
        made_run(tmp_path, "fedqp", 1, [0.1, 0.2, 0.64, 0.64], **qp),
        made_run(tmp_path, "fedqp", 2, [0.1, 0.7, 0.76, 0.76], **qp),
    ]
    return compare.load_runs(folders)


def close(spread: Spread | None, mean: float, std: float | None, seeds: int) -> bool:
    expected = Spread(pytest.approx(mean), None if std is None else pytest.approx(std), seeds)
    return spread == expected


def test_summary_over_seeds(three_seeds_each):
    average, qp = compare.summary(three_seeds_each, last=2, target=0.6, baseline="fedavg")
    assert (average.method, average.seeds, average.unequal) == ("fedavg", [0, 1, 2], [])
    assert close(average.accuracy, 0.6, 0.1, 3)
    assert close(average.final, (0.52 + 0.65 + 0.71) / 3, 0.0971253, 3)
    assert close(average.best, (0.52 + 0.65 + 0.80) / 3, 0.1401190, 3)
    assert close(average.worst_decile, 0.4, 0.1, 3)
    assert average.reached == (0.6, 4.0, 2)  # rounds 2, 4 and never
    assert qp.reached == (0.6, 3.0, 2)
    assert average.drift is None
    assert average.difference is None


def test_difference_is_paired_by_seed(three_seeds_each):
    _, qp = compare.summary(three_seeds_each, last=2, baseline="fedavg")
    assert qp.difference is not None
    assert qp.difference.baseline == "fedavg"
    assert close(qp.difference.points, 4.0, 2.0, 3)  # 2, 4 and 6 points: far less spread than the 10 points over seeds


def test_difference_uses_the_seeds_that_both_have(three_seeds_each):
    runs = [run for run in three_seeds_each if not (run.config["name"] == "fedavg" and run.config["seed"] == 1)]
    _, qp = compare.summary(runs, last=2, baseline="fedavg")
    assert qp.difference is not None
    assert close(qp.difference.points, 4.0, 8**0.5, 2)  # 2 and 6 points
    assert "(2 seeds)" in compare.to_markdown(compare.summary(runs, last=2, baseline="fedavg"))
    alone = [run for run in runs if run.config["seed"] == (1 if run.config["name"] == "fedqp" else 0)]
    _, qp = compare.summary(alone, last=2, baseline="fedavg")
    assert qp.difference == ("fedavg", None)


def test_target_that_most_seeds_never_reach_has_no_median(three_seeds_each):
    average, _ = compare.summary(three_seeds_each, target=0.75)
    assert average.reached == (0.75, None, 1)


def test_drift_is_the_mean_over_rounds(tmp_path):
    folder = made_run(tmp_path, "fedqp", 0, [0.5])
    drifts = [0.25, None, 0.75]
    lines = [{"round": n, "mutation/drift": drift} for n, drift in enumerate(drifts, 1)]
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare.summary(compare.load_runs([folder]))
    assert rows[0].drift == Spread(0.5, None, 1)
    assert rows[0].accuracy is None
    assert "0.50" in compare.to_markdown(rows)


def test_runs_that_differ_in_the_seed_or_in_where_they_ran_are_one_method(tmp_path):
    folders = [
        made_run(tmp_path, "a", 1, [0.5]),
        made_run(tmp_path, "a", 0, [0.5], engine={"lanes": 5}, folder="elsewhere"),
        made_run(tmp_path, "b", 0, [0.5]),
    ]
    found = compare.methods(compare.load_runs(folders))
    assert [(method.label, [run.config["seed"] for run in method.runs]) for method in found] == [
        ("a", [0, 1]),
        ("b", [0]),
    ]


def test_one_name_with_several_settings_is_labelled_by_them(tmp_path):
    folders = [
        made_run(tmp_path, "a", 0, [0.5], algorithm={"name": "fedqp", "alpha": 2.0}),
        made_run(tmp_path, "a", 0, [0.5], algorithm={"name": "fedqp", "alpha": 4.0}),
        made_run(tmp_path, "a", 0, [0.5], algorithm={"name": "fedqp", "alpha": 4.0, "margin": 0.1}),
        made_run(tmp_path, "b", 0, [0.5], algorithm={"name": "fedavg"}),
        made_run(tmp_path, "b", 0, [0.5], algorithm={"name": "fedmut", "alpha": 4.0}),
        made_run(tmp_path, "c", 0, [0.5]),
    ]
    assert [method.label for method in compare.methods(compare.load_runs(folders))] == [
        "a (algorithm.alpha=2.0, algorithm.margin=–)",
        "a (algorithm.alpha=4.0, algorithm.margin=–)",
        "a (algorithm.alpha=4.0, algorithm.margin=0.1)",
        "b (algorithm.name=fedavg)",
        "b (algorithm.name=fedmut)",
        "c",
    ]


def test_unequal_settings_are_part_of_the_result(tmp_path):
    folders = [
        made_run(tmp_path, "a", 0, [0.5, 0.5]),
        made_run(tmp_path, "b", 0, [0.5], rounds=9, data={"name": "mnist5k"}, algorithm={"name": "fedqp"}),
    ]
    rows = compare.summary(compare.load_runs(folders))
    assert rows[0].unequal == []
    assert rows[1].unequal == ["data.name: 'digits' → 'mnist5k'", "rounds: 4 → 9", "rounds finished: 2 → 1"]
    assert "Not an equal comparison: a → b differs in data.name" in compare.to_markdown(rows)
    assert "Not an equal comparison" in shown(rows)
    swapped = compare.summary(compare.load_runs(folders), baseline="b")
    assert swapped[1].unequal == []
    assert "rounds: 9 → 4" in swapped[0].unequal


def test_runs_that_are_not_whole_are_named(tmp_path):
    folders = [made_run(tmp_path, "a", seed, [0.5, 0.5], rounds=2) for seed in range(4)]
    (folders[1] / "failure.json").write_text("{}")
    (folders[2] / "records.jsonl").write_text((folders[2] / "records.jsonl").read_text().splitlines()[0] + "\n")
    (folders[3] / "records.jsonl").write_text("")
    (row,) = compare.summary(compare.load_runs(folders))
    assert row.unfinished == ["seed 1 diverged after 2 rounds", "seed 2 has 1 of 2 rounds", "seed 3 has 0 of 2 rounds"]
    assert "Not whole: a, seed 1 diverged after 2 rounds, seed 2" in compare.to_markdown([row])
    (folders[2] / "ended.json").write_text("{}")  # it stopped early, as it was told to
    assert "seed 2" not in str(compare.summary(compare.load_runs(folders))[0].unfinished)


def shown(rows: list[compare.Row]) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(compare.table(rows))
    return text.getvalue()


def test_uneven_seeds_of_one_method_are_named(tmp_path):
    folders = [made_run(tmp_path, "a", 0, [0.5, 0.5]), made_run(tmp_path, "a", 1, [0.5])]
    assert compare.summary(compare.load_runs(folders))[0].unequal == ["rounds finished: 1, 2 → 1, 2"]


def test_outputs_hold_the_same_numbers(three_seeds_each):
    rows = compare.summary(three_seeds_each, last=2, target=0.6, baseline="fedavg")
    header, _, average, qp = compare.to_markdown(rows).splitlines()
    cells = [cell.strip() for cell in qp.strip("|").split("|")]
    assert cells == [
        "fedqp",
        "3",
        "64.00 ± 12.00",
        "64.00 ± 12.00",
        "64.00 ± 12.00",
        "44.00 ± 12.00",
        "3 (2 of 3)",
        "+4.00 ± 2.00",
    ]
    assert len(header.split("|")) == len(average.split("|")) == len(qp.split("|"))
    assert all(cell in shown(rows) for cell in cells)
    assert "Not an equal" not in shown(rows)
    loaded = json.loads(compare.to_json(rows))
    assert loaded[1]["difference"]["points"] == {"mean": pytest.approx(4), "std": pytest.approx(2), "seeds": 3}
    assert loaded[0]["difference"] is None


def test_mistakes_are_named(tmp_path, three_seeds_each):
    with pytest.raises(ConfigurationError, match="unknown baseline 'fedavgg': did you mean fedavg"):
        compare.summary(three_seeds_each, baseline="fedavgg")
    with pytest.raises(ConfigurationError, match="target = 70"):
        compare.summary(three_seeds_each, target=70)
    with pytest.raises(ConfigurationError, match="last = 0"):
        compare.summary(three_seeds_each, last=0)
    with pytest.raises(ConfigurationError, match=r"the same run \(seed 0\)"):
        compare.methods([*three_seeds_each, three_seeds_each[1]])
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        compare.load_runs([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"no records\.jsonl"):
        compare.load_runs([tmp_path / "empty"])
    (tmp_path / "empty" / FILE).write_text("")
    with pytest.raises(ConfigurationError, match=r"no config\.yaml"):
        compare.load_runs([tmp_path / "empty"])
    (tmp_path / "empty" / "config.yaml").write_text("[]")
    with pytest.raises(ConfigurationError, match="not the configuration of a run"):
        compare.load_runs([tmp_path / "empty"])
