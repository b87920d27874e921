"""Statistics of partitions, against plain loops and cases known by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from fedjax_qp.data import label_counts, plot_partition, print_table, summary


def test_label_counts_against_counters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 500)
    parts = np.split(rng.permutation(500), [10, 11, 300])
    counts = label_counts(parts, labels, 8)
    assert counts.shape == (4, 8)
    for part, row in zip(parts, counts, strict=True):
        counter = Counter(labels[part].tolist())
        assert row.tolist() == [counter[label] for label in range(8)]


def plain_summary(counts):
    """Total variation and effective classes, written out."""
    total = sum(map(sum, counts))
    overall = [sum(row[label] for row in counts) / total for label in range(len(counts[0]))]
    distances, effective = [], []
    for row in counts:
        shares = [count / sum(row) for count in row]
        distances.append(sum(abs(a - b) for a, b in zip(shares, overall, strict=True)) / 2)
        effective.append(math.exp(-sum(share * math.log(share) for share in shares if share > 0)))
    return sum(distances) / len(counts), sum(effective) / len(counts)


def test_summary_against_plain_loops():
    counts = np.random.default_rng(0).integers(0, 5, (20, 6)) + np.eye(20, 6, dtype=int)
    counts[:, 0] += 1
    result = summary(counts)
    assert (result.total_variation, result.effective_classes) == pytest.approx(plain_summary(counts.tolist()))
    sizes = sorted(counts.sum(axis=1).tolist())
    assert result.examples_per_client[0] == sizes[0] and result.examples_per_client[-1] == sizes[-1]
    assert result.examples_per_client[2] == (sizes[9] + sizes[10]) / 2
    assert (result.clients, result.examples) == (20, counts.sum())


def test_summary_of_known_cases():
    even = summary(np.full((4, 5), 3))
    assert even.total_variation == pytest.approx(0) and even.effective_classes == pytest.approx(5)
    one_class_each = summary(np.diag([2, 2, 2, 2]))
    assert one_class_each.total_variation == pytest.approx(3 / 4) and one_class_each.effective_classes == 1
    assert one_class_each.classes_per_client == (1, 1, 1, 1, 1)


def test_table():
    console = Console(record=True, width=100)
    table = print_table(summary(np.array([[5, 0], [1, 4]])), title="two clients", console=console)
    assert isinstance(table, Table)
    text = console.export_text()
    assert "two clients" in text and "2 clients, 10 examples" in text and "classes per client" in text


def test_names_are_shown_as_they_are(tmp_path):
    console = Console(record=True, width=100)
    print_table(summary(np.array([[5, 0], [1, 4]])), title="[/red] $\\frac$", console=console)
    assert "[/red] $\\frac$" in console.export_text()
    names = ("$\\frac$", "[/red]", "猫\x00", "n" * 10_000)  # mathtext, markup, letters without a glyph, no end
    path = plot_partition(np.ones((2, 4), int), tmp_path / "partition.png", class_names=names, title="$\\frac$")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(100, 10), (3, 2), (1, 1), (20, 100)])
def test_plot(tmp_path, shape):
    counts = np.random.default_rng(0).poisson(0.7, shape)
    path = plot_partition(counts, tmp_path / "partition.png", title="a partition")
    assert path.read_bytes().startswith(b"\x89PNG")
