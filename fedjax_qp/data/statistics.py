"""Statistics of a partition: how much data the clients hold, and how uneven their labels are."""

import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table


class PartitionSummary(NamedTuple):
    """A partition in a few numbers; quantiles are minimum, 25 %, median, 75 % and maximum over the clients."""

    clients: int
    examples: int
    examples_per_client: tuple[float, ...]  # quantiles
    classes_per_client: tuple[float, ...]  # quantiles
    effective_classes: float  # mean over clients of exp(entropy): how many classes, counted by their weight
    total_variation: float  # mean over clients of the distance to the labels of all clients; 0 = the same, below 1


def label_counts(
    parts: list[Int[np.ndarray, "n"]], labels: Int[np.ndarray, "N"], classes: int
) -> Int[np.ndarray, "K C"]:
    """Counts each client's examples of each class."""
    return np.stack([np.bincount(labels[part], minlength=classes) for part in parts])


def summary(counts: Int[np.ndarray, "K C"]) -> PartitionSummary:
    """Summarises label counts of clients that all have examples.

    Source: total variation from the global labels is the usual measure of label skew; the effective number of classes
    is Hill's diversity of order 1 (1973).
    """
    sizes = counts.sum(axis=1)
    shares: Float[np.ndarray, "K C"] = counts / sizes[:, None]
    overall = counts.sum(axis=0) / sizes.sum()
    # Where the share is 0, so is its term of the entropy; the 1 only keeps the logarithm finite.
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return PartitionSummary(
        clients=len(counts),
        examples=int(sizes.sum()),
        examples_per_client=_quantiles(sizes),
        classes_per_client=_quantiles((counts > 0).sum(axis=1)),
        effective_classes=float(np.exp(entropy).mean()),
        total_variation=float(0.5 * np.abs(shares - overall).sum(axis=1).mean()),
    )


def _quantiles(values: Int[np.ndarray, "K"]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))


def print_table(result: PartitionSummary, *, title: str = "Partition", console: Console | None = None) -> Table:
    """Prints a summary as a table, and returns the table."""
    table = Table("", *("min", "25 %", "median", "75 %", "max"), title=escape(title))
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("examples per client", *(f"{value:g}" for value in result.examples_per_client))
    table.add_row("classes per client", *(f"{value:g}" for value in result.classes_per_client))
    table.caption = (
        f"{result.clients} clients, {result.examples} examples; mean over clients:\n"
        f"{result.effective_classes:.2f} effective classes, total variation {result.total_variation:.3f}"
    )
    (console or Console()).print(table)
    return table


def plot_partition(
    counts: Int[np.ndarray, "K C"], path: str | Path, *, class_names: tuple[str, ...] = (), title: str = ""
) -> Path:
    """Draws how many examples of each class each client holds, above it the clients' sizes, into an image file.

    Args:
      counts: from `label_counts`.
      path: image file; its ending chooses the format (.png, .pdf, .svg).
      class_names: names of the C classes, or () to number them.

    Returns:
      The path written.
    """
    clients, classes = counts.shape
    figure = Figure(figsize=(8, min(2.4 + 0.24 * max(classes, 6), 12)), layout="constrained")
    sizes_axes, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    edges = np.arange(clients + 1) - 0.5
    sizes_axes.bar(range(clients), counts.sum(axis=1), width=0.9 if clients <= 60 else 1, color="0.45")
    sizes_axes.set_ylabel("examples")
    sizes_axes.set_title(title, parse_math=False)
    # Counts spread over decades, hence the logarithm; white stands for none at all.
    image = axes.pcolormesh(
        edges,
        np.arange(classes + 1) - 0.5,
        np.ma.masked_equal(counts.T, 0),
        norm=LogNorm(1, max(int(counts.max()), 2)),
        cmap="cividis_r",
        edgecolors="0.85",
        linewidth=0.3 if clients <= 60 else 0,
    )
    axes.set(xlabel="client", ylabel="class")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.invert_yaxis()
    if class_names or classes <= 30:
        names = [textwrap.shorten(name, 40, placeholder="…") for name in class_names]
        axes.set_yticks(range(classes), names or [str(label) for label in range(classes)], parse_math=False)
        axes.tick_params(axis="y", labelsize=9 if classes <= 30 else 5)
    figure.colorbar(image, ax=[sizes_axes, axes], label="examples of the class (white: none)")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        figure.savefig(path, dpi=150)
    return Path(path)
