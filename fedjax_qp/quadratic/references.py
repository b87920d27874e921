"""Several references (QP-3): the nearest mutation with an acute angle to each of R directions.

Source: Lopez-Paz & Ranzato 2017 (GEM), "Gradient episodic memory for continual learning", for the dual problem with
ε = c = 0; references, offsets and the regularisation ε are our formulation. Only Gram matrices are needed: the dual has
R variables however large the model is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_qp.quadratic.geometry import Report, accepted_residual, full_precision, prepared
from fedjax_qp.quadratic.solver import STABILISER, Structure, minimise

PENALTY_RANGE = (1e-4, 1e3)  # the eigenvalues of nearly parallel references spread far
POLISHING_STEPS = 2


class _Spectrum(NamedTuple):
    """The eigen-decomposition of the dual's Hessian, with which its systems are solved for every ρ."""

    vectors: Float[Array, "R R"]
    values: Float[Array, "R"]


@full_precision
def referenced(
    gram: Float[Array, "R R"],
    projections: Float[Array, "M R"],
    *,
    margin_offsets: float | Float[Array, "R"] = 0.0,
    epsilon: float | Float[Array, ""] = 1e-3,
    valid: Bool[Array, "R"] | None = None,
    active: Bool[Array, "M"] | None = None,
) -> tuple[Float[Array, "M R"], Report]:
    """QP-3: min_{v ≥ 0} ½vᵀ(CCᵀ + εI)v + vᵀ(Cr_i − c); the corrected mutation is x_i = r_i + Cᵀv_i.

    Then ⟨C_k, x_i⟩ ≥ c_k − ε·v_ik for every valid reference, with equality where v_ik > 0.

    Args:
      gram: CCᵀ of the unit-norm references; rows and columns that are not valid are ignored.
      projections: Cr_i of the mutations, in the units of the mutations.
      margin_offsets: c, in the units of `projections`; scales with α‖g‖.
      epsilon: ε; about 1e-3 keeps float32 solvable when references are nearly parallel.
      valid: which references exist (all, unless given); drop those of norm 0 here.
      active: which mutants are corrected (all, unless given); the multipliers of the others are 0.

    Returns:
      The multipliers v_i, and how the solver did. There is no closed form: where it failed, v_i is the best iterate.
    """
    projections, gram, active = prepared(projections, gram, active)
    valid = jnp.ones(gram.shape[0], bool) if valid is None else jnp.asarray(valid)
    hessian = jnp.where(jnp.outer(valid, valid), gram, 0) + jnp.diag(jnp.where(valid, epsilon, 1).astype(gram.dtype))
    violations = jnp.where(valid, projections - margin_offsets, 0)
    size = jnp.max(jnp.abs(violations), axis=1, keepdims=True)
    size = jnp.where(size > 0, size, 1)  # the solver sees problems of unit size
    linear = violations / size

    multipliers, iterations = _solve(hessian, linear, valid)
    multipliers, residual = jax.vmap(_polished, in_axes=(None, 0, 0))(hessian, linear, multipliers)
    failed = ~(residual <= accepted_residual(gram.dtype))
    report = Report(jnp.where(active, residual, 0), jnp.where(active, iterations, 0), active & failed)
    return jnp.where(active[:, None], size * multipliers, 0), report


def _solve(
    hessian: Float[Array, "R R"], linear: Float[Array, "M R"], valid: Bool[Array, "R"]
) -> tuple[Float[Array, "M R"], Int[Array, "M"]]:
    values, vectors = jnp.linalg.eigh(hessian)
    values = jnp.maximum(values, 0)

    def inverse(parameters: tuple, penalty: Float[Array, ""], b: Float[Array, "R"]) -> Float[Array, "R"]:
        _, spectrum = parameters
        return spectrum.vectors @ ((b @ spectrum.vectors) / (spectrum.values + STABILISER + penalty))

    structure = Structure(lambda parameters, v: parameters[0] @ v, lambda _, v: v, inverse)
    # The best ρ for bounds on the variables themselves is √(λ_min λ_max): Ghadimi et al. 2015.
    penalty = jnp.sqrt(jnp.maximum(values[0], 1e-4 * values[-1]) * values[-1])
    upper = jnp.where(valid, jnp.inf, 0).astype(hessian.dtype)

    def solve(linear: Float[Array, "R"]) -> tuple[Float[Array, "R"], Int[Array, ""]]:
        solution = minimise(
            structure,
            (hessian, _Spectrum(vectors, values)),
            linear,
            jnp.zeros_like(linear),
            upper,
            start=jax.nn.relu(-linear),
            penalty=penalty,
            penalty_range=PENALTY_RANGE,
        )
        return jnp.where(valid, jax.nn.relu(solution.primal), 0), solution.iterations

    return jax.vmap(solve)(linear)


def _residual(hessian: Float[Array, "R R"], linear: Float[Array, "R"], v: Float[Array, "R"]) -> Float[Array, ""]:
    """Of v ≥ 0, Hv + linear ≥ 0 and their complementarity, relative to the size of v (`linear` has size 1).

    Multipliers beyond 1,000 do not loosen the tolerance further: they come from references that contradict
    each other, without regularisation.
    """
    return jnp.max(jnp.abs(jnp.minimum(v, hessian @ v + linear))) / jnp.clip(jnp.max(v), 1, 1e3)


def _polished(
    hessian: Float[Array, "R R"], linear: Float[Array, "R"], v: Float[Array, "R"]
) -> tuple[Float[Array, "R"], Float[Array, ""]]:
    """Guesses which references push and solves for their multipliers exactly, twice; keeps the best.

    Source: Stellato et al. 2020, section 5.2 (polishing).
    """

    def refine(_: int, carry: tuple) -> tuple:
        v, best, smallest = carry
        pushing = v > hessian @ v + linear
        matrix = jnp.where(jnp.outer(pushing, pushing), hessian, jnp.eye(len(v), dtype=v.dtype))
        refined = jax.nn.relu(jnp.linalg.solve(matrix, jnp.where(pushing, -linear, 0)))
        v = jnp.where(jnp.isfinite(refined).all(), refined, v)
        residual = _residual(hessian, linear, v)
        better = residual < smallest
        return v, jnp.where(better, v, best), jnp.where(better, residual, smallest)

    return jax.lax.fori_loop(0, POLISHING_STEPS, refine, (v, v, _residual(hessian, linear, v)))[1:]
