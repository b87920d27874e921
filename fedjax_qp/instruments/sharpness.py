"""How much the training loss rises at a distance from the checkpoint.

Four kinds of directions at each radius ρ, so that every method is measured with the same yardstick:

* random: uniform on the sphere of radius ρ; mean over samples;
* filter: Li et al. 2018's filter-normalised directions times ρ: every filter is moved by the share ρ of its norm, so the
  measure does not change where a ReLU net's layers are scaled against each other;
* adversarial: w + ρ·∇L/‖∇L‖ (SAM; Foret et al. 2021, "Sharpness-Aware Minimization", equation 2), and several steps of
  ascent on the sphere, of which the worst counts;
* mutation: FedMut's signs (β = 0) on the global update, scaled to length ρ; mean over samples.

Besides, at the method's own mutants w_i, at their own lengths: mean and largest of L(w_i) − L(w).
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fedjax_qp.federated import Model
from fedjax_qp.instruments import mutations
from fedjax_qp.instruments.directions import filter_normalised, on_sphere, sign_mutations
from fedjax_qp.instruments.drawing import curve_style, new_figure, place_legend, style_axes
from fedjax_qp.instruments.objective import Objective, gradient, loss, losses_at, norm, scaled
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject, global_update, update_number
from fedjax_qp.quadratic import full_precision

SAMPLED = {
    "random": "random, on the sphere",
    "filter": "random, filter-normalised",
    "mutation": "FedMut's signs on g",
}
_BALANCED = ("mutation",)  # as many of each sign, so the samples are not independent
ADVERSARIAL = {"adversarial": "adversarial, one step", "ascent": "adversarial, several steps"}


class _Losses(NamedTuple):
    centre: Float[Array, ""]
    sampled: dict[str, Float[Array, "R S"]]
    adversarial: Float[Array, "R"]  # after one step
    ascent: Float[Array, "R"]  # the worst of all steps


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Rises of the mean loss over the sample of training examples.

    Returns:
      "radii"; of each kind "mean" and "error" (standard error over independent samples; None for the others), lists over the
      radii; "mutants", the rises at the method's own ("before" and "after" the QP), and their mean "lengths" in ‖g‖.
    """
    model, trainable = subject.run.experiment.model, subject.params.trainable
    key = jax.random.key(settings.seed)
    found = jax.device_get(
        _measure(
            model,
            subject.objective,
            trainable,
            global_update(subject),
            np.array(settings.radii, np.float32),
            key,
            settings.samples,
            settings.ascent_steps,
            settings.lanes,
        )
    )
    kinds: dict[str, Any] = {}
    for name, losses in found.sampled.items():
        rises = np.asarray(losses, float) - float(found.centre)
        errors = (rises.std(1, ddof=1) / np.sqrt(settings.samples)).tolist()
        kinds[name] = {"mean": rises.mean(1).tolist(), "error": None if name in _BALANCED else errors}
    for name in ADVERSARIAL:
        rises = np.asarray(getattr(found, name), float) - float(found.centre)
        kinds[name] = {"mean": rises.tolist(), "error": None}
    assert subject.update is not None
    result = {"centre": float(found.centre), "radii": list(settings.radii), "kinds": kinds}
    result |= {"update_source": subject.update.source, "mutants": None}
    if mutations.exist(subject):
        result["mutants"] = _at_mutants(subject, settings, float(found.centre))
    return result


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table: every kind at every radius, and the method's own mutants."""
    found = {
        f"rise, {name}, ρ = {radius:g}": result["kinds"][name]["mean"][index]
        for name in (*SAMPLED, *ADVERSARIAL)
        for index, radius in enumerate(result["radii"])
    }
    for name, rises in (result["mutants"] or {}).items():
        found[f"rise at own mutants {name} the QP (mean)"] = float(np.mean(rises))
        found[f"rise at own mutants {name} the QP (largest)"] = float(np.max(rises))
    return found | update_number(result["update_source"])


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws rise against radius, and the rises at the method's own mutants where it has any."""
    figure, panels = new_figure(2 if result["mutants"] else 1, title)
    radii = np.array(result["radii"])
    for index, (name, label) in enumerate((SAMPLED | ADVERSARIAL).items()):
        values, style = result["kinds"][name], curve_style(index)
        panels[0].errorbar(radii, values["mean"], yerr=values["error"], capsize=3, label=label, **style)
    panels[0].set(xscale="log", xlabel="radius ρ (‖ε‖; filter: share of a filter's norm)", ylabel="rise of loss (nats)")
    means = [value for kind in result["kinds"].values() for value in kind["mean"]]
    panels[0].set_yscale("symlog", linthresh=1e-3)
    panels[0].set_ylim(min(-1e-3, 2 * min(means)), max(1e-3, 2 * max(means)))
    panels[0].set_xticks(radii, [f"{radius:g}" for radius in radii])
    panels[0].xaxis.set_minor_locator(NullLocator())
    if result["mutants"]:
        for index, (name, label) in enumerate((("before", "as drawn"), ("after", "as the method uses them"))):
            rises, style = np.sort(result["mutants"][name]), curve_style(index)
            panels[1].plot(np.arange(1, len(rises) + 1), rises, label=label, **style)
        panels[1].set(xlabel="mutant, sorted by its rise", ylabel="rise of loss at own mutants (nats)")
    for axes in panels:
        axes.axhline(0, color="0.4", linewidth=1, linestyle=":")
        style_axes(axes)
        place_legend(axes, 2)
    figure.savefig(path, dpi=150)
    return figure


