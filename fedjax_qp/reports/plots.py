"""The figures of a run and of a comparison. Matplotlib's objects only, no pyplot: no global state, no display."""

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_qp.reports.compare import Method, Run, methods
from fedjax_qp.runs import record_numbers
from fedjax_qp.watch import Watch

# Okabe and Ito's palette, which stays distinct for colour-blind readers; grey replaces its yellow, faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX*p"
_MARKED = 8  # markers per curve
_AGREEMENT = Watch("update/cosine_between_clients", "mean cosine between clients")
_SMOOTHED_TO = 40  # longer curves are averaged down to about so many independent points


def plot_comparison(runs: list[Run], path: str | Path, *, window: int | None = None) -> Figure:
    """Draws test accuracy (of language models perplexity) and training loss: a line per method, a band of ± one standard
    deviation over its seeds.

    Args:
      runs: from `compare.load_runs`. A method is drawn over the rounds that all of its seeds have.
      path: image file; its ending chooses the format (.png, .pdf, .svg).
      window: each point is the mean of so many values up to its round, and the axes say so. Default: 1 for short runs,
        more for long ones, whose curves would hide each other.
    """
    found = methods(runs)
    columns = _legend_columns(found)
    figure = Figure(figsize=(11, 4.4 + 0.22 * -(-len(found) // columns)), layout="constrained")
    headline, loss = figure.subplots(1, 2)
    language, numbers = (
        any(of_language_model(run.records) for run in runs),
        all(_of_numbers(run.records) for run in runs),
    )
    if language:
        _draw_methods(headline, found, "personal/perplexity/mean", 1, window)
    else:
        _draw_methods(headline, found, *(("test_r2", 1) if numbers else ("test_accuracy", 100)), window)
    _draw_methods(loss, found, "train_loss", 1, window)
    finish_axes(headline, _headline(language, numbers))
    finish_axes(loss, "training loss (nats)")
    handles, labels = headline.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=4)
    save(figure, path)
    return figure


def _headline(language: bool, numbers: bool) -> str:
    if language:
        return "perplexity on clients' own tests, mean"
    return "R² on the test set" if numbers else "test accuracy (%)"


class ShownFigure(Figure):
    """A figure that a notebook shows where it stands, whatever its back end."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        save(self, image)
        return image.getvalue()


def plot_metric(runs: list[Run], metric: str) -> Figure:
    """Draws one number of the records as `plot_comparison` draws the accuracy; accuracies in per cent."""
    found = methods(runs)
    figure = ShownFigure(figsize=(6.4, 4.4 + 0.22 * len(found)), layout="constrained")
    axes = figure.subplots()
    accuracy = "accuracy" in metric
    _draw_methods(axes, found, metric, 100 if accuracy else 1, None)
    finish_axes(axes, metric.replace("_", " ") + (" (%)" if accuracy else ""))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, handlelength=4)
    return figure


def plot_run(records: list[dict], path: str | Path, *, title: str = "", watched: Sequence[Watch] = ()) -> Figure:
    """Draws one run: accuracy (of language models perplexity), losses, and what the method wants seen.

    Args:
      records: of a run, see `runs.records`.
      path: image file; its ending chooses the format (.png, .pdf, .svg).
      title: above all panels.
      watched: what its method wants seen, see `watch`.
    """
    seen = [*(watch for watch in watched if watch.label), _AGREEMENT]
    seen = [watch for watch in seen if len(_series(records, watch.metric)[0])]
    count = 3 if seen else 2
    figure = Figure(figsize=(4.6 * count, 4.6), layout="constrained")
    if title:
        figure.suptitle(title, fontsize="medium", x=0.01, horizontalalignment="left", parse_math=False)
    panels = list(figure.subplots(1, count))
    if of_language_model(records):
        _draw_perplexities(panels[0], records)
    elif _of_numbers(records):
        _draw_line(panels[0], records, "test_r2", 0, "global model, whole test set")
        finish_axes(panels[0], "R²")
    else:
        _draw_accuracies(panels[0], records)
    _draw_line(panels[1], records, "train_loss", 1, "training (mean over examples)")
    _draw_line(panels[1], records, "test_loss", 0, "test (global model)")
    finish_axes(panels[1], "loss (nats)")
    for index, watch in enumerate(seen):
        _draw_line(panels[-1], records, watch.metric, index, watch.label)
    for watch in seen:
        if watch.limit is not None:
            label = f"{watch.label} that risks divergence"
            panels[-1].axhline(watch.limit, color="0.4", linewidth=1, linestyle=":", label=label)
    if seen:
        finish_axes(panels[-1], "mutations and updates (no unit)")
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small")
    save(figure, path)
    return figure


def of_language_model(records: list[dict]) -> bool:
    """Whether perplexities were recorded."""
    return any("perplexity" in record.get("personal", {}) for record in records)


def _of_numbers(records: list[dict]) -> bool:
    """Whether numbers were predicted, not classes."""
    return any("test_r2" in record for record in records)


def _draw_accuracies(axes: Axes, records: list[dict]) -> None:
    _draw_band(axes, records, "client_accuracy", 100, "clients' label mixtures")
    _draw_extreme(axes, records, "client_accuracy/min", 100, "worst client's label mixture")
    _draw_line(axes, records, "test_accuracy", 0, "global model, whole test set", 100)
    _draw_views(axes, records, "accuracy", 100)
    finish_axes(axes, "test accuracy (%)")


def _draw_perplexities(axes: Axes, records: list[dict]) -> None:
    _draw_band(axes, records, "personal/perplexity", 1, "clients")
    _draw_extreme(axes, records, "personal/perplexity/max", 1, "worst client")
    rounds, losses = _series(records, "test_loss", gaps=True)
    if len(rounds):
        with np.errstate(over="ignore"):
            axes.plot(rounds, np.exp(losses), label="global model, common test set", **_marked(0, len(rounds)))
    _draw_views(axes, records, "perplexity", 1)
    finish_axes(axes, "perplexity")


def _draw_views(axes: Axes, records: list[dict], quantity: str, scale: float) -> None:
    """The clients' own models on their own tests, where there are any."""
    aggregated, tuned = (f"{view}/{quantity}/mean" for view in record_numbers.VIEWS)
    _draw_line(axes, records, aggregated, 2, "mean over clients' own tests, aggregated", scale)
    both = [np.stack(_series(records, view, gaps=True)) for view in (aggregated, tuned)]
    if not np.array_equal(*both, equal_nan=True):
        _draw_line(axes, records, tuned, 4, "mean over clients' own tests, tuned", scale)


def _draw_methods(axes: Axes, found: list[Method], key: str, scale: float, window: int | None) -> None:
    """Draws `key` of all methods into one panel; a line breaks where a seed's number was not finite."""
    longest = max(len(_series(run.records, key, gaps=True)[0]) for method in found for run in method.runs)
    width = window or max(1, longest // _SMOOTHED_TO)
    for index, method in enumerate(found):
        rounds, values = _over_seeds(method, key, width)
        style = curve_style(index)
        if len(method.runs) > 1:
            mean, std = scale * values.mean(axis=0), scale * values.std(axis=0, ddof=1)
            axes.fill_between(rounds, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
        seeds = f"{len(method.runs)} seed{'s' if len(method.runs) > 1 else ''}"
        label = textwrap.fill(f"{method.label} ({seeds})", 110).replace("$", r"\$")  # a name is no formula
        spacing = max(1, len(rounds) // _MARKED)
        marked = (index * spacing // len(found), spacing)  # staggered, so that markers of close curves do not pile up
        axes.plot(rounds, scale * values.mean(axis=0), label=label, markevery=marked, **style)
    if width > 1:
        unit = "rounds" if key == "train_loss" else "evaluations"
        axes.set_title(f"each point: mean of the last {width} {unit}", fontsize="small", loc="left")


def _over_seeds(method: Method, key: str, width: int) -> tuple[Int[np.ndarray, "R"], Float[np.ndarray, "seeds R"]]:
    """Smoothed values of each seed at the rounds in which all seeds were measured; NaN where one was not finite."""
    series = [_series(run.records, key, gaps=True) for run in method.runs]
    common = reduce(np.intersect1d, [rounds for rounds, _ in series])
    return common, np.stack([_smoothed(values, width)[np.isin(rounds, common)] for rounds, values in series])


def _series(
    records: list[dict], key: str, *, gaps: bool = False
) -> tuple[Int[np.ndarray, "R"], Float[np.ndarray, "R"]]:
    """Rounds in which `key` was recorded as a finite number, and its values there; with `gaps` also NaN where it was not."""
    found = [(record["round"], record_numbers.value(record, key)) for record in records]
    present = [(at, value) for at, value in found if value is not None and (gaps or math.isfinite(value))]
    rounds, values = zip(*present, strict=True) if present else ((), ())
    return np.array(rounds, int), np.array(values, float)


def _smoothed(values: Float[np.ndarray, "R"], width: int) -> Float[np.ndarray, "R"]:
    """Mean of the last `width` values up to each one, of fewer at the beginning; NaN where one of them is."""
    return np.array([values[max(end - width, 0) : end].mean() for end in range(1, len(values) + 1)])


def _draw_band(axes: Axes, records: list[dict], key: str, scale: float, label: str) -> None:
    """The band that holds the middle 80 % of the clients; it breaks where either side was not finite."""
    (rounds, low), (others, high) = (_series(records, f"{key}/{quantile}", gaps=True) for quantile in ("q10", "q90"))
    both, of_low, of_high = np.intersect1d(rounds, others, return_indices=True)
    low, high = scale * low[of_low], scale * high[of_high]
    if np.isfinite(high - low).any():
        axes.fill_between(both, low, high, color="0.85", label=f"{label}, 10 % to 90 %")


def _draw_extreme(axes: Axes, records: list[dict], key: str, scale: float, label: str) -> None:
    rounds, values = _series(records, key, gaps=True)
    if np.isfinite(values).any():
        axes.plot(rounds, scale * values, color="0.5", linewidth=1, linestyle=":", label=label)


def _draw_line(axes: Axes, records: list[dict], key: str, index: int, label: str, scale: float = 1) -> None:
    """A line that breaks where the number was not finite."""
    rounds, values = _series(records, key, gaps=True)
    if np.isfinite(values).any():
        axes.plot(rounds, scale * values, label=label, **_marked(index, len(rounds)))


def _marked(index: int, points: int) -> dict[str, Any]:
    return {"markevery": max(1, points // _MARKED), **curve_style(index)}


def curve_style(index: int) -> dict[str, Any]:
    """Colour, line and marker all change from curve to curve: print and colour-blind readers can tell them apart."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def finish_axes(axes: Axes, quantity: str) -> None:
    """Labels, ticks and grid of a panel over rounds."""
    axes.set(xlabel="round", ylabel=quantity)
    axes.xaxis.set_major_locator(whole_ticks())
    style_axes(axes)


def whole_ticks() -> MaxNLocator:
    """Ticks at whole numbers only, by 1, 2, 5, 10, …"""
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def save(figure: Figure, path: str | Path | io.BytesIO) -> None:
    """Writes a figure; a letter of a name that the font lacks is drawn as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=150)


def style_axes(axes: Axes) -> None:
    """A faint grid behind the curves, and no frame on the sides without a scale."""
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_columns(found: list[Method]) -> int:
    """As many columns as fit a figure's width at about 130 characters a line."""
    longest = max(len(method.label) for method in found) + 18  # the line sample and the number of seeds
    return max(1, min(len(found), 4, 140 // longest))
