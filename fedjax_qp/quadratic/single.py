"""One mutant at a time: the nearest mutation in the fan around g (QP-1), and inside FedMut's box (QP-2).

Both are solved in the variables y_l = √p_l·c_l/α, in which the distance is Euclidean and every problem is of unit size.
What is kept of the solution is the fan's multiplier λ. The coefficients follow from it, c_l = α(v_l + λ), clipped in
QP-2, also for layers whose share is so small that y says nothing about them; where p_l = 0 this is their definition.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_qp.quadratic.geometry import Report, accepted_residual, full_precision, prepared
from fedjax_qp.quadratic.solver import STABILISER, Structure, minimise

# Settings of the solver. With a single constraint a fixed ρ contracts evenly, and over-relaxation only slows it down.
UNBOXED: dict[str, Any] = {"penalty": 2.0, "penalty_range": (2.0, 2.0), "relaxation": 1.0}
BOXED: dict[str, Any] = {"penalty": 1.0}


@full_precision
def nearest(
    signs: Float[Array, "M L"],
    shares: Float[Array, "L"],
    *,
    alpha: float | Float[Array, ""],
    margin: float | Float[Array, ""],
    active: Bool[Array, "M"] | None = None,
) -> tuple[Float[Array, "M L"], Report]:
    """QP-1: min ½‖x − r_i‖² subject to ⟨x, g⟩ ≥ c_i‖g‖².

    Source: FedQP (SEKE 2024, arXiv 2411.15847) for margin 0, the nearest acute mutation. Margins above it are our
    formulation: c_i is the point where the ray r_i + λg meets the fan of cosine τ around g, hence
    λ_i = α[τ√(ρ_i² − s_i²)/√(1 − τ²) − s_i]₊ with s_i = Σ_l p_l v_i^l and ρ_i² = Σ_l p_l (v_i^l)². The result is the
    nearest point of the half space through that point, not of the cone.

    Args:
      signs: v_i^l; FedMut's are 1 or −1 + β.
      shares: p_l.
      alpha: length of a mutation in units of the global update.
      margin: τ, the smallest cosine with the global update.
      active: which mutants are corrected (all, unless given); the coefficients of the others are 0.

    Returns:
      The coefficients c_i^l, and how the solver did.
    """
    signs, shares, active = prepared(signs, shares, active)
    margin = jnp.asarray(margin, signs.dtype)
    progress = signs @ shares
    spread = jnp.sqrt(jnp.square(signs - progress[:, None]) @ shares)  # √(ρ² − s²), without the cancellation
    slope = margin / jnp.sqrt(jnp.maximum((1 - margin) * (1 + margin), jnp.finfo(signs.dtype).eps))
    target = slope * spread
    scale = jnp.maximum(target, 1)  # a narrow fan asks for long mutations; the solver sees problems of unit size

    def residual(multiplier: Float[Array, "M"]) -> Float[Array, "M"]:
        slack = (signs + multiplier[:, None]) @ shares - target
        return jnp.abs(jnp.minimum(multiplier, slack)) / scale

    solved, iterations = _fan_multipliers(signs / scale[:, None], shares, target / scale, boxed=False)
    multiplier, report = _checked(solved * scale, jax.nn.relu(target - progress), iterations, residual, active)
    return alpha * jnp.where(active[:, None], signs + multiplier[:, None], 0), report


@full_precision
def boxed(
    signs: Float[Array, "M L"],
    shares: Float[Array, "L"],
    *,
    alpha: float | Float[Array, ""],
    margin: float | Float[Array, ""],
    active: Bool[Array, "M"] | None = None,
) -> tuple[Float[Array, "M L"], Report]:
    """QP-2: min ½Σ_l p_l(c_l − αv_i^l)² subject to Σ_l p_l c_l ≥ τα and |c_l| ≤ α.

    Our formulation. τ bounds the inner product; nothing in the box is longer than α‖g‖, so the cosine is ≥ τ too.

    Args:
      signs: v_i^l in [−1, 1].
      shares: p_l.
      alpha: length of a mutation in units of the global update.
      margin: τ.
      active: which mutants are corrected (all, unless given); the coefficients of the others are 0.

    Returns:
      The coefficients c_i^l, and how the solver did.
    """
    signs, shares, active = prepared(signs, shares, active)
    target = jnp.where(shares.sum() > 0, jnp.asarray(margin, signs.dtype), -1)  # nothing to ask for without an update
    target = jnp.broadcast_to(target, active.shape)

    def coefficients(multiplier: Float[Array, "M"]) -> Float[Array, "M L"]:
        return jnp.clip(signs + multiplier[:, None], -1, 1)

    def residual(multiplier: Float[Array, "M"]) -> Float[Array, "M"]:
        return jnp.abs(jnp.minimum(multiplier, coefficients(multiplier) @ shares - target))

    def polished(multiplier: Float[Array, "M"]) -> Float[Array, "M"]:
        # Source: Stellato et al. 2020, section 5.2. Exact, if the right entries are clipped and the fan is tight.
        unclipped = signs + multiplier[:, None]
        free = (unclipped < 1) @ shares
        missing = target - coefficients(multiplier) @ shares
        refined = jax.nn.relu(multiplier + missing / jnp.where(free > 0, free, 1))
        return jnp.where(residual(refined) < residual(multiplier), refined, multiplier)

    solved, iterations = _fan_multipliers(signs, shares, target, boxed=True)
    solved = polished(polished(solved))
    closed = jax.vmap(_boxed_multiplier, in_axes=(0, None, 0))(signs, shares, target)
    multiplier, report = _checked(solved, closed, iterations, residual, active)
    return alpha * jnp.where(active[:, None], coefficients(multiplier), 0), report


def _boxed_multiplier(
    signs: Float[Array, "L"], shares: Float[Array, "L"], target: Float[Array, ""]
) -> Float[Array, ""]:
    """The smallest λ ≥ 0 with Σ_l p_l min(v_l + λ, 1) ≥ target, exactly.

    The left side is the smallest of the lines that hold the layers with the least room, 1 − v_l, at 1 and move the
    others, so λ is the largest of the lines' solutions. For FedMut's signs it makes all backward layers
    max(−1 + β, (τ − p₊)/(1 − p₊)), p₊ being the share of the forward ones.
    """
    room = 1 - signs
    order = jnp.argsort(room)
    moving = jnp.cumsum(shares[order][::-1])[::-1]
    missing = jnp.cumsum((shares * room)[order][::-1])[::-1]  # by how much the moving layers stay below 1
    solutions = (missing - (1 - target)) / jnp.where(moving > 0, moving, 1)
    return jax.nn.relu(jnp.max(jnp.where(moving > 0, solutions, 0)))


def _fan_multipliers(
    signs: Float[Array, "M L"], shares: Float[Array, "L"], target: Float[Array, "M"], *, boxed: bool
) -> tuple[Float[Array, "M"], Int[Array, "M"]]:
    """Solves min ½‖y − √p v‖² subject to ⟨√p, y⟩ ≥ target, and |y_l| ≤ √p_l if boxed, for every mutant."""
    gradient = jnp.sqrt(shares)  # the direction of g in the variables y
    wanted = gradient * signs

    settings = BOXED if boxed else UNBOXED

    def constraints(gradient: Float[Array, "L"], y: Float[Array, "L"]) -> tuple:
        return (y @ gradient, y) if boxed else (y @ gradient,)

    def inverse(gradient: Float[Array, "L"], penalty: Float[Array, ""], b: Float[Array, "L"]) -> Float[Array, "L"]:
        # Sherman–Morrison: the matrix is diagonal·I + penalty·gradient gradientᵀ.
        diagonal = 1 + STABILISER + (penalty if boxed else 0)
        along = penalty * (b @ gradient) / (diagonal + penalty * (gradient @ gradient))
        return (b - along * gradient) / diagonal

    structure = Structure(lambda _, y: y, constraints, inverse)

    def solve(wanted: Float[Array, "L"], target: Float[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        lower, upper = (target,), (jnp.full_like(target, jnp.inf),)
        if boxed:
            lower, upper = (*lower, -gradient), (*upper, gradient)
        solution = minimise(structure, gradient, -wanted, lower, upper, start=wanted, **settings)
        return jax.nn.relu(-solution.dual[0]), solution.iterations

    return jax.vmap(solve)(wanted, target)


def _checked(
    solved: Float[Array, "M"],
    closed: Float[Array, "M"],
    iterations: Int[Array, "M"],
    residual: Callable,
    active: Bool[Array, "M"],
) -> tuple[Float[Array, "M"], Report]:
    """Takes the solver's multipliers, or the closed form's where the solver's miss the accepted residual."""
    failed = active & ~(residual(solved) <= accepted_residual(solved.dtype))
    multiplier = jnp.where(failed, closed, solved)
    return multiplier, Report(jnp.where(active, residual(multiplier), 0), jnp.where(active, iterations, 0), failed)
