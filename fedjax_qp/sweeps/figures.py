"""The figures of a sweep: curves of the best trials, and the value over the searched fields."""

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fedjax_qp.reports.plots import curve_style, finish_axes
from fedjax_qp.sweeps.results import Row, scale_and_unit, short_names, shortened
from fedjax_qp.sweeps.space import Range, Rank, Sweep, Variant
from fedjax_qp.sweeps.stopping import Curve, Curves
from fedjax_qp.sweeps.trials import Store

_BEST = 6  # curves that can still be told apart
_MOST_CELLS = 12  # values of a field in a heat map
_COLOURS = colormaps["cividis"]  # made for colour-blind readers, and even in grey


def plot_curves(store: Store, rows: Sequence[Row], curves: Curves, path: Path) -> Figure:
    """Draws the best trials, of every variant at least one: mean over seeds, band of ± one standard deviation.

    Args:
      rows: from `results.summarise`, the best first.
      path: image file; its ending chooses the format.
    """
    scale, unit = scale_and_unit(store.sweep.rank)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(_chosen(rows)):
        of_seeds = [curves.curve(store.run_folder(row.trial, seed)) for seed in store.sweep.seeds]
        _draw_curve(
            axes, index, f"{row.label} (trial {row.trial.number})", [curve for curve in of_seeds if curve], scale
        )
    finish_axes(axes, f"{store.sweep.rank.metric}{unit}")
    count = len(store.sweep.seeds)
    axes.set_title(f"best trials, {count} seed{'s' if count > 1 else ''}", fontsize="small", loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small", handlelength=4)
    figure.savefig(path, dpi=150)
    return figure


def plot_space(sweep: Sweep, rows: Sequence[Row], path: Path) -> Figure | None:
    """Draws the value over the searched fields, a panel for each variant; None where no field was varied.

    One field gives points with error bars, two a heat map (where their values form a grid) or points in colour, more
    parallel coordinates. Trials without a value are left out.
    """
    panels = []
    for variant in sweep.every_variant():
        found = [row for row in rows if row.trial.point.variant == variant.name and row.value is not None]
        fields = [field for field in variant.space if len(_levels(found, field)) > 1]
        if fields:
            panels.append((variant, found, fields))
    if not panels:
        return None
    figure = Figure(figsize=(8, 4.6 * len(panels)), layout="constrained")
    for axes, (variant, found, fields) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw = {1: _draw_line, 2: _draw_two}.get(len(fields), _draw_parallel)
        draw(figure, axes, variant, found, fields, sweep.rank)
        axes.set_title(variant.name, fontsize="medium", loc="left", parse_math=False)
    figure.savefig(path, dpi=150)
    return figure


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """The best of each variant, then the best of all, in order."""
    valued = [row for row in rows if row.value is not None]
    of_variant = {row.trial.point.variant: row for row in reversed(valued)}  # the best one is written last
    rest = [row for row in valued if of_variant[row.trial.point.variant] is not row]
    chosen = [*of_variant.values(), *rest][: max(_BEST, len(of_variant))]
    return [row for row in valued if row in chosen]


def _draw_curve(axes: Axes, index: int, label: str, of_seeds: Sequence[Curve], scale: float) -> None:
    if not of_seeds:
        return
    rounds = reduce(np.intersect1d, [[round for round, _ in curve] for curve in of_seeds])
    values = scale * np.array([[dict(curve)[round] for round in rounds] for curve in of_seeds])
    style = curve_style(index)
    mean = values.mean(axis=0)
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(rounds, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(rounds, mean, label=label.replace("$", r"\$"), markevery=max(1, len(rounds) // 8), **style)


# --- panels over fields -----------------------------------------------------------------------------------------------


def _draw_line(
    figure: Figure, axes: Axes, variant: Variant, rows: Sequence[Row], fields: Sequence[str], rank: Rank
) -> None:
    scale = scale_and_unit(rank)[0]
    places, ticks = _places(rows, fields[0])
    means = [scale * row.value.mean for row in rows if row.value is not None]
    stds = [scale * (row.value.std or 0) for row in rows if row.value is not None]
    axes.errorbar(places, means, yerr=stds, fmt="o", capsize=3, **{"color": curve_style(0)["color"]})
    _set_axis(axes, "x", variant, fields[0], ticks)
    axes.set(xlabel=fields[0], ylabel=_quantity(rank))
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_two(
    figure: Figure, axes: Axes, variant: Variant, rows: Sequence[Row], fields: Sequence[str], rank: Rank
) -> None:
    across, down = (_levels(rows, field) for field in fields)
    cells = len(across) * len(down)
    grid_like = max(len(across), len(down)) <= _MOST_CELLS and 2 * len(rows) >= cells
    (_draw_heat_map if grid_like else _draw_points)(figure, axes, variant, rows, fields, rank)


def _draw_heat_map(
    figure: Figure, axes: Axes, variant: Variant, rows: Sequence[Row], fields: Sequence[str], rank: Rank
) -> None:
    scale = scale_and_unit(rank)[0]
    across, down = (_levels(rows, field) for field in fields)
    values = np.full((len(down), len(across)), np.nan)
    for row in rows:
        if row.value is not None:
            place = [levels.index(_level(row, field)) for levels, field in zip((across, down), fields, strict=True)]
            values[place[1], place[0]] = scale * row.value.mean
    image = axes.imshow(values, cmap=_COLOURS, aspect="auto", origin="lower")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(x, y, f"{value:.4g}", ha="center", va="center", color="black" if value > middle else "white")
    axes.set_xticks(range(len(across)), [shortened(level) for level in across])
    axes.set_yticks(range(len(down)), [shortened(level) for level in down])
    axes.set(xlabel=fields[0], ylabel=fields[1])
    figure.colorbar(image, ax=axes, label=_quantity(rank))


def _draw_points(
    figure: Figure, axes: Axes, variant: Variant, rows: Sequence[Row], fields: Sequence[str], rank: Rank
) -> None:
    (x, x_ticks), (y, y_ticks) = (_places(rows, field) for field in fields)
    points = axes.scatter(x, y, c=_values(rows, rank), cmap=_COLOURS, s=60, edgecolors="0.4")
    _set_axis(axes, "x", variant, fields[0], x_ticks)
    _set_axis(axes, "y", variant, fields[1], y_ticks)
    axes.set(xlabel=fields[0], ylabel=fields[1])
    figure.colorbar(points, ax=axes, label=_quantity(rank))


def _draw_parallel(
    figure: Figure, axes: Axes, variant: Variant, rows: Sequence[Row], fields: Sequence[str], rank: Rank
) -> None:
    """Parallel coordinates: a line for each trial, coloured by its value; the best are drawn last."""
    heights = np.stack([_heights(axes, place, rows, variant, field) for place, field in enumerate(fields)])
    colours, values = _colours(rows, rank), _values(rows, rank)
    for index in np.argsort([rank.sign * value for value in values]):
        axes.plot(
            range(len(fields)),
            heights[:, index],
            color=colours.get_cmap()(colours.norm(values[index])),
            linewidth=1.5,
            alpha=0.8,
        )
    axes.set_xticks(range(len(fields)), list(short_names(fields).values()))
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(fields) - 0.4)
    axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=axes, label=_quantity(rank))


def _heights(axes: Axes, place: int, rows: Sequence[Row], variant: Variant, field: str) -> np.ndarray:
    """Where each trial crosses one of the parallel axes (0 to 1); draws that axis with its values."""
    places, ticks = _places(rows, field)
    logarithmic = ticks is None and _is_log(variant, field)
    numbers = np.log(places) if logarithmic else np.asarray(places, float)
    low, span = numbers.min(), np.ptp(numbers)
    marks = dict(enumerate(ticks)) if ticks is not None else {}
    if ticks is None:
        marks = {value: shortened(value) for value in (min(places), max(places))}
    axes.axvline(place, color="0.6", linewidth=1)
    for value, text in marks.items():
        height = ((math.log(value) if logarithmic else value) - low) / span
        axes.text(place + 0.03, height, text, fontsize="small", va="center")
    return (numbers - low) / span


def _quantity(rank: Rank) -> str:
    return f"{rank.metric}, last {rank.last}{scale_and_unit(rank)[1]}"


def _values(rows: Sequence[Row], rank: Rank) -> list[float]:
    return [scale_and_unit(rank)[0] * row.value.mean for row in rows if row.value is not None]


def _colours(rows: Sequence[Row], rank: Rank) -> ScalarMappable:
    values = _values(rows, rank)
    return ScalarMappable(Normalize(min(values), max(values)), _COLOURS)


def _level(row: Row, field: str) -> Any:
    value = row.trial.point.settings[field]
    return value if isinstance(value, int | float | str) else str(value)


def _levels(rows: Sequence[Row], field: str) -> list[Any]:
    """The different values of a field, numbers in order, others as they come."""
    found = list(dict.fromkeys(_level(row, field) for row in rows))
    return sorted(found) if all(_is_number(level) for level in found) else found


def _places(rows: Sequence[Row], field: str) -> tuple[list[float], list[str] | None]:
    """Where each trial stands on a field's axis, with the names of the places if they are not numbers."""
    levels = _levels(rows, field)
    if all(_is_number(level) for level in levels):
        return [_level(row, field) for row in rows], None
    return [float(levels.index(_level(row, field))) for row in rows], [shortened(level) for level in levels]


def _is_number(level: Any) -> bool:
    return isinstance(level, int | float) and not isinstance(level, bool)


def _is_log(variant: Variant, field: str) -> bool:
    dimension = variant.space[field]
    return isinstance(dimension, Range) and dimension.log


def _set_axis(axes: Axes, which: str, variant: Variant, field: str, ticks: list[str] | None) -> None:
    if ticks is not None:
        axes.set(**{f"{which}ticks": range(len(ticks)), f"{which}ticklabels": ticks})
    elif _is_log(variant, field):
        axes.set(**{f"{which}scale": "log"})
