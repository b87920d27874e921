"""FedQP: FedMut whose mutations are corrected by a quadratic program, so that they lean towards the global update.

Source: the idea of replacing each mutation by the nearest one at an acute angle with the global update is FedQP's (SEKE
2024, arXiv 2411.15847). Margin, box, joint drift, further references and the ablations are our formulation.

The correction happens in `dispatch`, on coefficients: a mutant is x_i = (c_i1 g_1, …, c_iL g_L), and the programs need only
the layers' shares p_l = ‖g_l‖²/‖g‖² (`quadratic`). The mean coefficient acts as a server momentum ("drift"): recorded in
every round, and the quantity that the ablations hold fixed. It is the mean over the clients that were sent a mutant: where
some of them drop out, the mean over those that report differs by chance.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree
from pydantic import Field

from fedjax_qp import quadratic
from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.fedmut import (
    MutationServer,
    Own,
    active_mutants,
    backward_share,
    layer_squared_norms,
    mutating,
    mutation_signs,
    watched_drift,
)
from fedjax_qp.algorithms.local import Upload
from fedjax_qp.federated import Algorithm, Cohort, Model, Params
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.watch import Watch

Form = Literal["nearest", "box", "joint", "references"]
Use = Literal["corrected", "shifted", "drift"]
LARGEST_RESIDUAL = 1e-4  # of a quadratic program, relative


class Correction(NamedTuple):
    """The options of `fedqp` that the programs need."""

    form: Form
    alpha: float
    margin: float
    drift: float
    max_drift: float | None
    epsilon: float


class Directions(NamedTuple):
    """Unit-norm reference directions C and the inner products that QP-3 needs."""

    rows: PyTree  # [R, ...]
    gram: Float[Array, "R R"]
    with_update: Float[Array, "R L"]  # ⟨C_j, g_l⟩ per layer
    valid: Bool[Array, "R"]  # False for a zero row


@algorithms.register
def fedqp(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    form: Form = "references",
    alpha: Annotated[float, Field(ge=0)] = 2.0,
    beta0: Annotated[float, Field(ge=0, le=1)] = 0.3,
    mutation_rounds: Annotated[int, Field(ge=1)] = 50,
    margin: float = 0.0,
    drift: float = 0.5,
    max_drift: Annotated[float, Field(ge=0)] | None = None,
    references: Literal["clients", "history"] = "history",
    references_kept: Annotated[int, Field(ge=1)] = 10,
    epsilon: Annotated[float, Field(gt=0)] = 1e-3,
    use: Use = "corrected",
) -> Algorithm:
    """FedMut whose mutations a quadratic program turns towards the global update (FedQP).

    The defaults are the best of our comparison at the published local setting (benchmarks/results/cifar10_lenet_0_1-main.md),
    not the paper's; with plain SGD "joint" at alpha 1 and drift 0.7 was better (…/cifar10_lenet_0_1_sgd-main.md).

    Args:
      form: the program (names as in `quadratic`): "nearest" (QP-1) moves each mutant to the fan around g; "box" (QP-2)
        does so within FedMut's box |c| ≤ α; "joint" (QP-4) also fixes the cohort's mean at `drift`; "references" (QP-3)
        asks for acute angles with further directions.
      alpha: length of a mutation, as in FedMut.
      beta0: shortens backward mutations in early rounds, as in FedMut.
      mutation_rounds: rounds over which that fades, as in FedMut.
      margin: τ in [0, 1); 0 is "acute". The smallest cosine for "nearest"; for "box" and "joint" the smallest inner product
        with g in units of α‖g‖²; for "references" that with each direction of norm 1 in units of α‖g‖.
      drift: μ, the cohort's mean coefficient; "joint" only.
      max_drift: upper limit of a layer's mean coefficient; "nearest" and "box" only. It shifts all mutants back alike,
        and so may take some of them out of the fan, and of the box.
      references: QP-3's directions besides g: "clients" takes the last round's client updates, "history" the last global
        updates; "references" only.
      references_kept: the largest number of these directions; "references" only.
      epsilon: regularisation of QP-3's dual; "references" only.
      use: "corrected" is the method. Ablations: "shifted" gives FedMut's mutants the same mean as the corrected ones,
        x_i' = r_i + mean_j(x_j − r_j); "drift" starts every client at w + mean_j x_j.

    Raises:
      ConfigurationError: margin outside [0, 1), or max_drift with another form; and, when a cohort is dispatched with form
        "joint", a cohort of one or a drift that a cohort of its size cannot have.
    """
    quadratic.check_margin(margin)
    if max_drift is not None and form not in ("nearest", "box"):
        raise ConfigurationError(f"max_drift = {max_drift} works with form nearest or box, not {form!r}; leave it out.")
    settings = Correction(form, alpha, margin, drift, max_drift, epsilon)

    @quadratic.full_precision  # inner products rounded to TF32 would be as wrong as the tolerances allow
    def mutate(server: MutationServer, members: int, key: Any) -> tuple[Own, PyTree, dict]:
        if form == "joint":
            quadratic.check_drift(drift, alpha, margin, members)
        squared = layer_squared_norms(server.update)
        shares = quadratic.shares_of(squared)
        beta = backward_share(beta0, mutation_rounds, server.round)
        signs = mutation_signs(key, members, len(shares), beta)
        active = active_mutants(members)
        if form == "references":
            directions = reference_directions(server)
            drawn = Own(alpha * signs, jnp.zeros((members, len(directions.valid))))
            corrected, report = _correct_by_references(settings, signs, squared, directions, active)
            own = _use(use, drawn, corrected, active)
            metrics = _reference_metrics(drawn, own, squared, directions, active)
            rows, with_update = directions.rows, directions.with_update
        else:
            drawn = Own(alpha * signs, jnp.zeros((members, 0)))
            coefficients, report = _correct_by_update(settings, signs, shares, active)
            own = _use(use, drawn, Own(coefficients, drawn.multipliers), active)
            metrics = _fan_metrics(drawn.coefficients, own.coefficients, shares, active)
            rows, with_update = (), jnp.zeros((0, len(squared)))
        return own, rows, {**metrics, **_drift_metrics(own, squared, with_update), **_solver_metrics(form, report)}

    of_form = {"joint": ("drift",), "references": ("references", "references_kept", "epsilon")}
    unused = [option for other, options in of_form.items() if other != form for option in options]
    algorithm = mutating(model, optimizer, mutate)._replace(unused=tuple(unused), watch=_watched(form))
    return _remembering(algorithm, references, references_kept) if form == "references" else algorithm


def _watched(form: Form) -> tuple[Watch, ...]:
    """The drift, and whether the programs were solved."""
    remedies = {"joint": " or algorithm.drift", "nearest": ", or set algorithm.max_drift"}
    remedies["box"] = remedies["nearest"]
    return (
        *watched_drift(f"Lower algorithm.alpha{remedies.get(form, '')}."),
        Watch(
            "qp/failures",
            limit=1,
            advice="quadratic programs missed the tolerance in {rounds} rounds, at most {value} of them (round {round}): "
            "forms nearest and box then took the closed form, joint and references the solver's best.",
        ),
        Watch(
            "qp/residual",
            limit=LARGEST_RESIDUAL,
            advice=f"the quadratic programs' largest residual is {{value}} (round {{round}}), above {LARGEST_RESIDUAL:g}.",
        ),
    )


def _correct_by_update(
    settings: Correction, signs: Float[Array, "M L"], shares: Float[Array, "L"], active: Bool[Array, "M"]
) -> tuple[Float[Array, "M L"], quadratic.Report]:
    common: dict[str, Any] = {"alpha": settings.alpha, "margin": settings.margin, "active": active}
    if settings.form == "joint":
        return quadratic.joint(signs, shares, drift=settings.drift, **common)
    solve = quadratic.nearest if settings.form == "nearest" else quadratic.boxed
    coefficients, report = solve(signs, shares, **common)
    if settings.max_drift is not None:
        excess = jnp.maximum(coefficients.mean(0) - settings.max_drift, 0)
        share_active = jnp.maximum(active.mean(), 1 / len(active))
        coefficients = coefficients - jnp.where(active[:, None], excess / share_active, 0)
    return coefficients, report


def _use(use: Use, drawn: Own, corrected: Own, active: Bool[Array, "M"]) -> Own:
    """The ablations of the correction; see `fedqp`."""
    if use == "corrected":
        return corrected

    def everyone_at_mean(rows: Float[Array, "M N"]) -> Float[Array, "M N"]:
        return jnp.broadcast_to(rows.mean(0), rows.shape)

    if use == "drift":
        return jax.tree.map(everyone_at_mean, corrected)
    return jax.tree.map(
        lambda before, after: before + jnp.where(active[:, None], _active_mean(after - before, active), 0),
        drawn,
        corrected,
    )


def _active_mean(rows: Float[Array, "M N"], active: Bool[Array, "M"]) -> Float[Array, "N"]:
    return jnp.where(active[:, None], rows, 0).sum(0) / jnp.maximum(active.sum(), 1)


def _share(which: Bool[Array, "M"], active: Bool[Array, "M"]) -> Float[Array, ""]:
    """Of the active mutants."""
    return (which & active).sum() / jnp.maximum(active.sum(), 1)


# --- QP-3: further references -----------------------------------------------------------------------------------------


def _remembering(algorithm: Algorithm, references: str, kept: int) -> Algorithm:
    """Lets the server keep the directions that the next round's mutants refer to."""
    combine_sum = algorithm.combine
    assert combine_sum is not None

    def init_server(params: Params, clients: int) -> MutationServer:
        empty = jax.tree.map(lambda leaf: jnp.zeros((kept, *leaf.shape), leaf.dtype), params.trainable)
        return algorithm.init_server(params, clients)._replace(references=empty)

    def combine(server: MutationServer, total: Upload, key: Any) -> tuple[MutationServer, dict]:
        new, metrics = combine_sum(server, total, key)
        older = jax.tree.map(
            lambda row, rows: jnp.concatenate([row[None], rows[:-1]]), server.update, server.references
        )
        return new._replace(references=older), metrics

    def combine_each(server: MutationServer, uploads: Upload, cohort: Cohort, key: Any) -> tuple[MutationServer, dict]:
        new, metrics = combine_sum(server, jax.tree.map(lambda leaf: leaf.sum(0), uploads), key)
        first = jnp.argsort(uploads.reporters == 0)[:kept]  # stable; who dropped out takes nobody's place

        def keep(rows: Array) -> Array:
            missing = max(0, kept - len(rows))
            return jnp.concatenate([rows[first], jnp.zeros((missing, *rows.shape[1:]), rows.dtype)])

        return new._replace(references=jax.tree.map(keep, uploads.update.trainable)), metrics

    if references == "history":
        return algorithm._replace(init_server=init_server, combine=combine)
    return algorithm._replace(init_server=init_server, combine=None, combine_each=combine_each)


