"""Figures are drawn, hold what they should, and leave no global state."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fedjax_qp.reports import plots
from fedjax_qp.reports.compare import Run
from fedjax_qp.watch import Watch


def made_run(name: str, seed: int, rounds: int) -> Run:
    generator = np.random.default_rng((seed, rounds))
    records = []
    for number in range(1, rounds + 1):
        accuracy = 1 - 0.9 * float(np.exp(-5 * number / rounds)) + 0.01 * generator.normal()
        spread = {"q10": accuracy - 0.1, "q90": accuracy + 0.05, "min": accuracy - 0.3}
        test = (
            {"test_accuracy": accuracy, "test_loss": 1 - accuracy, "client_accuracy": spread} if number % 2 == 0 else {}
        )
        loss = None if number == 3 else 1 - accuracy
        records.append({"round": number, "train_loss": loss, "mutation/drift": 0.5, **test})
    return Run(Path(name), {"name": name, "seed": seed}, records)


def drawn(path: Path) -> bool:
    """Whether the image is large and not of one colour."""
    image = imread(path)
    return image.shape[0] > 300 and image.shape[1] > 600 and image.std() > 0.05


@pytest.mark.parametrize("count", [1, 8])
def test_comparison(tmp_path, count):
    loaded_before = "matplotlib.pyplot" in sys.modules
    runs = [made_run(f"method {index}", seed, 20) for index in range(count) for seed in range(1 + index % 2)]
    figure = plots.plot_comparison(runs, tmp_path / "comparison.png")
    assert drawn(tmp_path / "comparison.png")
    accuracy, loss = figure.axes
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("test accuracy (%)", "training loss (nats)")
    assert len(accuracy.lines) == len(loss.lines) == count
    assert len(accuracy.collections) == count // 2  # a band needs two seeds
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in accuracy.lines}
    assert len(styles) == count
    assert ("matplotlib.pyplot" in sys.modules) == loaded_before


def test_comparison_draws_the_mean_over_the_rounds_that_all_seeds_have(tmp_path):
    runs = [made_run("a", 0, 8), made_run("a", 1, 6)]
    (line, *_) = plots.plot_comparison(runs, tmp_path / "comparison.png").axes[0].lines
    rounds, values = line.get_data()
    assert list(rounds) == [2, 4, 6]
    expected = [
        50 * (runs[0].records[n - 1]["test_accuracy"] + runs[1].records[n - 1]["test_accuracy"]) for n in rounds
    ]
    np.testing.assert_allclose(values, expected)


def test_smoothed_points_are_means_of_the_last_values(tmp_path):
    run = made_run("a", 0, 8)
    accuracy, loss = plots.plot_comparison([run], tmp_path / "comparison.png", window=3).axes
    values = [100 * record["test_accuracy"] for record in run.records if "test_accuracy" in record]
    expected = [values[0], np.mean(values[:2]), np.mean(values[:3]), np.mean(values[1:4])]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), expected)
    assert "last 3 evaluations" in accuracy.get_title(loc="left")
    assert "last 3 rounds" in loss.get_title(loc="left")


@pytest.mark.parametrize(
    ("window", "expected"),
    [(1, [1, 2, np.nan, np.nan, 5, 6, 7]), (2, [1, 1.5, np.nan, np.nan, np.nan, 5.5, 6.5])],
)
def test_a_comparison_breaks_where_a_loss_was_not_finite(tmp_path, window, expected):
    """Only windows that hold such a loss are gone, and the rounds of another seed stay where they are."""

    def losses(seed: int, *values: float | None) -> Run:
        return Run(
            Path("a"),
            {"name": "a", "seed": seed},
            [{"round": n, "train_loss": value} for n, value in enumerate(values, 1)],
        )

    broken, whole = losses(0, 1, 2, None, None, 5, 6, 7), losses(1, 1, 2, 3, 4, 5, 6, 7)
    for runs in ([broken], [broken, whole]):
        loss = plots.plot_comparison(runs, tmp_path / "comparison.png", window=window).axes[1]
        rounds, values = loss.lines[0].get_data()
        assert list(rounds) == [1, 2, 3, 4, 5, 6, 7]
        np.testing.assert_allclose(values, expected)
    (method,) = plots.methods([broken, whole])
    rounds, values = plots._over_seeds(method, "train_loss", 1)
    assert list(rounds) == list(values[1]) == [1, 2, 3, 4, 5, 6, 7]


def test_the_clients_band_breaks_and_views_with_other_gaps_are_both_drawn(tmp_path):
    records = language_records()
    records[1]["personal"]["perplexity"]["q90"] = None
    for record, mean in zip(records, (8.0, 5.0, None), strict=True):
        record["tuned"] = {"perplexity": {"mean": mean}, "nonfinite": [1]}
    perplexity = plots.plot_run(records, tmp_path / "run.png").axes[0]
    (band,) = perplexity.collections
    assert {at for path in band.get_paths() for at in path.vertices[:, 0]} == {1, 3}
    assert "mean over clients' own tests, tuned" in {line.get_label() for line in perplexity.lines}


def test_run(tmp_path):
    watches = (
        Watch("mutation/drift", "drift", 0.9),
        Watch("train_loss", limit=1.0),
        Watch("qp/residual", "residual", 1.0),
    )
    figure = plots.plot_run(made_run("a", 0, 12).records, tmp_path / "run.png", watched=watches)
    assert drawn(tmp_path / "run.png")
    curve, limit = figure.axes[2].lines  # of what is labelled and was recorded
    assert curve.get_label() == "drift" and set(curve.get_ydata()) == {0.5}
    assert "drift" in limit.get_label() and set(limit.get_ydata()) == {0.9}
    assert len(plots.plot_run(made_run("a", 0, 12).records, tmp_path / "run.png").axes) == 2


@pytest.mark.parametrize("records", [[], [{"round": 1, "train_loss": None}]])
def test_run_without_anything_to_draw(tmp_path, records):
    assert len(plots.plot_run(records, tmp_path / "run.png").axes) == 2
    assert (tmp_path / "run.png").stat().st_size > 1000
    plots.plot_comparison([Run(Path("a"), {"name": "a", "seed": 0}, records)], tmp_path / "comparison.png")


def language_records() -> list[dict]:
    """Three rounds of two views; the second round's aggregated mean is no number."""
    records = []
    for number, mean in ((1, 8.0), (2, None), (3, 5.0)):
        spread = {"mean": mean, "q10": 3.0, "q90": 9.0, "max": mean}
        views = {"personal": {"perplexity": spread, "nonfinite": [1]}, "tuned": {"perplexity": {"mean": 4.0}}}
        records.append({"round": number, "train_loss": 1.0, "test_loss": 2.0, "test_accuracy": 0.25, **views})
    return records


