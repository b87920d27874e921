"""What the instruments' figures share. Matplotlib's objects only, no pyplot; colours and lines as in `plots`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedjax_qp.reports import plots
from fedjax_qp.reports.plots import style_axes

__all__ = ["DIVERGING", "SEQUENTIAL", "curve_style", "new_figure", "place_legend", "style_axes"]

SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both read alike with and without colour blindness


def curve_style(index: int, **changes: Any) -> dict[str, Any]:
    """As in `plots`, with changes."""
    return {**plots.curve_style(index), **changes}


def new_figure(panels: int, title: str, *, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    """A row of panels under a title."""
    figure = Figure(figsize=(5.2 * panels, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    figure.suptitle(title, fontsize="medium", x=0.01, horizontalalignment="left", parse_math=False)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def place_legend(axes: Axes, columns: int = 1) -> None:
    """A legend above the panel, where it hides nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small", ncols=columns)
