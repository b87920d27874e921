"""The Hessian of the training loss: its leading eigenvalues and its trace.

Source: Lanczos 1950, with full reorthogonalisation; Hutchinson 1989, "A stochastic estimator of the trace of the influence
matrix", with Rademacher probes. Both need the Hessian only as products with vectors. (JAX's own `lobpcg_standard` finds the
largest eigenvalues only; Lanczos sees both ends of the spectrum with the same products.)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from fedjax_qp.federated import Model
from fedjax_qp.instruments.directions import on_sphere
from fedjax_qp.instruments.drawing import curve_style, new_figure, place_legend, style_axes
from fedjax_qp.instruments.objective import Objective, flat, hessian_product
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject
from fedjax_qp.quadratic import full_precision
from fedjax_qp.reports.plots import whole_ticks

Product = Callable[[Float[Array, "P"]], Float[Array, "P"]]


class Tridiagonal(NamedTuple):
    """What Lanczos leaves: a symmetric tridiagonal matrix with eigenvalues near the extreme ones of the large matrix."""

    diagonal: Float[Array, "k"]
    beside: Float[Array, "k"]  # the last one is the length of what is left over, not an entry


class Spectrum(NamedTuple):
    """Ritz values, ascending, and the norms of their residuals ‖Hx − λx‖: that near there is an eigenvalue."""

    values: Float[np.ndarray, "k"]
    residuals: Float[np.ndarray, "k"]


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Eigenvalues and trace of the Hessian over the sample of training examples.

    Returns:
      "largest" and "smallest" eigenvalues with "…_residuals", and the trace's
      estimates ("probes"), mean ("trace") and standard error ("trace_error").
    """
    model, trainable = subject.run.experiment.model, subject.params.trainable
    entries = sum(np.size(leaf) for leaf in jax.tree.leaves(trainable))
    key = jax.random.key(settings.seed)
    steps = min(settings.krylov, entries)
    recurrence, probes = _measure(
        model, subject.objective, trainable, key, steps, settings.probes, min(settings.lanes, settings.probes)
    )
    found = spectrum(jax.device_get(recurrence))
    probes = np.asarray(probes, float)
    count = min(settings.eigenvalues, len(found.values))
    return {
        "largest": found.values[::-1][:count].tolist(),
        "largest_residuals": found.residuals[::-1][:count].tolist(),
        "smallest": found.values[:count].tolist(),
        "smallest_residuals": found.residuals[:count].tolist(),
        "entries": entries,
        "trace": float(probes.mean()),
        "trace_error": float(probes.std(ddof=1) / np.sqrt(len(probes))),
        "probes": probes.tolist(),
    }


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table."""
    return {
        "largest Hessian eigenvalue": result["largest"][0],
        "smallest Hessian eigenvalue": result["smallest"][0],
        "Hessian trace": result["trace"],
        "its standard error": result["trace_error"],
    }


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws the eigenvalues at both ends, and how the estimate of the trace settles."""
    figure, (ends, settling) = new_figure(2, title)
    for index, (name, label) in enumerate((("largest", "largest"), ("smallest", "smallest"))):
        style = curve_style(index, linestyle="none")
        ranks = np.arange(1, len(result[name]) + 1)
        ends.errorbar(ranks, result[name], yerr=result[f"{name}_residuals"], capsize=3, label=label, **style)
    ends.axhline(0, color="0.4", linewidth=1, linestyle=":")
    ends.set(xlabel="rank", ylabel="Hessian eigenvalue (nats; bars: residual)", xticks=ranks)
    probes = np.array(result["probes"])
    counts = np.arange(2, len(probes) + 1)
    means = np.array([probes[:count].mean() for count in counts])
    errors = np.array([probes[:count].std(ddof=1) / np.sqrt(count) for count in counts])
    settling.fill_between(counts, means - errors, means + errors, color="0.85", label="± one standard error")
    settling.plot(counts, means, label="mean of the probes so far", **curve_style(0, marker=""))
    settling.set(xlabel="Rademacher probes", ylabel="Hessian trace (nats)")
    settling.xaxis.set_major_locator(whole_ticks())
    for axes in (ends, settling):
        style_axes(axes)
        place_legend(axes, 2)
    figure.savefig(path, dpi=150)
    return figure


def lanczos(product: Product, start: Float[Array, "P"], steps: int) -> Tridiagonal:
    """Lanczos' recurrence, every new vector made orthogonal to all earlier ones, twice.

    Args:
      product: of the symmetric matrix with a vector.
      start: of norm 1.
      steps: k, at most P.
    """

    def step(index: Array, carry: tuple) -> tuple:
        basis, diagonal, beside = carry
        vector = product(basis[index])
        diagonal = diagonal.at[index].set(vector @ basis[index])
        for _ in range(2):  # once leaves what rounding put back
            vector = vector - basis.T @ (basis @ vector)
        length = jnp.linalg.norm(vector)
        # An invariant subspace is found: what is left is rounding noise, and `spectrum` stops there.
        vector = jnp.where(length > 0, vector / jnp.where(length > 0, length, 1), 0)
        return basis.at[index + 1].set(vector), diagonal, beside.at[index].set(length)

    basis = jnp.zeros((steps + 1, len(start)), start.dtype).at[0].set(start)
    empty = jnp.zeros(steps, start.dtype)
    _, diagonal, beside = jax.lax.fori_loop(0, steps, step, (basis, empty, empty))
    return Tridiagonal(diagonal, beside)


def spectrum(recurrence: Tridiagonal) -> Spectrum:
    """Ritz values and residuals of Lanczos' matrix, cut where it found an invariant subspace."""
    diagonal, beside = (np.asarray(values, np.float64) for values in recurrence)
    scale = max(np.abs(diagonal).max(), np.abs(beside).max())
    found = np.flatnonzero(beside <= 1e-6 * scale)
    size = int(found[0]) + 1 if len(found) else len(diagonal)
    matrix = np.diag(diagonal[:size]) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return Spectrum(values, np.abs(beside[size - 1] * vectors[-1]))


def hutchinson(
    product: Product, like: Float[Array, "P"], key: Key[Array, ""], probes: int, lanes: int
) -> Float[Array, "probes"]:
    """Unbiased estimates zᵀHz of the trace, one for each Rademacher vector z."""

    def of_probe(key: Key[Array, ""]) -> Float[Array, ""]:
        probe = jax.random.rademacher(key, like.shape, like.dtype)
        return probe @ product(probe)

    return jax.lax.map(of_probe, jax.random.split(key, probes), batch_size=lanes)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
@full_precision
def _measure(
    model: Model, objective: Objective, trainable: PyTree, key: Key[Array, ""], steps: int, probes: int, lanes: int
) -> tuple[Tridiagonal, Float[Array, "probes"]]:
    shape = ravel_pytree(trainable)[1]

    def product(vector: Float[Array, "P"]) -> Float[Array, "P"]:
        return flat(hessian_product(model, objective, trainable, shape(vector)))

    start_key, probe_key = jax.random.split(key)
    start = flat(on_sphere(start_key, trainable))
    return lanczos(product, start, steps), hutchinson(product, start, probe_key, probes, lanes)
