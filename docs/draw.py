"""Draws the pictures of README and docs from committed results, once for light and once for dark pages.

Command: python docs/draw.py
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fedjax_qp import quadratic

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"


class Theme(NamedTuple):
    """Colours of one kind of page; the background is left to the page."""

    text: str
    faint: str
    blue: str
    orange: str
    green: str
    purple: str
    fill: str


THEMES = {
    "light": Theme("#24292f", "#d0d7de", "#0072B2", "#C24E00", "#00795A", "#A34F83", "#eaf2f8"),
    "dark": Theme("#e6edf3", "#3d444d", "#56B4E9", "#F0803C", "#2CC79B", "#E08FC0", "#1c2f3d"),
}

TASKS = {
    "cifar10_lenet_0_1_sgd-main": "CIFAR-10, LeNet",
    "fashion_mnist_lenet_0_1-main": "Fashion-MNIST, LeNet",
    "shakespeare_small_lstm-6.4": "Shakespeare, LSTM",
}


FAILED = 0.2  # final accuracy; the tables leave such a seed out too


def curves(theme: Theme) -> Figure:
    """Test accuracy over rounds on three tasks: FedQP, its drift alone, FedMut and FedAvg, means over seeds."""
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "fedavg-uniform": ("FedAvg", {"color": theme.text, "linestyle": ":"}),
        "fedmut": ("FedMut", {"color": theme.orange, "linestyle": "-."}),
        "fedqp-joint": ("FedQP", {"color": theme.blue, "linewidth": 2.4}),
        "fedqp-joint-drift": ("FedQP's drift alone", {"color": theme.purple, "linestyle": (0, (4, 2))}),
    }
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for axes, (file, title) in zip(figure.subplots(1, len(TASKS)), TASKS.items(), strict=True):
        rows = pd.read_csv(ROOT / "benchmarks" / "results" / f"{file}.csv")
        rows["method"] = rows["run"].str.extract(r"-main-(.*)-seed\d$")
        failed = pd.Series(rows.groupby("run")["test_accuracy"].transform("last")) < FAILED
        rows = pd.DataFrame(rows[~failed])
        smooth = 5 if len(rows["round"].unique()) > 20 else 1
        for method, (label, style) in styles.items():
            mean = pd.Series(pd.DataFrame(rows[rows["method"] == method]).groupby("round")["test_accuracy"].mean())
            mean = pd.Series(mean.rolling(smooth, min_periods=1).mean())
            axes.plot(mean.index, 100 * mean.to_numpy(), label=label, **{"linewidth": 1.6, **style})
        axes.set_title(title, fontsize=10, color=theme.text)
        axes.set_xlabel("round")
        paint(axes, theme)
    figure.axes[0].set_ylabel("test accuracy (%)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=theme.text, handlelength=3
    )
    return figure


def geometry(theme: Theme) -> Figure:
    """Two layers: FedMut's mutations, and what three forms of the quadratic program make of them."""
    shares, alpha, margin = jnp.array([0.65, 0.35]), 2.0, 0.3
    signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    scale = np.sqrt(np.asarray(shares))
    drawn = alpha * np.asarray(signs) * scale
    forms = {
        "nearest": quadratic.nearest(signs, shares, alpha=alpha, margin=margin)[0],
        "box": quadratic.boxed(signs, shares, alpha=alpha, margin=margin)[0],
        "joint, drift 0.7": quadratic.joint(signs, shares, alpha=alpha, margin=margin, drift=0.7)[0],
    }
    figure = Figure(figsize=(9, 4.3), layout="constrained")
    for axes, (name, coefficients) in zip(figure.subplots(1, 3, sharey=True), forms.items(), strict=True):
        corrected = np.asarray(coefficients) * scale
        for start, end in zip(drawn, corrected, strict=True):
            axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": theme.text, "alpha": 0.6})
        axes.annotate("", xy=scale, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": theme.green, "lw": 2})
        axes.annotate("g", xy=scale * 1.1, color=theme.green, fontsize=11)
        axes.scatter(*drawn.T, marker="x", s=55, color=theme.orange, label="FedMut's mutant", zorder=3)
        axes.scatter(*corrected.T, marker="o", s=42, color=theme.blue, label="corrected by FedQP", zorder=3)
        axes.scatter(*corrected.mean(0), marker="*", s=170, color=theme.purple, label="their mean: the drift", zorder=4)
        axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
        axes.set_title(name, fontsize=10, color=theme.text)
        axes.set_xlabel("layer 1")
        paint(axes, theme)
    figure.axes[0].set_ylabel("layer 2")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, labelcolor=theme.text)
    return figure


BOXES = {  # a room or a file, what it does, and its column and row
    "config": ("config.py", "settings, every default", 0, 0),
    "experiment": ("experiment/", "settings → objects", 1, 0),
    "plan": ("engine/plan.py", "cohorts, batches, lanes", 2, 0),
    "chunk": ("engine/", "rounds as one program", 3, 0),
    "data": ("data/ models/ tasks/", "what is trained on what", 1, 1),
    "methods": ("algorithms/ quadratic/", "one method per file", 2, 1),
    "round": ("federated.py", "one round; read first", 3, 1),
    "loop": ("runs/loop.py", "chunk after chunk", 3, -1),
    "folder": ("runs/", "records, checkpoints", 2, -1),
    "reports": ("reports/ instruments/", "tables, plots, flatness", 1, -1),
    "sweep": ("sweeps", "many configurations", 0, -1),
    "cli": ("cli.py", "the command line", 0, 1),
}
ARROWS = [
    *[("cli", "config"), ("config", "experiment"), ("experiment", "plan"), ("plan", "chunk"), ("chunk", "loop")],
    *[("data", "experiment"), ("methods", "round"), ("round", "chunk"), ("loop", "folder"), ("folder", "reports")],
    ("sweep", "config"),
]


def architecture(theme: Theme) -> Figure:
    """The way of a run through the package."""
    figure = Figure(figsize=(9, 3.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.05, 4.05), ylim=(-1.5, 1.5))
    axes.axis("off")
    width, height = 0.84, 0.5
    places = {name: (column + 0.5, 0.95 * row) for name, (_, _, column, row) in BOXES.items()}
    for name, (title, text, *_) in BOXES.items():
        x, y = places[name]
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=theme.fill,
                edgecolor=theme.blue,
                linewidth=1.2,
            )
        )
        axes.text(x, y + 0.09, title, ha="center", va="center", color=theme.text, fontsize=9, weight="bold")
        axes.text(x, y - 0.12, text, ha="center", va="center", color=theme.text, fontsize=8.5)
    for first, second in ARROWS:
        (x, y), (u, v) = places[first], places[second]
        across, up = np.sign(u - x), np.sign(v - y)
        level = y == v
        start = (x + across * width / 2, y) if level else (x, y + up * height / 2)
        end = (u - across * width / 2, v) if level else (u, v - up * height / 2)
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": theme.text, "lw": 1.2})
    return figure


def paint(axes: Axes, theme: Theme) -> None:
    """A faint grid, and text in the theme's colour."""
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.faint)
    axes.tick_params(colors=theme.text, labelsize=9)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)


def main() -> None:
    """Writes every picture in both themes."""
    PICTURES.mkdir(exist_ok=True)
    reproducible: Any = {"svg.hashsalt": "fedjax_qp", "svg.fonttype": "none", "font.family": "sans-serif"}
    with mpl.rc_context(reproducible):
        for draw in (curves, geometry, architecture):
            for name, theme in THEMES.items():
                file = PICTURES / f"{draw.__name__}-{name}.svg"
                draw(theme).savefig(file, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