def test_language_runs_show_perplexity(tmp_path):
    figure = plots.plot_run(language_records(), tmp_path / "run.png", title=r"$\frac$ of 10 % [/red]")
    perplexity, loss = figure.axes
    assert (perplexity.get_ylabel(), loss.get_ylabel()) == ("perplexity", "loss (nats)")
    lines = {line.get_label(): line.get_ydata() for line in perplexity.lines}
    np.testing.assert_array_equal(lines["mean over clients' own tests, aggregated"], [8, np.nan, 5])
    np.testing.assert_array_equal(lines["mean over clients' own tests, tuned"], [4, 4, 4])
    np.testing.assert_allclose(lines["global model, common test set"], np.exp([2, 2, 2]))
    assert len(perplexity.collections) == 1  # the clients' band
    runs = [Run(Path("a"), {"name": "a", "seed": 0}, language_records())]
    first = plots.plot_comparison(runs, tmp_path / "comparison.png").axes[0]
    assert "perplexity" in first.get_ylabel()
    np.testing.assert_array_equal(first.lines[0].get_ydata(), [8, np.nan, 5])


def test_legends_name_only_what_is_drawn(tmp_path):
    records = [{"round": n, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5} for n in (1, 2)]
    accuracy = plots.plot_run(records, tmp_path / "run.png").axes[0]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["global model, whole test set"]


def test_personal_accuracies_are_drawn_and_equal_views_once(tmp_path):
    spread = {"accuracy": {"mean": 0.75}, "loss": {"mean": 1.0}}
    records = [
        {"round": n, "test_accuracy": 0.5, "test_loss": 1.0, "personal": spread, "tuned": spread} for n in (1, 2)
    ]
    accuracy = plots.plot_run(records, tmp_path / "run.png").axes[0]
    labels = [line.get_label() for line in accuracy.lines]
    assert labels == ["global model, whole test set", "mean over clients' own tests, aggregated"]


def test_ticks_are_whole_and_round():
    assert list(plots.whole_ticks().tick_values(0, 60)) == [0, 10, 20, 30, 40, 50, 60]
    assert list(plots.whole_ticks().tick_values(1, 3)) == [1, 2, 3]
