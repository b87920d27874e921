"""Figures are drawn, hold what they should, and leave no global state."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from fedjax_qp import plots
from fedjax_qp.compare import Run


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


def test_run(tmp_path):
    figure = plots.plot_run(made_run("a", 0, 12).records, tmp_path / "run.png")
    assert drawn(tmp_path / "run.png")
    assert len(figure.axes) == 3


@pytest.mark.parametrize("records", [[], [{"round": 1, "train_loss": None}]])
def test_run_without_anything_to_draw(tmp_path, records):
    assert len(plots.plot_run(records, tmp_path / "run.png").axes) == 2
    assert (tmp_path / "run.png").stat().st_size > 1000
    plots.plot_comparison([Run(Path("a"), {"name": "a", "seed": 0}, records)], tmp_path / "comparison.png")
