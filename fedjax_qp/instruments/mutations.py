"""Angles of a round's mutations to the global update, before and after the correction by the quadratic program.

Source: FedMut (Hu et al. 2024) draws the mutations; FedQP (SEKE 2024, arXiv 2411.15847) replaces each by the nearest one at
an acute angle. "Before" are the mutations that FedMut draws from the same key, server and options.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from fedjax_qp.algorithms.fedmut import MutationServer, Shared, start_model
from fedjax_qp.engine.plan import sample_cohort
from fedjax_qp.federated import Cohort, round_keys
from fedjax_qp.instruments.drawing import curve_style, new_figure, place_legend, style_axes
from fedjax_qp.instruments.objective import flat
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject
from fedjax_qp.quadratic import full_precision


class Mutations(NamedTuple):
    """What is added to the global model for each client of a cohort, trees with leading axis [M]."""

    before: PyTree
    after: PyTree


class _Angles(NamedTuple):
    cosine: Float[Array, "draws M"]  # with g
    length: Float[Array, "draws M"]  # in units of ‖g‖


def exist(subject: Subject) -> bool:
    """Whether the clients of the next round start from mutations: the method mutates, and there is a global update."""
    return subject.run.fedmut is not None and subject.round > 0


def of_next_round(subject: Subject) -> Mutations:
    """The mutations that the clients of the next round start from."""
    key = round_keys(jax.random.key(subject.run.experiment.config.seed), subject.state.round).dispatch
    server, cohort = subject.state.server, _cohort(subject)
    before, after = (_drawn(dispatch, server, cohort, key) for dispatch in _dispatches(subject))
    return Mutations(*jax.device_get((before, after)))


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Angles and lengths of `settings.draws` cohorts of mutations at a checkpoint.

    Returns:
      "degrees_before", "degrees_after" and "length_before", "length_after" (in units of ‖g‖), lists over the
      mutants that have an angle. Left out are mutations drawn as zero (the odd client's), and of "after" those that the
      correction makes zero (any −c·g), whose number is "corrected_to_nothing".
    """
    assert isinstance(subject.state.server, MutationServer)
    keys = jax.random.split(jax.random.key(settings.seed), settings.draws)
    dispatches, server, cohort = _dispatches(subject), subject.state.server, _cohort(subject)
    found = [jax.device_get(_angles(dispatch, server, cohort, keys)) for dispatch in dispatches]
    cosines, lengths = (np.asarray(values, float).reshape(2, -1) for values in zip(*found, strict=True))
    moved = lengths > 1e-6 * lengths.max(initial=0)
    result: dict[str, Any] = {"corrected_to_nothing": int((moved[0] & ~moved[1]).sum())}
    for name, kept, cosine, length in zip(("before", "after"), (moved[0], moved.all(0)), cosines, lengths, strict=True):
        result[f"degrees_{name}"] = np.degrees(np.arccos(np.clip(cosine[kept], -1, 1))).tolist()
        result[f"length_{name}"] = length[kept].tolist()
    return result


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table."""
    found = {"mutations corrected to nothing (number)": float(result["corrected_to_nothing"])}
    for name in ("before", "after"):
        degrees, length = np.array(result[f"degrees_{name}"]), np.array(result[f"length_{name}"])
        if not len(degrees):
            continue
        found[f"acute mutations {name} the QP (share)"] = float((degrees <= 90 + 1e-3).mean())
        found[f"mean angle {name} the QP (degrees)"] = float(degrees.mean())
        found[f"mean length {name} the QP (‖g‖)"] = float(length.mean())
    return found


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws both histograms over the angle, and length against angle."""
    figure, (histogram, lengths) = new_figure(2, title)
    edges = np.arange(-2.5, 183, 5)  # the right angle in the middle of a bar: many corrected mutations end there
    for index, (name, label) in enumerate((("before", "as drawn by FedMut"), ("after", "after the correction"))):
        degrees, style = result[f"degrees_{name}"], curve_style(index)
        histogram.hist(
            degrees, bins=edges.tolist(), color=style["color"], alpha=0.55 if index == 0 else 1, label=label,
            histtype="stepfilled" if index == 0 else "step", linewidth=2, linestyle=style["linestyle"],
        )  # fmt: skip
        lengths.plot(
            degrees, result[f"length_{name}"], linestyle="none", marker="os"[index], markersize=4 + 2 * index,
            markerfacecolor="none" if index else style["color"], markeredgecolor=style["color"], label=label,
        )  # fmt: skip
    for axes, quantity in ((histogram, "number of mutations"), (lengths, "length of a mutation (‖g‖)")):
        axes.axvline(90, color="0.4", linewidth=1, linestyle=":")
        axes.set(xlabel="angle to the global update g (degrees)", ylabel=quantity, xlim=(0, 180), ylim=(0, None))
        axes.set_xticks(range(0, 181, 30))
        style_axes(axes)
        place_legend(axes)
    figure.savefig(path, dpi=150)
    return figure


def _cohort(subject: Subject) -> Cohort:
    return sample_cohort(subject.run.experiment.work, subject.round)


def _dispatches(subject: Subject) -> tuple[Callable, Callable]:
    """FedMut's dispatch with the run's options, and the run's own."""
    assert subject.run.fedmut is not None
    return subject.run.fedmut.dispatch, subject.run.experiment.algorithm.dispatch


def _mutations(dispatch: Callable, server: MutationServer, cohort: Cohort, key: Key[Array, ""]) -> PyTree:
    """Start models minus the global one, trees with leading axis [M], not by subtraction: nothing is rounded away."""
    shared, own, _ = dispatch(server, cohort, key)
    origin = shared.params._replace(trainable=jax.tree.map(jnp.zeros_like, shared.params.trainable))
    return jax.vmap(start_model, (None, 0))(Shared(origin, shared.update, shared.directions), own)


_drawn = jax.jit(_mutations, static_argnums=0)


@partial(jax.jit, static_argnums=0)
@full_precision
def _angles(dispatch: Callable, server: MutationServer, cohort: Cohort, keys: Key[Array, "draws"]) -> _Angles:
    update = flat(server.update)
    size = jnp.linalg.norm(update)

    def of_draw(key: Key[Array, ""]) -> _Angles:
        rows = jax.vmap(flat)(_mutations(dispatch, server, cohort, key))
        lengths = jnp.linalg.norm(rows, axis=1)
        product = lengths * size
        return _Angles(rows @ update / jnp.where(product > 0, product, 1), lengths / jnp.where(size > 0, size, 1))

    return jax.lax.map(of_draw, keys)
