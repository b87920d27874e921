"""The whole cohort at once (QP-4): every mutant in the fan, the cohort's mean exactly at the wanted drift.

Our formulation. It is the one form that needs a solver: M·L variables y_il = √p_l·c_il/α. The equality is eliminated
rather than handed over: y = centred(x) + mean, and a centred x is all that the solver iterates on.

What is kept of the solution is the fan's multipliers λ_i. For given λ the layers decouple, and c_·l is the point of
the box with the wanted mean that is nearest to α(v_·l + λ), found exactly. So the mean and the box hold to rounding for
every layer, however small its share; where p_l = 0 this is the definition of its coefficients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedjax_qp.quadratic.geometry import Report, accepted_residual, full_precision, prepared
from fedjax_qp.quadratic.solver import STABILISER, Structure, minimise

PENALTY = 2.0  # first ρ
POLISHING_STEPS = 2


class _Problem(NamedTuple):
    """QP-4 in units of α."""

    signs: Float[Array, "M L"]  # 0 in idle rows
    shares: Float[Array, "L"]
    target: Float[Array, ""]  # smallest progress Σ_l p_l c_il of an active mutant
    mean: Float[Array, ""]  # mean coefficient over the active mutants
    active: Float[Array, "M"]  # 1 or 0
    count: Float[Array, ""]  # of active mutants, at least 1


class _Recovered(NamedTuple):
    """What follows from multipliers of the fan."""

    unclipped: Float[Array, "M L"]  # v + λ + ν, whose clipping to [−1, 1] is the solution
    coefficients: Float[Array, "M L"]
    slack: Float[Array, "M"]  # of the fan
    residual: Float[Array, ""]


@full_precision
def joint(
    signs: Float[Array, "M L"],
    shares: Float[Array, "L"],
    *,
    alpha: float | Float[Array, ""],
    margin: float | Float[Array, ""],
    drift: float | Float[Array, ""],
    active: Bool[Array, "M"] | None = None,
) -> tuple[Float[Array, "M L"], Report]:
    """QP-4: min ½Σ_i Σ_l p_l(c_il − αv_i^l)² s.t. Σ_l p_l c_il ≥ τα, (1/M)Σ_i c_il = drift, |c_il| ≤ α.

    Our formulation. The mean is over all M members, because that is what averaging multiplies the last global update
    by; idle members (FedMut's odd, unmutated one) count in it with 0 and in nothing else. `joint_feasible_range` gives
    the drifts that can be reached. Out of it the answer keeps the box and is otherwise as near as the solver came, and
    `failed` is set.

    Args:
      signs: v_i^l in [−1, 1].
      shares: p_l.
      alpha: length of a mutation in units of the global update.
      margin: τ.
      drift: μ, the mean coefficient of every layer.
      active: which mutants are corrected (all, unless given); the coefficients of the others are 0.

    Returns:
      The coefficients c_il, and how the solver did (one problem: the same entry for every mutant).
    """
    signs, shares, active = prepared(signs, shares, active)
    problem = _problem(signs, shares, alpha, margin, drift, active)
    multipliers, iterations = _fan_multipliers(problem)
    multipliers = _polished(problem, multipliers)
    recovered = _recover(problem, multipliers)
    failed = ~(recovered.residual <= accepted_residual(signs.dtype))
    report = Report(recovered.residual, iterations, failed)
    return alpha * recovered.coefficients, jax.tree.map(lambda entry: jnp.broadcast_to(entry, active.shape), report)


def _problem(
    signs: Float[Array, "M L"],
    shares: Float[Array, "L"],
    alpha: float | Float[Array, ""],
    margin: float | Float[Array, ""],
    drift: float | Float[Array, ""],
    active: Bool[Array, "M"],
) -> _Problem:
    count = jnp.maximum(active.sum(), 1).astype(signs.dtype)
    # Where α = 0 the result is 0 whatever is solved: a mean of 1 is solved at once.
    mean = jnp.where(alpha > 0, drift * len(active) / (count * jnp.where(alpha > 0, alpha, 1)), 1)
    target = jnp.where(shares.sum() > 0, jnp.asarray(margin, signs.dtype), -1)  # nothing to ask for without an update
    active = active.astype(signs.dtype)
    return _Problem(signs * active[:, None], shares, target, mean.astype(signs.dtype), active, count)


def _fan_multipliers(problem: _Problem) -> tuple[Float[Array, "M"], Int[Array, ""]]:
    """Solves the problem and returns λ."""
    gradient = jnp.sqrt(problem.shares)  # the direction of g in the variables y

    def centred(active: Float[Array, "M"], x: Float[Array, "M L"]) -> Float[Array, "M L"]:
        return active[:, None] * (x - active @ x / problem.count)

    def constraints(parameters: tuple, x: Float[Array, "M L"]) -> tuple[Float[Array, "M"], Float[Array, "M L"]]:
        gradient, active = parameters
        y = centred(active, x)
        return y @ gradient, y

    def inverse(parameters: tuple, penalty: Float[Array, ""], b: Float[Array, "M L"]) -> Float[Array, "M L"]:
        # On centred matrices, where b lies, the operator is diagonal·I + penalty·(· gradient) gradientᵀ.
        gradient, active = parameters
        diagonal = 1 + STABILISER + penalty
        b = centred(active, b)
        along = penalty * (b @ gradient) / (diagonal + penalty * (gradient @ gradient))
        return (b - along[:, None] * gradient) / diagonal

    def solve(problem: _Problem) -> tuple[Float[Array, "M"], Int[Array, ""]]:
        wanted = centred(problem.active, gradient * problem.signs)
        box = jnp.outer(problem.active, gradient)
        lower = (problem.active * (problem.target - problem.mean * (gradient @ gradient)), -(1 + problem.mean) * box)
        upper = (jnp.full_like(problem.active, jnp.inf), (1 - problem.mean) * box)
        structure = Structure(lambda parameters, x: centred(parameters[1], x), constraints, inverse)
        parameters = (gradient, problem.active)
        solution = minimise(structure, parameters, -wanted, lower, upper, start=wanted, penalty=PENALTY)
        return jax.nn.relu(-solution.dual[0]), solution.iterations

    one = jax.tree.map(lambda leaf: leaf[None], problem)
    return jax.tree.map(lambda leaf: leaf[0], jax.vmap(solve)(one))


def _recover(problem: _Problem, multipliers: Float[Array, "M"]) -> _Recovered:
    """The coefficients that belong to λ, and the KKT residual: of the fan and the mean, all else holds exactly."""
    raised = problem.signs + multipliers[:, None]
    unclipped = raised + _level(problem, raised)
    coefficients = problem.active[:, None] * jnp.clip(unclipped, -1, 1)
    slack = coefficients @ problem.shares - problem.target
    fan = jnp.max(problem.active * jnp.abs(jnp.minimum(multipliers, slack)))
    off = jnp.max(jnp.sqrt(problem.shares) * jnp.abs(problem.active @ coefficients / problem.count - problem.mean))
    return _Recovered(unclipped, coefficients, slack, jnp.maximum(fan, jnp.where(problem.active.any(), off, 0)))


def _level(problem: _Problem, raised: Float[Array, "M L"]) -> Float[Array, "L"]:
    """ν_l with Σ_i clip(raised_il + ν_l, −1, 1) = count·mean over the active rows, exactly.

    The sum is piecewise linear in ν; it bends where an entry leaves −1 and where it reaches 1.
    """
    ends = jnp.concatenate([-1 - raised, 1 - raised])
    bends = jnp.concatenate([problem.active, -problem.active])[:, None] * jnp.ones_like(ends)
    ends, bends = jax.lax.sort((ends, bends), dimension=0, num_keys=1)
    slopes = jnp.cumsum(bends, axis=0)
    rises = jnp.cumsum(slopes[:-1] * jnp.diff(ends, axis=0), axis=0)
    sums = jnp.concatenate([jnp.zeros_like(rises[:1]), rises]) - problem.count
    wanted = problem.count * problem.mean
    piece = jnp.maximum((sums <= wanted).sum(axis=0) - 1, 0)[None]
    start, height, slope = (jnp.take_along_axis(table, piece, axis=0)[0] for table in (ends, sums, slopes))
    return start + (wanted - height) / jnp.maximum(slope, 1)


def _polished(problem: _Problem, multipliers: Float[Array, "M"]) -> Float[Array, "M"]:
    """Guesses which constraints are active and solves for λ exactly, twice; keeps the best.

    Source: Stellato et al. 2020, section 5.2 (polishing), on the dual after elimination of box and mean.
    """

    def refine(_: int, carry: tuple) -> tuple:
        multipliers, best, smallest = carry
        recovered = _recover(problem, multipliers)
        better = recovered.residual < smallest
        best, smallest = jnp.where(better, multipliers, best), jnp.where(better, recovered.residual, smallest)
        return _newton(problem, multipliers, recovered), best, smallest

    # The last step's answer is never measured in a loop of POLISHING_STEPS, hence one more.
    start = (multipliers, multipliers, jnp.full((), jnp.inf, multipliers.dtype))
    return jax.lax.fori_loop(0, POLISHING_STEPS + 1, refine, start)[1]


def _newton(problem: _Problem, multipliers: Float[Array, "M"], recovered: _Recovered) -> Float[Array, "M"]:
    """The λ that meets the fan with equality in the rows that need one, given the entries that are clipped now."""
    free = problem.active[:, None] * (jnp.abs(recovered.unclipped) < 1)
    weights = problem.shares / jnp.maximum(free.sum(axis=0), 1)
    # How the fan's progress answers to λ, while ν keeps the mean of every layer.
    response = jnp.diag(free @ problem.shares) - (free * weights) @ free.T
    tight = (recovered.slack < multipliers) & (problem.active > 0)
    # Raising all λ alike changes nothing, ν undoes it: a ridge of rounding size picks one solution.
    ridge = 10 * jnp.finfo(multipliers.dtype).eps * (1e-3 + jnp.trace(response))
    matrix = jnp.where(tight[:, None], response, 0) + jnp.diag(jnp.where(tight, ridge, 1))
    step = jnp.linalg.solve(matrix, jnp.where(tight, -recovered.slack, -multipliers))
    refined = jax.nn.relu(multipliers + step)
    # A singular guess leaves λ where it is; more than 4 exceeds what the box allows.
    return jnp.where(jnp.isfinite(refined), jnp.minimum(refined, multipliers + 4), multipliers)