def reference_directions(server: MutationServer) -> Directions:
    """g and the remembered directions, scaled to norm 1; zero rows stay zero and are marked."""
    rows = jax.tree.map(lambda g, rest: jnp.concatenate([g[None], rest]), server.update, server.references)
    norms = jnp.sqrt(sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(rows)))
    valid = norms > 0
    scale = jnp.where(valid, 1 / jnp.where(valid, norms, 1), 0)
    rows = jax.tree.map(lambda leaf: leaf * scale.reshape(-1, *(1,) * (leaf.ndim - 1)), rows)
    flat = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)]
    updates = [leaf.reshape(-1) for leaf in jax.tree.leaves(server.update)]
    with_update = jnp.stack([matrix @ g for matrix, g in zip(flat, updates, strict=True)], axis=1)
    return Directions(rows, jnp.sum(jnp.stack([matrix @ matrix.T for matrix in flat]), axis=0), with_update, valid)


def _correct_by_references(
    settings: Correction,
    signs: Float[Array, "M L"],
    squared: Float[Array, "L"],
    directions: Directions,
    active: Bool[Array, "M"],
) -> tuple[Own, quadratic.Report]:
    length = settings.alpha * jnp.sqrt(squared.sum())  # solved in units of a mutation's length, α‖g‖
    unit = jnp.where(length > 0, length, 1)
    drawn = settings.alpha * signs @ directions.with_update.T  # ⟨r_i, C_j⟩, [M, R]
    multipliers, report = quadratic.referenced(
        directions.gram,
        drawn / unit,
        margin_offsets=settings.margin,
        epsilon=settings.epsilon,
        valid=directions.valid,
        active=active,
    )
    return Own(settings.alpha * signs, multipliers * length), report


