"""What the quadratic programs know about a cohort's mutations, and what they report.

A mutation of the global model is (c_1 g_1, …, c_L g_L), g the last global update, a layer one parameter array. Angles
with g depend on the coefficients c and on the layers' shares p_l = ‖g_l‖²/‖g‖² alone, so no problem ever has the
model's dimension.

Source: fan and nearest acute mutation: FedQP (SEKE 2024, arXiv 2411.15847). Margins, boxes, references and drift: our
formulation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedjax_qp.registry import ConfigurationError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: accelerators round the factors of a float32 matrix product to 10 bits or fewer unless asked not to."""

    @functools.wraps(function)
    def wrapped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*arguments, **options)

    return wrapped


class Report(NamedTuple):
    """How the solver did; one entry per mutant (of a joint problem the same in each)."""

    residual: Float[Array, "M"]  # KKT residual of what was returned, relative to its size; not jaxopt's own measure
    iterations: Int[Array, "M"]
    failed: Bool[Array, "M"]  # the solver missed `accepted_residual`; the closed form took over where one exists


def shares_of(squared_norms: Float[Array, "L"]) -> Float[Array, "L"]:
    """Returns the layers' shares p_l of ‖g‖², of sum 1; zeros where ‖g‖ = 0, and then nothing should be mutated.

    Args:
      squared_norms: ‖g_l‖² of every layer.
    """
    total = squared_norms.sum()
    return jnp.where(total > 0, squared_norms / jnp.where(total > 0, total, 1), 0)


@full_precision
def cosines(coefficients: Float[Array, "M L"], shares: Float[Array, "L"]) -> Float[Array, "M"]:
    """Cosine of the angle between each mutation and the global update; 0 where either is zero."""
    squared_lengths = jnp.square(coefficients) @ shares
    lengths = jnp.sqrt(jnp.where(squared_lengths > 0, squared_lengths, 1))
    return jnp.where(squared_lengths > 0, coefficients @ shares / lengths, 0)


def accepted_residual(dtype: Any) -> float:
    """The largest KKT residual that counts as solved."""
    return 1e-5 if jnp.finfo(dtype).bits == 64 else 1e-4


def prepared(
    signs: Float[Array, "M L"], shares: Float[Array, "L"], active: Bool[Array, "M"] | None
) -> tuple[Float[Array, "M L"], Float[Array, "L"], Bool[Array, "M"]]:
    """The arguments in one floating type of at least 32 bits; without `active`, all mutants are."""
    dtype = jnp.promote_types(jnp.result_type(signs, shares), jnp.float32)
    active = jnp.ones(signs.shape[0], bool) if active is None else jnp.asarray(active)
    return jnp.asarray(signs, dtype), jnp.asarray(shares, dtype), active


def check_margin(margin: float) -> None:
    """Raises ConfigurationError unless 0 ≤ margin < 1 in float32. An array was checked when its run was configured."""
    if not isinstance(margin, jax.Array) and not 0 <= np.float32(margin) < 1:
        raise ConfigurationError(
            f"margin = {margin} is not in [0, 1) in float32: it is how far a mutation must lean towards the global update, "
            "for form nearest the smallest cosine. Use 0 for 'acute', or a value such as 0.25."
        )


def joint_feasible_range(alpha: float, margin: float, slots: int, active: int) -> tuple[float, float]:
    """The drifts that `joint` can reach: every active mutant's progress lies in [margin·α, α], idle slots add nothing.

    Args:
      alpha: length of a mutation in units of the global update.
      margin: τ.
      slots: M, all members of the cohort.
      active: how many of them are mutated.
    """
    share = active / slots
    return margin * alpha * share, alpha * share


def check_drift(drift: float, alpha: float, margin: float, slots: int) -> None:
    """Raises ConfigurationError unless `joint` can give a cohort of `slots` members this drift.

    An odd cohort has one unmutated member, as in FedMut. Arrays were checked when their run was configured.
    """
    if any(isinstance(value, jax.Array) for value in (drift, alpha, margin)):
        return
    if slots < 2:
        raise ConfigurationError(f"a cohort of {slots} has no mutant to correct. Sample at least 2 clients a round.")
    low, high = joint_feasible_range(alpha, margin, slots, slots - slots % 2)
    rounding = 1e-6 * max(high, 1.0)
    if not low - rounding <= drift <= high + rounding:
        raise ConfigurationError(
            f"drift = {drift} is not in [{low:.6g}, {high:.6g}], the range that a cohort of {slots} with "
            f"alpha = {alpha} and margin = {margin} can reach. Change the drift, or lower the margin or raise alpha."
        )
