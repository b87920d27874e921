"""Comparisons of small made runs, against numbers worked out by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from support.comparisons import made_run

from fedjax_qp.console.tables import without_empty
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports import compare, rendering
from fedjax_qp.reports import personal as compare_personal
from fedjax_qp.reports.compare import Spread
from fedjax_qp.reports.personal import personal_grid, personal_json, personal_markdown, personal_summary, personal_table
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.watch import Watch


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
    assert average.watched == {}
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
    assert "(2 seeds)" in rendering.to_markdown(compare.summary(runs, last=2, baseline="fedavg"))
    alone = [run for run in runs if run.config["seed"] == (1 if run.config["name"] == "fedqp" else 0)]
    _, qp = compare.summary(alone, last=2, baseline="fedavg")
    assert qp.difference == ("fedavg", None)


def test_target_that_most_seeds_never_reach_has_no_median(three_seeds_each):
    average, _ = compare.summary(three_seeds_each, target=0.75)
    assert average.reached == (0.75, None, 1)


def test_what_a_method_wants_shown_is_a_column_of_means_over_rounds(tmp_path):
    watches = (Watch("mutation/drift", "drift"), Watch("qp/residual", limit=1e-4))
    folder, other = made_run(tmp_path, "fedqp", 0, [0.5], watches), made_run(tmp_path, "fedavg", 0, [0.25])
    drifts = [0.25, None, 0.75]
    lines = [{"round": n, "mutation/drift": drift} for n, drift in enumerate(drifts, 1)]
    RunFolder(folder).records_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare.summary(compare.load_runs([folder, other]))
    assert [row.watched for row in rows] == [{"drift": Spread(0.5, None, 1)}, {}]
    assert rows[0].accuracy is None
    headings, cells = rendering.grid(rows)
    assert [line[headings.index("drift")] for line in cells] == ["0.50", "–"]


def test_a_run_whose_folder_says_nothing_of_it_has_no_such_column(tmp_path):
    folder = made_run(tmp_path, "fedqp", 0, [0.5], (Watch("test_accuracy", "drift"),))
    assert "drift" in rendering.grid(compare.summary(compare.load_runs([folder])))[0]
    for damaged in ("{", "[]", '{"watched": 3}', '{"watched": [{"metric": 3}]}', '{"watched": [{"label": "drift"}]}'):
        RunFolder(folder).watched.path.write_text(damaged)
        assert "drift" not in rendering.grid(compare.summary(compare.load_runs([folder])))[0]
    RunFolder(folder).watched.path.unlink()
    assert "drift" not in rendering.grid(compare.summary(compare.load_runs([folder])))[0]


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
    assert rows[1].unequal == ["data.name: 'digits' → 'mnist5k'", "rounds finished: 2 → 1"]
    assert "Settings differ: a → b differs in data.name" in rendering.to_markdown(rows)
    assert "Settings differ" in shown(rows)
    swapped = compare.summary(compare.load_runs(folders), baseline="b")
    assert swapped[1].unequal == []
    assert "rounds finished: 1 → 2" in swapped[0].unequal


def test_a_resumed_run_is_still_of_its_method(tmp_path):
    """Compared over the rounds that all were to have, whatever they went on to do."""
    folders = [
        made_run(
            tmp_path, "plain", 0, [0.1, 0.2, 0.3, 0.4, 0.9, 0.9], rounds=6, evaluation={"every": 1, "patience": 3}
        ),
        made_run(tmp_path, "plain", 1, [0.1, 0.2, 0.3, 0.6], evaluation={"every": 1}),
        made_run(tmp_path, "better", 0, [0.1, 0.2, 0.3, 0.5]),
        made_run(tmp_path, "better", 1, [0.1, 0.2, 0.3, 0.7], evaluation={"every": 2}),
    ]
    rows = compare.summary(compare.load_runs(folders), last=1, baseline="plain")
    assert [(row.method, row.seeds) for row in rows] == [("plain", [0, 1]), ("better", [0, 1])]
    assert close(rows[0].accuracy, 0.5, 0.02**0.5, 2)
    assert rows[1].difference is not None and close(rows[1].difference.points, 10.0, 0.0, 2)
    assert rows[0].remarks == ["compared over the first 4 rounds only, which all runs were to have; seed 0 has 6."]
    assert "plain: compared over the first 4 rounds" in shown(rows)
    assert rows[0].unfinished == [] and rows[1].unequal == ["evaluation.every: 1 → None"]


def test_a_baseline_may_be_named_by_the_name_of_its_runs(tmp_path):
    folders = [
        made_run(tmp_path, "plain", 0, [0.5]),
        made_run(tmp_path, "tried", 0, [0.5], algorithm={"name": "fedqp", "alpha": 2.0}),
        made_run(tmp_path, "tried", 0, [0.6], algorithm={"name": "fedqp", "alpha": 4.0}),
    ]
    runs = compare.load_runs(folders)
    for baseline in ("plain", folders[0].name, str(folders[0])):
        assert [row.difference is None for row in compare.summary(runs, baseline=baseline)] == [True, False, False]
    assert compare.summary(runs, baseline=folders[2].name)[2].difference is None
    with pytest.raises(ConfigurationError, match=r"'tried' is the name of several methods: choose one of 'tried \(alg"):
        compare.summary(runs, baseline="tried")


def test_runs_from_before_clients_had_tests_are_of_the_same_method(tmp_path):
    now = {"name": "iid", "clients": 10, "test": "common", "test_share": 0.2}
    folders = [made_run(tmp_path, "a", 0, [0.5]), made_run(tmp_path, "a", 1, [0.5], partition=now)]
    assert len(compare.methods(compare.load_runs(folders))) == 1
    own = made_run(tmp_path, "a", 2, [0.5], partition=now | {"test": "own"})
    assert len(compare.methods(compare.load_runs([*folders, own]))) == 2


def language_run(root: Path, seed: int, perplexities: list[float | None], name: str = "lm") -> Path:
    """Two clients; null is a perplexity that was no number."""
    folder = made_run(root, name, seed, [0.25] * len(perplexities))
    lines = []
    for number, perplexity in enumerate(perplexities, 1):
        spread = {"mean": perplexity, "min": 2.0, "max": perplexity, "clients": [2.0, perplexity]}
        view = {"perplexity": spread, "loss": spread} | ({"nonfinite": [1]} if perplexity is None else {})
        lines.append({"round": number, "test_loss": 1.0, "test_accuracy": 0.25, "personal": view})
    RunFolder(folder).records_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_language_runs_are_judged_by_perplexity(tmp_path):
    rows = compare.summary(
        compare.load_runs([language_run(tmp_path, s, [9.0, 4.0 + s, 5.0 + s]) for s in (0, 2)]), last=2
    )
    assert rows[0].perplexity is not None and close(rows[0].perplexity, 5.5, 2**0.5, 2)
    assert rendering.grid(rows)[0] == [
        "method",
        "seeds",
        "perplexity, last 2",
        "accuracy, last 2 (%)",
        "final (%)",
        "best (%)",
    ]


def test_a_perplexity_that_is_no_number_is_not_missing(tmp_path):
    rows = compare.summary(
        compare.load_runs([language_run(tmp_path, 0, [4.0, None]), language_run(tmp_path, 1, [4.0, 5.0])])
    )
    assert rendering.grid(rows)[1][0][2] == "not finite"
    assert json.loads(rendering.to_json(rows))[0]["perplexity"]["mean"] is None
    assert "lm: seed 0: a test loss is not finite" in shown(rows) and "personal model of client 1 (round 2)" in shown(
        rows
    )
    (row,) = personal_summary(compare.load_runs([language_run(tmp_path, 2, [4.0, None])]))
    assert (
        personal_grid([row])[1][0][1] == "not finite"
        and json.loads(personal_json([row]))[0]["worst"]["aggregated"]["mean"] is None
    )


def image_run(root: Path, name: str, seed: int, accuracy: float) -> Path:
    folder = made_run(root, name, seed, [0.5])
    spread = {"mean": accuracy, "min": accuracy - 0.2, "max": 1.0}
    line = {"round": 1, "test_loss": 1.0, "test_accuracy": 0.5, "personal": {"accuracy": spread, "loss": spread}}
    RunFolder(folder).records_file.write_text(json.dumps(line) + "\n")
    return folder


def test_personal_accuracies_of_images_are_compared_in_points(tmp_path):
    runs = [
        image_run(tmp_path, name, seed, level + 0.1 * seed)
        for name, level in (("a", 0.5), ("b", 0.6))
        for seed in (0, 1)
    ]
    rows = personal_summary(compare.load_runs(runs), baseline="a")
    of_clients, change = rows[1].accuracy["aggregated"], rows[1].change["aggregated"]
    assert of_clients is not None and close(of_clients, 0.65, 0.005**0.5, 2)
    assert change is not None and close(change, 10.0, 0.0, 2)
    assert personal_grid(rows)[0] == [
        "method",
        "aggregated (%)",
        "worst client (%)",
        "Δ aggregated (points)",
        "common test (%)",
    ]
    assert personal_grid(rows)[1][1] == ["b", "65.00 ± 7.07", "45.00 ± 7.07", "+10.0 ± 0.00", "50.00 ± 0.00"]


def test_traffic_is_a_mean_over_all_reports_of_a_run(tmp_path):
    """Four clients send 100 bytes each and one sends 200: 120, not the 150 between the rounds. Then over seeds."""
    folders = [image_run(tmp_path, "a", seed, 0.5) for seed in (0, 1)]
    rounds = [[(4, 100), (1, 200), (0, None)], [(1, 40)]]
    for folder, of_round in zip(folders, rounds, strict=True):
        lines = json.loads(RunFolder(folder).records_file.read_text())
        counts = ("client/upload_bytes", "client/download_bytes", "client/trained_entries")
        written = [
            json.dumps(lines | {"round": n, "reporting": reporting, **dict.fromkeys(counts, value)})
            for n, (reporting, value) in enumerate(of_round, 1)
        ]
        RunFolder(folder).records_file.write_text("\n".join(written) + "\n")
    (row,) = personal_summary(compare.load_runs(folders))
    assert (row.upload_bytes, row.download_bytes, row.trained_entries) == (80, 80, 80)  # of 120 and 40
    (alone,) = personal_summary(compare.load_runs(folders[:1]))
    assert alone.upload_bytes == pytest.approx(120)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_no_word_is_broken_in_a_narrow_terminal(tmp_path, three_seeds_each, width):
    rows = compare.summary(three_seeds_each, last=2, target=0.6, baseline="fedavg")
    text = io.StringIO()
    Console(width=width, file=text).print(rendering.table(rows))
    words = set(text.getvalue().split())
    assert {"accuracy,", "(points)", "decile"} <= words
    assert all(len(line) <= width for line in text.getvalue().splitlines())
    for cell in rendering.grid(rows)[1][1]:
        assert cell in text.getvalue()


@pytest.mark.parametrize("write", [rendering.table, rendering.to_markdown, personal_table, personal_markdown])
def test_every_cell_is_written_once(tmp_path, monkeypatch, write):
    """Not the whole table anew for each of its rows."""
    runs = compare.load_runs([image_run(tmp_path, f"method {number}", 0, 0.5) for number in range(5)])
    rows: list = compare.summary(runs) if write in (rendering.table, rendering.to_markdown) else personal_summary(runs)
    module, made = (rendering if isinstance(rows[0], compare.Row) else compare_personal), []
    monkeypatch.setattr(module, "without_empty", lambda *grid: made.append(grid) or without_empty(*grid))
    write(rows)
    assert len(made) == 1


def test_one_seed_is_said_in_the_terminal_too(tmp_path):
    rows = compare.summary(compare.load_runs([made_run(tmp_path, "a", 0, [0.5])]))
    assert "One seed, so no spread: a." in shown(rows)


def test_names_are_no_markup(tmp_path):
    (run,) = compare.load_runs([made_run(tmp_path, "a", 0, [0.5])])
    assert "x[/red]" in shown(compare.summary([run._replace(config=run.config | {"name": "x[/red]"})]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [a]\n", "name = "),
        (b"name: a\nseed: one\n", "seed = 'one'"),
        (b"name: a\nrounds: many\n", "rounds = 'many'"),
        (b"name: a\nalgorithm: 5\n", "algorithm = 5"),
        (b"name: a\nlocal: {1: 2}\n", "keys that are no text"),
        (b"name: a\nname: b\n", "stands twice"),
        (b"name: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        (b"\xff\xfe\x00garbage", "UTF-8"),
        (b"- a\n", "not the configuration of a run"),
    ],
)
def test_damaged_configurations_are_named_in_one_line(tmp_path, content, message):
    folder = made_run(tmp_path, "a", 0, [0.5])
    RunFolder(folder).config_file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as error:
        compare.load_runs([folder])
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_the_short_form_of_a_part_is_read(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.5], algorithm="fedqp")
    assert compare.load_runs([folder])[0].config["algorithm"] == {"name": "fedqp"}


def test_runs_that_are_not_whole_are_named(tmp_path):
    folders = [made_run(tmp_path, "a", seed, [0.5, 0.5], rounds=2) for seed in range(4)]
    RunFolder(folders[1]).failure.path.write_text("{}")
    RunFolder(folders[2]).records_file.write_text(RunFolder(folders[2]).records_file.read_text().splitlines()[0] + "\n")
    RunFolder(folders[3]).records_file.write_text("")
    (row,) = compare.summary(compare.load_runs(folders))
    assert row.unfinished == ["seed 1 diverged after 2 rounds", "seed 2 has 1 of 2 rounds", "seed 3 has 0 of 2 rounds"]
    assert "Incomplete: a, seed 1 diverged after 2 rounds, seed 2" in rendering.to_markdown([row])
    RunFolder(folders[2]).end.path.write_text("{}")  # it stopped early, as it was told to
    assert "seed 2" not in str(compare.summary(compare.load_runs(folders))[0].unfinished)


def shown(rows: list[compare.Row]) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(rendering.table(rows))
    return text.getvalue()


def test_uneven_seeds_of_one_method_are_named(tmp_path):
    folders = [made_run(tmp_path, "a", 0, [0.5, 0.5]), made_run(tmp_path, "a", 1, [0.5])]
    assert compare.summary(compare.load_runs(folders))[0].unequal == ["rounds finished: 1, 2 → 1, 2"]


def test_outputs_hold_the_same_numbers(three_seeds_each):
    rows = compare.summary(three_seeds_each, last=2, target=0.6, baseline="fedavg")
    header, _, average, qp = rendering.to_markdown(rows).splitlines()
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
    assert "Settings differ" not in shown(rows)
    loaded = json.loads(rendering.to_json(rows))
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
    RunFolder(tmp_path / "empty").records_file.write_text("")
    with pytest.raises(ConfigurationError, match=r"no config\.yaml"):
        compare.load_runs([tmp_path / "empty"])
    RunFolder(tmp_path / "empty").config_file.write_text("[]")
    with pytest.raises(ConfigurationError, match="not the configuration of a run"):
        compare.load_runs([tmp_path / "empty"])