# --- metrics: of the mutants that the clients are sent -------------------------------------------------------------------


def _reference_metrics(
    drawn: Own, sent: Own, squared: Float[Array, "L"], directions: Directions, active: Bool[Array, "M"]
) -> dict[str, Array]:
    def products(own: Own) -> Float[Array, "M R"]:
        """⟨x_i, C_j⟩; row 0 of C is g/‖g‖."""
        return own.coefficients @ directions.with_update.T + own.multipliers @ directions.gram

    def lengths(own: Own) -> Float[Array, "M"]:
        with_references = own.coefficients @ directions.with_update.T + products(own)
        return jnp.sqrt(jnp.maximum(own.coefficients**2 @ squared + (with_references * own.multipliers).sum(1), 0))

    moved = lengths(jax.tree.map(jnp.subtract, sent, drawn)) > 1e-4 * lengths(drawn)
    return {
        "mutation/cosine_before": _quotient(products(drawn)[:, 0], lengths(drawn)),
        "mutation/cosine_after": _quotient(products(sent)[:, 0], lengths(sent)),
        "qp/corrected_share": _share(moved, active),
    }


def _fan_metrics(
    drawn: Float[Array, "M L"], sent: Float[Array, "M L"], shares: Float[Array, "L"], active: Bool[Array, "M"]
) -> dict[str, Array]:
    length, new_length = jnp.sqrt(drawn**2 @ shares), jnp.sqrt(sent**2 @ shares)
    moved = jnp.sqrt((sent - drawn) ** 2 @ shares) > 1e-4 * length
    return {
        "mutation/cosine_before": quadratic.cosines(drawn, shares),
        # The direction of a mutant that was corrected to nothing is rounding noise.
        "mutation/cosine_after": jnp.where(new_length > 1e-4 * length, quadratic.cosines(sent, shares), 0),
        "qp/corrected_share": _share(moved, active),
    }


def _drift_metrics(own: Own, squared: Float[Array, "L"], with_update: Float[Array, "R L"]) -> dict[str, Array]:
    """The cohort's mean mutation x̄ in units of g: ⟨x̄, g⟩/‖g‖², and the largest ⟨x̄_l, g_l⟩/‖g_l‖² of a layer.

    Args:
      squared: ‖g_l‖² per layer.
      with_update: ⟨C_j, g_l⟩ of the reference directions.
    """
    mean = jax.tree.map(lambda rows: rows.mean(0), own)
    progress = mean.coefficients * squared + mean.multipliers @ with_update
    drift = _quotient(progress.sum(), squared.sum())
    return {"mutation/drift": drift, "mutation/drift_largest": _quotient(progress, squared).max()}


def _solver_metrics(form: Form, report: quadratic.Report) -> dict[str, Array]:
    return {
        "qp/residual": report.residual.max(),
        "qp/iterations": report.iterations.max(),
        # "joint" is one problem for the whole cohort.
        "qp/failures": report.failed.any().astype(int) if form == "joint" else report.failed.sum(),
    }


def _quotient(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
