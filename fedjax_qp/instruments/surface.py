"""The training loss along lines and in planes through the checkpoint.

Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets": random directions with filter normalisation. Further
directions: the global update g, and the mutations of FedMut and FedQP. For a method that has none, the mutations are what
FedMut with α = 1 and β = 0 would draw from its g, so that all methods are cut along the same kind of line.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedjax_qp.instruments import mutations
from fedjax_qp.instruments.directions import filter_normalised, sign_mutations
from fedjax_qp.instruments.drawing import SEQUENTIAL, curve_style, place_legend, style_axes
from fedjax_qp.instruments.objective import losses_at
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject, global_update, update_number

_REACH = 1.25  # lines and planes of mutations go this far beyond the mutant


class _Frame(NamedTuple):
    """The plane of the global update and a mutation r, spanned by unit vectors e1 = g/‖g‖ and e2."""

    size: float  # ‖g‖
    along: float  # ⟨r, e1⟩
    across: float  # ⟨r, e2⟩; 0 where r is parallel to g and spans no plane

    def across_row(self, update: Float[np.ndarray, "D"], mutation: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D"]:
        """Coefficients of ‖g‖·e2, from those of g and r."""
        if self.across == 0:
            return np.zeros_like(update)
        return self.size / self.across * (mutation - self.along / self.size * update)

    def place(self, move: PyTree, update: PyTree, mutation: PyTree) -> list[float]:
        """Coordinates of a move, or of its projection onto the plane, in units of ‖g‖."""
        if self.size == 0:
            return [0.0, 0.0]
        along = _dot(move, update) / self.size
        across = (_dot(move, mutation) - along * self.along) / self.across if self.across > 0 else 0.0
        return [along / self.size, across / self.size]


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Mean losses over the sample of training examples.

    Returns:
      "centre", the loss at the checkpoint; "lines", of each kind ("random", "update", "drawn", "corrected") its "steps" and
      "losses" (one list per line); "planes" ("random", "update") with "first" and "second" coordinates and "losses", a
      list over the second coordinate of lists over the first. Steps are in units of the direction; the coordinates of the
      plane of updates in units of ‖g‖.
    """
    model, trainable = subject.run.experiment.model, subject.params.trainable
    update = global_update(subject)
    drawn, corrected, own = _mutations(subject, settings)
    randoms = _random_directions(trainable, settings)
    stacks = {"random": randoms, "update": _alone(update), "drawn": drawn, "corrected": corrected}
    rows = _unit_rows(stacks)
    frame = _frame(update, _row(drawn, 0))
    steps = {name: _reach(name) * np.linspace(-1, 1, settings.points) for name in stacks}
    side = np.linspace(-1, 1, settings.grid)
    wide = _plane_reach(frame) * side
    across_update = frame.across_row(rows["update"][0], rows["drawn"][0])
    # One stack of directions and one list of points, hence one program.
    cuts = {name: _along(rows[name][: settings.lines], steps[name]) for name in stacks}
    cuts["random plane"] = _grid(side, rows["random"][0], rows["random"][1])
    cuts["update plane"] = _grid(wide, rows["update"][0], across_update)
    directions = jax.tree.map(lambda *parts: np.concatenate(parts), *stacks.values())
    points = np.concatenate(list(cuts.values())).astype(np.float32)
    losses = np.asarray(losses_at(model, subject.objective, trainable, (directions, points), settings.lanes), float)
    found = dict(zip(cuts, np.split(losses, np.cumsum([len(cut) for cut in cuts.values()])[:-1]), strict=True))

    def plane(name: str, axis: Float[np.ndarray, "G"]) -> dict[str, Any]:
        values = found[name].reshape(len(axis), len(axis))
        return {"first": axis.tolist(), "second": axis.tolist(), "losses": values.tolist()}

    places = {"drawn": frame.place(_row(drawn, 0), update, _row(drawn, 0))}
    places["corrected"] = frame.place(_row(corrected, 0), update, _row(drawn, 0))
    assert subject.update is not None
    return {
        "centre": float(found["random"][settings.points // 2]),
        "update_source": subject.update.source,
        "update_norm": frame.size,
        "own_mutations": own,
        "lines": {
            name: {"steps": steps[name].tolist(), "losses": found[name].reshape(-1, settings.points).tolist()}
            for name in stacks
        },
        "planes": {"random": plane("random plane", side), "update": plane("update plane", wide) | places},
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table: how much the loss rises at half the filters' length, one g ahead and one g back."""

    def rise(name: str, place: float) -> float:
        line = result["lines"][name]
        return float(np.mean([np.interp(place, line["steps"], losses) for losses in line["losses"]])) - result["centre"]

    return {
        "loss at the checkpoint": result["centre"],
        "rise at half a filter's norm (mean of lines, ±)": (rise("random", -0.5) + rise("random", 0.5)) / 2,
        "rise at w + g": rise("update", 1.0),
        "rise at w − g": rise("update", -1.0),
        "rise at the mutants shown": rise("corrected", 1.0),
        **update_number(result["update_source"]),
    }


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws three panels of lines and two planes."""
    figure = Figure(figsize=(15.5, 9.4), layout="constrained")
    figure.suptitle(title, fontsize="medium", x=0.01, horizontalalignment="left", parse_math=False)
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.15))
    randoms, update, mutants = top.subplots(1, 3)
    lines, kind = result["lines"], "own" if result["own_mutations"] else "FedMut's"
    for index, losses in enumerate(lines["random"]["losses"]):
        style = curve_style(index, marker="")
        randoms.plot(lines["random"]["steps"], losses, label=f"direction {index + 1}", **style)
    randoms.set(xlabel="step (1 = as long as each filter)", ylabel="training loss (nats)")
    g = "last" if result["update_source"] == "last" else "next"
    line = lines["update"]
    update.plot(line["steps"], line["losses"][0], label=f"along g, the {g} global update", **curve_style(0))
    update.set(xlabel=f"step (‖g‖ = {result['update_norm']:.3g})", ylabel="training loss (nats)")
    _draw_mutants(mutants, lines, kind)
    for axes in (randoms, update, mutants):
        axes.axvline(0, color="0.4", linewidth=1, linestyle=":")
        style_axes(axes)
        place_legend(axes, 3)
    planes = result["planes"]
    filters, updates = bottom.subplots(1, 2)
    _draw_plane(bottom, filters, planes["random"])
    filters.plot(0, 0, marker="*", markersize=13, color="white", markeredgecolor="black", linestyle="none", label="w")
    filters.set(xlabel="first random direction (1 = as long as each filter)", ylabel="second random direction")
    _draw_plane(bottom, updates, planes["update"])
    _draw_places(updates, planes["update"], result["update_source"], kind)
    updates.set(xlabel="along g (‖g‖)", ylabel="across g, towards a mutation (‖g‖)")
    for axes in (filters, updates):
        place_legend(axes, 4)
    figure.savefig(path, dpi=130)
    return figure


def _draw_mutants(axes: Axes, lines: dict[str, Any], kind: str) -> None:
    same = np.allclose(lines["drawn"]["losses"], lines["corrected"]["losses"])
    names = (("drawn", f"{kind} mutations"),) if same else (("drawn", "as drawn"), ("corrected", "corrected"))
    for index, (name, label) in enumerate(names):
        style = curve_style(index, marker="")
        for number, losses in enumerate(lines[name]["losses"]):
            axes.plot(lines[name]["steps"], losses, label=label if number == 0 else None, **style)
    axes.axvline(1, color="0.4", linewidth=1, linestyle="--", label="the mutant")
    axes.set(xlabel="step (1 = the mutant)", ylabel="training loss (nats)")


def _draw_plane(figure: Any, axes: Axes, plane: dict[str, Any]) -> None:
    losses = np.array(plane["losses"])
    # Far out the loss explodes; the colours are spent on what lies within five times the rise from centre to median.
    low, middle = losses.min(), float(np.median(losses))
    high = min(losses.max(), low + 5 * max(middle - low, 1e-12))
    shown = np.minimum(losses, high)
    levels = np.linspace(low, max(high, low + 1e-9), 16)
    colours = axes.contourf(plane["first"], plane["second"], shown, levels=levels, cmap=SEQUENTIAL)
    axes.contour(plane["first"], plane["second"], shown, levels=levels[::3], colors="white", linewidths=0.6)
    capped = ", capped" if high < losses.max() else ""
    bar = figure.colorbar(colours, ax=axes, label=f"training loss (nats{capped})")
    bar.locator = MaxNLocator(6)
    bar.update_ticks()


def _draw_places(axes: Axes, plane: dict[str, Any], source: str, kind: str) -> None:
    other = (-1, "w before g") if source == "last" else (1, "w after g")
    places = [((0, 0), "w", "*"), ((other[0], 0), other[1], "s"), (plane["drawn"], f"{kind} mutant", "o")]
    if not np.allclose(plane["drawn"], plane["corrected"], atol=1e-3):
        places.append((plane["corrected"], "corrected", "D"))
    for (x, y), label, marker in places:
        axes.plot(
            x, y, marker=marker, markersize=13 if marker == "*" else 8, color="white", markeredgecolor="black",
            linestyle="none", label=label, clip_on=False,
        )  # fmt: skip


def _random_directions(trainable: PyTree, settings: Settings) -> PyTree:
    """Filter-normalised directions, [max(2, lines), ...]: a plane needs two."""
    keys = jax.random.split(jax.random.key(settings.seed), max(2, settings.lines))
    return jax.device_get(jax.jit(jax.vmap(filter_normalised, (0, None)))(keys, trainable))


def _mutations(subject: Subject, settings: Settings) -> tuple[PyTree, PyTree, bool]:
    """Some mutations as drawn and as corrected, [lines, ...]; and whether they are the method's own."""
    if mutations.exist(subject):
        found, own = mutations.of_next_round(subject), True
    else:
        draw = jax.jit(sign_mutations, static_argnums=2)
        drawn = draw(jax.random.key(settings.seed), global_update(subject), settings.lines)
        found, own = mutations.Mutations(drawn, drawn), False
    before, after = (jax.tree.map(lambda leaf: np.asarray(leaf)[: settings.lines], tree) for tree in found)
    return before, after, own


def _reach(name: str) -> float:
    """How far a line goes, in units of its direction."""
    return {"random": 1.0, "update": 2.0}.get(name, _REACH)


def _unit_rows(stacks: dict[str, PyTree]) -> dict[str, Float[np.ndarray, "n D"]]:
    """For each stack of directions, the coefficients that give its members among all D."""
    sizes = [len(jax.tree.leaves(tree)[0]) for tree in stacks.values()]
    parts = np.split(np.eye(sum(sizes)), np.cumsum(sizes)[:-1])
    return dict(zip(stacks, parts, strict=True))


def _along(rows: Float[np.ndarray, "n D"], steps: Float[np.ndarray, "S"]) -> Float[np.ndarray, "nS D"]:
    """The points of n lines."""
    return (rows[:, None] * steps[:, None]).reshape(-1, rows.shape[1])


def _grid(axis: Float[np.ndarray, "G"], first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "GG D"]:
    """The points of a plane, the first coordinate running fastest."""
    return (axis[:, None, None] * second + axis[:, None] * first).reshape(-1, len(first))


def _frame(update: PyTree, mutation: PyTree) -> _Frame:
    size = float(np.sqrt(_dot(update, update)))
    along = _dot(mutation, update) / size if size > 0 else 0.0
    across = float(np.sqrt(max(_dot(mutation, mutation) - along**2, 0.0)))
    return _Frame(size, along, across if across > 1e-3 * size else 0.0)


def _plane_reach(frame: _Frame) -> float:
    """Half the side of the plane of updates in units of ‖g‖: it holds w^{r−1} and the mutation."""
    furthest = max(abs(frame.along), abs(frame.across)) / frame.size if frame.size > 0 else 0.0
    return _REACH * max(1.0, furthest)


def _dot(first: PyTree, second: PyTree) -> float:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return sum(float(np.vdot(np.asarray(a, float), np.asarray(b, float))) for a, b in pairs)


def _row(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _alone(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], tree)
