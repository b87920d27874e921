"""The quadratic-program solver: jaxopt's OSQP, told the structure of our problems. The only file that imports jaxopt.

Source: Stellato et al. 2020, "OSQP: an operator splitting solver for quadratic programs", as jaxopt.BoxOSQP has it:
min ½xᵀQx + cᵀx subject to lower ≤ Ax ≤ upper. Two parts of it are replaced, and nothing else:

* the linear system (Q + σI + ρAᵀA)x = b of every iteration. All our problems have an exact inverse in closed form,
  where jaxopt would run conjugate gradients in a loop inside the loop, or factorise a dense matrix for each new ρ.
* the rule for the penalty ρ. Ours balances the absolute residuals, because the problems come scaled to unit size and
  the tolerance is absolute; jaxopt's relative rule divides 0 by 0 where Ax = 0.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

with warnings.catch_warnings():
    # jaxopt 0.8.5 is its last release and says so at import.
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

TOLERANCE = 1e-6  # on the residuals of the unit-size problem
MAX_ITERATIONS = 400
STABILISER = 1e-6  # OSQP's σ
RELAXATION = 1.6  # OSQP's over-relaxation; 1 is none
PENALTY_RANGE = (0.1, 100.0)  # ρ beyond it meets float32 rounding before it meets the tolerance
PENALTY_INTERVAL = 10  # iterations between two changes of ρ
PENALTY_THRESHOLD = 2.0  # ρ stays unless it should change by more than this factor


class Structure(NamedTuple):
    """A family of problems as functions of their data `parameters`."""

    hessian: Callable  # (parameters, x) -> Qx
    constraints: Callable  # (parameters, x) -> Ax, any pytree
    inverse: Callable  # (parameters, ρ, b) -> (Q + σI + ρAᵀA)⁻¹ b


class Solution(NamedTuple):
    """What OSQP returned."""

    primal: PyTree
    dual: PyTree  # like Ax; negative where a lower bound pushes, positive where an upper one does
    iterations: Int[Array, ""]


class _ExactInverse:
    """In the place of jaxopt's linear solvers; its state is (parameters, ρ)."""

    def __init__(self, inverse: Callable):
        self.inverse = inverse

    def init_state(self, init_params: Any, params_q: Any, params_a: Any, sigma: float, penalty: Any) -> tuple:
        return params_a, penalty

    def update_stepsize(self, state: tuple, penalty: Any) -> tuple:
        return state[0], penalty

    def run(self, b: PyTree, osqp_state: Any) -> tuple:
        parameters, penalty = osqp_state.solver_state
        return self.inverse(parameters, penalty, b), osqp_state.solver_state


class _StructuredOSQP(jaxopt.BoxOSQP):
    """jaxopt's iteration with the two replacements of the module docstring."""

    def _update_stepsize(
        self, rho_bar: Array, solver_state: tuple, primal_residuals: PyTree, dual_residuals: PyTree, *_: Any
    ) -> tuple:
        floor = 0.1 * self.tol  # residuals below the tolerance say nothing about the balance
        ratio = jnp.sqrt((_largest(primal_residuals) + floor) / (_largest(dual_residuals) + floor))
        unbalanced = (ratio > PENALTY_THRESHOLD) | (ratio < 1 / PENALTY_THRESHOLD)
        penalty = jnp.where(unbalanced, jnp.clip(rho_bar * ratio, self.rho_min, self.rho_max), rho_bar)
        return penalty, self._eq_qp_solve_impl.update_stepsize(solver_state, penalty)


def _largest(tree: PyTree) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


def minimise(
    structure: Structure,
    parameters: PyTree,
    linear: Float[Array, "*variables"],
    lower: PyTree,
    upper: PyTree,
    *,
    start: Float[Array, "*variables"],
    penalty: float | Float[Array, ""],
    penalty_range: tuple[float, float] = PENALTY_RANGE,
    relaxation: float = RELAXATION,
) -> Solution:
    """Solves min ½xᵀQx + linearᵀx subject to lower ≤ Ax ≤ upper; call it under `vmap`.

    Under `vmap` jaxopt's conditionals become selects, which a GPU need not wait for.

    Args:
      structure: the operators; the data, and therefore x and Ax, should be of unit size.
      parameters: what the operators are applied with.
      lower: bounds like Ax; -infinity where there is none.
      upper: likewise; infinity where there is none.
      start: where x begins; the multipliers begin at zero.
      penalty: the first ρ, tuned like the next two for each form over random problems.
      penalty_range: what ρ may become.
      relaxation: OSQP's α.

    Returns:
      The last iterate, whether or not it meets the tolerance: the caller measures it.
    """
    # jaxopt annotates its own linear solvers and float settings; ours are neither.
    settings: dict[str, Any] = {"rho_start": jnp.asarray(penalty, linear.dtype)}
    solver: Any = _StructuredOSQP(
        matvec_Q=structure.hessian,
        matvec_A=structure.constraints,
        check_primal_dual_infeasability=False,  # jaxopt's spelling; feasibility is checked when a method is built
        sigma=STABILISER,
        momentum=relaxation,
        rho_min=penalty_range[0],
        rho_max=penalty_range[1],
        stepsize_updates_frequency=PENALTY_INTERVAL,
        termination_check_frequency=1,
        maxiter=MAX_ITERATIONS,
        tol=TOLERANCE,
        implicit_diff=False,
        unroll=False,
        **settings,
    )
    solver._eq_qp_solve_impl = _ExactInverse(structure.inverse)
    objective = (parameters, linear)
    first = solver.init_params(start, objective, parameters, (lower, upper))
    solution, state = solver.run(first, objective, parameters, (lower, upper))
    return Solution(solution.primal[0], solution.dual_eq, jnp.asarray(state.iter_num, jnp.int32))