def sam_step(model: Model, objective: Objective, trainable: PyTree, radius: Float[Array, ""] | float) -> PyTree:
    """SAM's adversarial move ε = ρ·∇L(w)/‖∇L(w)‖; zero where the gradient is."""
    return _unit(gradient(model, objective, trainable), radius)


def _ascent(
    model: Model, objective: Objective, trainable: PyTree, radius: Float[Array, ""], steps: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Losses after SAM's step and at the worst of several: ε ← ρ·unit(ε + ρ·unit(∇L(w + ε)))."""

    def at(move: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, trainable, move)

    def step(index: Array, carry: tuple) -> tuple:
        move, first, worst = carry
        ascent = sam_step(model, objective, at(move), radius)
        move = _unit(jax.tree.map(jnp.add, move, ascent), radius)
        value = loss(model, objective, at(move))
        return move, jnp.where(index == 0, value, first), jnp.maximum(worst, value)

    none, low = jax.tree.map(jnp.zeros_like, trainable), jnp.full((), -jnp.inf)
    _, first, worst = jax.lax.fori_loop(0, steps, step, (none, low, low))
    return first, worst


def _unit(tree: PyTree, length: Float[Array, ""] | float) -> PyTree:
    size = norm(tree)
    return scaled(tree, jnp.where(size > 0, length / jnp.where(size > 0, size, 1), 0))


@partial(jax.jit, static_argnums=(0, 6, 7, 8))
@full_precision
def _measure(
    model: Model,
    objective: Objective,
    trainable: PyTree,
    update: PyTree,
    radii: Float[Array, "R"],
    key: Key[Array, ""],
    samples: int,
    ascent_steps: int,
    lanes: int,
) -> _Losses:
    trainable, update = jax.tree.map(jnp.asarray, (trainable, update))
    size = norm(update)
    along_update = scaled(
        sign_mutations(jax.random.fold_in(key, samples), update, samples), jnp.where(size > 0, 1 / size, 0)
    )

    def at_sample(index: Array) -> dict[str, Float[Array, "R"]]:
        sample = jax.random.fold_in(key, index)
        ways = {
            "random": on_sphere(sample, trainable),
            "filter": filter_normalised(sample, trainable),
            "mutation": jax.tree.map(lambda leaf: leaf[index], along_update),
        }

        def at_radius(way: PyTree, radius: Array) -> Float[Array, ""]:
            return loss(model, objective, jax.tree.map(lambda leaf, move: leaf + radius * move, trainable, way))

        return {name: jax.vmap(partial(at_radius, way))(radii) for name, way in ways.items()}

    sampled = jax.lax.map(at_sample, jnp.arange(samples), batch_size=max(1, lanes // len(radii)))
    first, worst = jax.lax.map(lambda radius: _ascent(model, objective, trainable, radius, ascent_steps), radii)
    return _Losses(loss(model, objective, trainable), jax.tree.map(lambda leaf: leaf.T, sampled), first, worst)


def _at_mutants(subject: Subject, settings: Settings, centre: float) -> dict[str, list[float]]:
    model, trainable = subject.run.experiment.model, subject.params.trainable
    rises = {}
    for name, rows in mutations.of_next_round(subject)._asdict().items():
        one_each = np.eye(len(jax.tree.leaves(rows)[0]), dtype=np.float32)
        losses = losses_at(model, subject.objective, trainable, (rows, one_each), settings.lanes)
        rises[name] = (np.asarray(losses, float) - centre).tolist()
    return rises
