"""The quadratic programs against independent oracles, over random and extreme geometries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp import quadratic
from fedjax_qp.registry import ConfigurationError

ALPHA = 3.0
INSTANCES = 1024
MARGINS = [0, 0.1, 0.25, 0.5, 0.9, 0.99, 0.999999]
# (members, layers, 64 bits): LeNet's and odd cohorts, and the smallest one.
CASES = [(10, 10, False), (5, 4, False), (2, 3, False), (5, 4, True)]
CASE_NAMES = ["lenet", "odd", "pair", "odd-float64"]


def random_cohorts(members, layers, seed, count=INSTANCES):
    """FedMut's signs, shares of five characters (even to dominated), margins and feasible drifts, as float64 arrays."""
    rng = np.random.default_rng(seed)
    half = members // 2
    beta = rng.choice([0, 0.3, 0.5], (count, 1))
    pairs = np.concatenate([np.ones((count, half)), np.repeat(-1 + beta, half, axis=1)], axis=1)
    signs = np.stack([rng.permuted(pairs, axis=1) for _ in range(layers)], axis=2)
    signs = np.concatenate([signs, np.zeros((count, members % 2, layers))], axis=1)
    even = rng.exponential(size=(count, layers))
    with_zeros = even * (rng.random((count, layers)) < 0.4)
    with_zeros[:, 0] += 1e-3
    dominated = even * 1e-7
    dominated[:, 0] = 1
    kinds = np.stack([even, even**6, np.exp(6 * rng.normal(size=(count, layers))), with_zeros, dominated])
    shares = kinds[rng.integers(0, 5, count), np.arange(count)]
    margin = rng.choice(MARGINS, count)
    depth = rng.choice([0, 0.01, 0.2, 0.5, 0.9, 1], count)
    drift = ALPHA * (margin + (1 - margin) * depth) * (members - members % 2) / members
    return signs, shares / shares.sum(1, keepdims=True), margin, drift


def idle_last(members):
    return jnp.arange(members) < members - members % 2


def nearest(signs, shares, margin, drift, alpha):
    return quadratic.nearest(signs, shares, alpha=alpha, margin=margin, active=idle_last(len(signs)))


def boxed(signs, shares, margin, drift, alpha):
    return quadratic.boxed(signs, shares, alpha=alpha, margin=margin, active=idle_last(len(signs)))


def joint(signs, shares, margin, drift, alpha):
    active = idle_last(len(signs))
    return quadratic.joint(signs, shares, alpha=alpha, margin=margin, drift=drift, active=active)


FORMS = (nearest, boxed, joint)
compiled = {form: jax.jit(form) for form in FORMS}
batched = {form: jax.jit(jax.vmap(form, in_axes=(0, 0, 0, 0, None))) for form in FORMS}


def single(form, *arguments):
    """One instance, always of the types that the form was compiled for."""
    return compiled[form](*(jnp.asarray(argument, jnp.float32) for argument in arguments))


@functools.cache
def solved(form, members, layers, double):
    """One compiled call over all instances; everything back as float64, inputs as the solver saw them."""
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        inputs = [jnp.asarray(array, dtype) for array in random_cohorts(members, layers, seed=members + layers)]
        coefficients, report = batched[form](*inputs, ALPHA)
        assert coefficients.dtype == dtype
        unit = [np.asarray(array, np.float64) for array in (*inputs, coefficients / ALPHA)]
        return *unit, jax.tree.map(np.asarray, report)


def progress(coefficients, shares):
    return np.einsum("nml,nl->nm", coefficients, shares)


def fan_violation(coefficients, shares, margin):
    """τ‖x‖ − ⟨x, g⟩/‖g‖ in units of α‖g‖; unlike the cosine it means something for mutations near zero."""
    lengths = np.sqrt(progress(coefficients**2, shares))
    return margin[:, None] * lengths - progress(coefficients, shares)


def tolerance(double):
    return 1e-5 if double else 1e-4


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_kkt_residuals_and_fallbacks(form, case):
    members, _, double = case
    *_, coefficients, report = solved(form, *case)
    assert np.isfinite(coefficients).all()
    assert report.residual.max() <= tolerance(double)
    assert report.failed.mean() <= 2e-3
    assert report.iterations.dtype == np.int32
    for entry in report:
        assert entry.shape == (INSTANCES, members)
    assert (coefficients[:, np.asarray(~idle_last(members))] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_nearest_is_the_closed_form(case):
    members, _, double = case
    signs, shares, margin, _, coefficients, _ = solved(nearest, *case)
    speed = progress(signs, shares)
    spread = np.sqrt(progress((signs - speed[:, :, None]) ** 2, shares))
    slope = (margin / np.sqrt(1 - margin**2))[:, None]
    multiplier = np.maximum(slope * spread - speed, 0)
    expected = np.where(np.asarray(idle_last(members))[:, None], signs + multiplier[:, :, None], 0)
    # Relative to the length; and the multiplier is `slope` times as inaccurate as the spread it is computed from.
    rounding = np.finfo(np.float64 if double else np.float32).eps
    accepted = 3e-6 * np.maximum(slope * spread, 1) + slope * rounding
    assert (np.abs(coefficients - expected).max(2) <= accepted).all()


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_nearest_meets_the_fan_and_moves_no_farther(case):
    signs, shares, margin, _, coefficients, _ = solved(nearest, *case)
    violation = fan_violation(coefficients, shares, margin)
    lengths = np.sqrt(progress(coefficients**2, shares))
    assert (violation <= 1e-5 * np.maximum(lengths, 1)).all()
    inside = fan_violation(signs, shares, margin) < -1e-4
    assert inside.any()
    np.testing.assert_allclose(coefficients[inside], signs[inside], rtol=0, atol=1e-5)
    # A corrected mutation lies on the fan's surface, not in its interior.
    assert (violation[~inside] >= -2e-4 * np.maximum(lengths, 1)[~inside]).all()


def bisected_box(signs, shares, margin):
    """QP-2 by bisection on the multiplier."""
    low, high = np.zeros(signs.shape[:2]), np.full(signs.shape[:2], 4.0)
    enough = progress(signs, shares) >= margin[:, None]
    for _ in range(80):
        middle = (low + high) / 2
        reached = progress(np.clip(signs + middle[:, :, None], -1, 1), shares) >= margin[:, None]
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return np.clip(signs + np.where(enough, 0, high)[:, :, None], -1, 1)


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_boxed_is_bisection_and_the_closed_form(case):
    members, _, double = case
    signs, shares, margin, _, coefficients, _ = solved(boxed, *case)
    rows = np.asarray(idle_last(members))
    signs, coefficients = signs[:, rows], coefficients[:, rows]
    accepted = 1e-4 if double else 1e-3  # squared, the distance is as accurate as the KKT conditions
    distance = np.sqrt(progress((coefficients - bisected_box(signs, shares, margin)) ** 2, shares))
    assert distance.max() <= accepted
    # FedMut's signs: forward layers stay, all backward layers share one value.
    forward = progress(signs == 1, shares)
    backward = signs.min(axis=(1, 2))[:, None]
    lifted = np.maximum(backward, (margin[:, None] - forward) / np.maximum(1 - forward, 1e-12))
    expected = np.where(signs == 1, 1, np.clip(lifted, -1, 1)[:, :, None])
    assert np.sqrt(progress((coefficients - expected) ** 2, shares)).max() <= accepted
    assert np.abs(coefficients).max() <= 1
    assert (progress(coefficients, shares) >= margin[:, None] - tolerance(double)).all()
    assert fan_violation(coefficients, shares, margin).max() <= tolerance(double)


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_joint_meets_every_constraint(case):
    members, _, double = case
    _, shares, margin, drift, coefficients, _ = solved(joint, *case)
    rounding = 1e-12 if double else 1e-6
    assert np.abs(coefficients).max() <= 1
    assert np.abs(coefficients.mean(1) - drift[:, None] / ALPHA).max() <= rounding
    mutants = coefficients[:, np.asarray(idle_last(members))]
    assert (progress(mutants, shares) >= margin[:, None] - tolerance(double)).all()
    assert fan_violation(mutants, shares, margin).max() <= tolerance(double)


def descent_left(signs, shares, margin, mean, coefficients, slack):
    """How much lower QP-4's objective can be, at most: max ⟨∇f(c), c − z⟩ over feasible z, a linear program.

    A certificate that knows nothing of multipliers (the gap of Frank & Wolfe).
    """
    members, layers = signs.shape
    gradient = (shares * (coefficients - signs)).ravel()
    fan = -scipy.sparse.kron(scipy.sparse.eye(members), shares[None])
    means = scipy.sparse.kron(np.ones((1, members)) / members, scipy.sparse.eye(layers))
    program = scipy.optimize.linprog(
        gradient,
        A_ub=scipy.sparse.vstack([fan, means, -means]),
        b_ub=np.concatenate([np.full(members, -margin), np.full(layers, mean), np.full(layers, -mean)]) + slack,
        bounds=(-1, 1),
    )
    assert program.status == 0, program.message
    return gradient @ coefficients.ravel() - program.fun


@pytest.mark.parametrize(("case", "count"), [(CASES[0], 100), (CASES[1], 500), (CASES[3], 500)])
def test_joint_is_optimal(case, count):
    members, _, double = case
    rows = np.asarray(idle_last(members))
    signs, shares, margin, drift, coefficients, _ = solved(joint, *case)
    mean = drift / ALPHA * members / rows.sum()
    slack = 1e-9 if double else 1e-6  # for the rounding of the instance itself
    left = [
        descent_left(signs[i, rows], shares[i], margin[i], mean[i], coefficients[i, rows], slack) for i in range(count)
    ]
    assert max(left) <= (1e-5 if double else 1e-4) * members


def test_joint_agrees_with_slsqp():
    signs, shares, margin, drift, coefficients, _ = solved(joint, *CASES[3])
    ordinary = np.flatnonzero((shares.min(1) > 0.02) & (margin <= 0.5))[:15]
    assert len(ordinary) == 15
    for index in ordinary:
        v, p, mean = signs[index, :4], shares[index], drift[index] / ALPHA * 5 / 4
        progress_matrix, mean_matrix = np.kron(np.eye(4), p), np.kron(np.ones(4) / 4, np.eye(4))
        fan = {
            "type": "ineq",
            "fun": lambda c, matrix=progress_matrix, i=index: matrix @ c - margin[i],
            "jac": lambda c, matrix=progress_matrix: matrix,
        }
        level = {
            "type": "eq",
            "fun": lambda c, matrix=mean_matrix, mean=mean: matrix @ c - mean,
            "jac": lambda c, matrix=mean_matrix: matrix,
        }
        result = scipy.optimize.minimize(
            lambda c, v=v, p=p: 0.5 * (p * (c.reshape(4, 4) - v) ** 2).sum(),
            np.full(16, mean),
            jac=lambda c, v=v, p=p: (p * (c.reshape(4, 4) - v)).ravel(),
            bounds=[(-1, 1)] * 16,
            constraints=[fan, level],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(coefficients[index, :4].ravel(), result.x, atol=2e-5)


def test_joint_returns_fedmuts_draw_where_it_is_feasible():
    signs, shares, _, _ = random_cohorts(10, 10, seed=3)
    beta_of_draw = signs.min(axis=(1, 2)) + 1
    inside = progress(signs, shares).min(1) >= 0
    rotated = np.where((np.arange(10)[:, None] + np.arange(10)) % 2 == 0, 1.0, -0.5)
    signs = np.concatenate([signs[inside], rotated[None]])
    shares = np.concatenate([shares[inside], np.full((1, 10), 0.1)])
    beta = np.concatenate([beta_of_draw[inside], [0.5]])
    pad = INSTANCES - len(signs)  # the compiled function's batch
    signs, shares = np.pad(signs, ((0, pad), (0, 0), (0, 0)), "edge"), np.pad(shares, ((0, pad), (0, 0)), "edge")
    beta = np.pad(beta, (0, pad), "edge")
    inputs = [jnp.asarray(array, jnp.float32) for array in (signs, shares, 0 * beta, ALPHA * beta / 2)]
    coefficients, report = batched[joint](*inputs, ALPHA)
    np.testing.assert_allclose(coefficients / ALPHA, signs, atol=2e-6)
    assert not report.failed.any()


EDGES = st.sampled_from([0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 7.0, 1e8])


@settings(max_examples=60, deadline=None, database=None)
@given(
    squared_norms=st.lists(EDGES, min_size=4, max_size=4),
    backward=st.sampled_from([-1.0, -0.7, -0.5, 0.0]),
    columns=st.lists(st.permutations([0, 0, 1, 1]), min_size=4, max_size=4),
    margin=st.sampled_from([*MARGINS, 0.9999999]),
    depth=st.sampled_from([0, 1e-6, 0.3, 1]),
)
def test_edges(squared_norms, backward, columns, margin, depth):
    """Dominating and vanishing layers, no update at all, margins at their bounds: finite, feasible, solved."""
    shares = quadratic.shares_of(jnp.array(squared_norms))
    assert jnp.isfinite(shares).all()
    assert float(shares.sum()) == pytest.approx(1 if sum(squared_norms) > 0 else 0, abs=1e-5)
    signs = np.zeros((5, 4), np.float32)
    signs[:4] = np.where(np.array(columns).T == 1, 1, backward)
    drift = ALPHA * (margin + (1 - margin) * depth) * 4 / 5
    for form in FORMS:
        coefficients, report = single(form, signs, shares, margin, drift, ALPHA)
        assert jnp.isfinite(coefficients).all(), form
        assert report.residual.max() <= 1e-4, form
        assert (coefficients[4] == 0).all()
        if sum(squared_norms) > 0 and form is not nearest:
            assert (coefficients[:4] @ shares / ALPHA).min() >= margin - 1e-4
    np.testing.assert_allclose(coefficients.mean(0), drift, atol=3e-6)


def random_references(rng, count, references):
    directions = rng.normal(size=(count, references, 12))
    directions[::4] = directions[::4, :1] + 0.03 * directions[::4]  # nearly parallel
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    return directions, rng.normal(size=(count, 3, 12)) * 10.0 ** rng.integers(-3, 3, (count, 1, 1))


@functools.cache
def compiled_references(epsilon):
    def form(gram, projections, offsets, valid):
        return quadratic.referenced(gram, projections, margin_offsets=offsets, epsilon=epsilon, valid=valid)

    return jax.jit(jax.vmap(form))


@pytest.mark.parametrize(("double", "epsilon"), [(False, 1e-3), (True, 1e-3), (True, 0.0)])
def test_referenced_is_the_nearest_acute_mutation(double, epsilon):
    """Against scipy's non-negative least squares: ½vᵀHv + bᵀv = ½‖Uv + U⁻ᵀb‖² up to a constant, H = UᵀU."""
    rng = np.random.default_rng(5)
    directions, mutations = random_references(rng, INSTANCES, 5)
    valid = rng.random((INSTANCES, 5)) < 0.8
    size = np.abs(mutations).max(axis=(1, 2))
    offsets = 0.1 * size[:, None] * (rng.random((INSTANCES, 5)) < 0.3) * (epsilon > 0)
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        gram = directions @ directions.swapaxes(1, 2) * np.where(valid[:, :, None] & valid[:, None], 1, np.nan)
        projections = mutations @ directions.swapaxes(1, 2)
        inputs = [jnp.asarray(array, dtype) for array in (gram, projections, offsets)]
        multipliers, report = jax.tree.map(np.asarray, compiled_references(epsilon)(*inputs, jnp.asarray(valid)))
    assert multipliers.shape == (INSTANCES, 3, 5)
    assert report.residual.max() <= tolerance(double)
    assert not report.failed.any()
    assert (multipliers >= 0).all()
    assert (multipliers.swapaxes(1, 2)[~valid] == 0).all()
    slack = np.einsum("nrk,nms,nsk->nmr", directions, multipliers, directions) + projections - offsets[:, None]
    acute = (slack + epsilon * multipliers)[np.broadcast_to(valid[:, None], slack.shape)]
    unit = np.broadcast_to(np.maximum(multipliers.max(2), size[:, None])[:, :, None], slack.shape)
    unit = unit[np.broadcast_to(valid[:, None], slack.shape)]
    assert (acute / unit >= -tolerance(double)).all()
    for index in range(0, INSTANCES, 3):
        rows = valid[index]
        if not rows.any():
            continue
        hessian = directions[index][rows] @ directions[index][rows].T + epsilon * np.eye(rows.sum())
        factor = np.linalg.cholesky(hessian).T
        for mutant in range(3):
            linear = projections[index, mutant, rows] - offsets[index, rows]
            expected, _ = scipy.optimize.nnls(factor, -np.linalg.solve(factor.T, linear))
            # Nearly parallel references leave the single multipliers open; the mutation is determined.
            error = factor @ (multipliers[index, mutant, rows] - expected)
            assert np.abs(error).max() <= (1e-5 if double else 2e-3) * max(size[index], expected.max())


@jax.jit
def two_references(gram, projections, offset, epsilon, valid):
    return quadratic.referenced(gram, projections, margin_offsets=offset, epsilon=epsilon, valid=valid)


def test_one_reference_is_nearest_for_margin_zero():
    signs, shares = (array[0] for array in random_cohorts(5, 4, seed=8, count=1)[:2])
    signs, shares = jnp.asarray(signs, jnp.float32), jnp.asarray(shares, jnp.float32)
    gram, valid = jnp.array([[1.0, jnp.nan], [jnp.nan, jnp.nan]]), jnp.array([True, False])
    projections = jnp.stack([ALPHA * signs @ shares, jnp.full(5, jnp.nan)], axis=1)
    multipliers, _ = two_references(gram, projections, 0.0, 0.0, valid)
    coefficients, _ = single(nearest, signs, shares, 0.0, 0.0, ALPHA)
    np.testing.assert_allclose(ALPHA * signs + multipliers[:, :1], coefficients, atol=1e-5)
    assert (multipliers[:, 1] == 0).all()


def test_contradicting_references_stay_finite():
    gram, both = jnp.array([[1.0, -1.0], [-1.0, 1.0]]), jnp.array([True, True])
    projections = jnp.tile(jnp.array([[0.3, -0.3]]), (5, 1))
    multipliers, report = two_references(gram, projections, 1.0, 0.0, both)
    assert jnp.isfinite(multipliers).all()
    assert report.failed.all()
    multipliers, report = two_references(gram, projections, 1.0, 1e-3, both)
    assert not report.failed.any()
    assert multipliers.max() <= 1.001e3  # (c ± 0.3)/ε on both sides cancel but for c/ε


def test_no_references_leave_the_mutation():
    neither = jnp.array([False, False])
    multipliers, report = two_references(jnp.full((2, 2), jnp.nan), jnp.full((5, 2), jnp.nan), 0.0, 1e-3, neither)
    assert (multipliers == 0).all()
    assert not report.failed.any()


@pytest.mark.parametrize(("members", "layers"), [(5, 4), (1, 4)])
def test_alpha_zero_is_no_mutation(members, layers):
    signs, shares = jnp.ones((members, layers)).at[0].set(-1), jnp.full(layers, 0.25)
    for form in FORMS:
        coefficients, report = single(form, signs, shares, 0.1, 0.0, 0.0)
        assert (coefficients == 0).all()
        assert jnp.isfinite(report.residual).all()
        assert not report.failed.any()


def test_hyperparameters_may_be_traced_in_a_scan():
    """A sweep maps over alpha, margin and drift, and the round lies inside a scan."""
    signs, shares, _, _ = random_cohorts(4, 3, seed=2, count=2)
    signs, shares = jnp.asarray(signs, jnp.float32), jnp.asarray(shares[0], jnp.float32)

    def rounds(alpha, margin, drift):
        def step(carry, signs):
            coefficients, report = quadratic.joint(signs, shares, alpha=alpha, margin=margin, drift=drift)
            return carry, (coefficients, report.residual)

        return jax.lax.scan(step, 0, signs)[1]

    drifts = jnp.array([1.0, 1.5])
    coefficients, residual = jax.jit(jax.vmap(rounds))(jnp.array([2.0, 4.0]), jnp.array([0.0, 0.25]), drifts)
    np.testing.assert_allclose(coefficients.mean(2), np.broadcast_to(drifts[:, None, None], (2, 2, 3)), atol=1e-5)
    assert residual.max() <= 1e-4


def test_compiles_once():
    cohorts = random_cohorts(5, 4, seed=4, count=9)
    for form in FORMS:
        single(form, *(array[0] for array in cohorts), ALPHA)
        programs = compiled[form]._cache_size()
        for index in range(1, 9):
            single(form, *(array[index] for array in cohorts), ALPHA + index)
        assert compiled[form]._cache_size() == programs


def test_out_of_reach_drift_is_reported():
    signs, shares = jnp.where(jnp.eye(5, 4) > 0, 1.0, -1.0).at[4].set(0), jnp.full(4, 0.25)
    coefficients, report = single(joint, signs, shares, 0.5, 0.1, 1.0)
    assert report.failed.all()
    assert jnp.abs(coefficients).max() <= 1


def test_cosines_and_drift():
    shares = jnp.array([0.25, 0.75])
    coefficients = jnp.array([[2.0, 2.0], [-1.0, -1.0], [3.0, -1.0], [0.0, 0.0]])
    np.testing.assert_allclose(quadratic.cosines(coefficients, shares), [1, -1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(coefficients.mean(0), [1.0, 0.0])
    np.testing.assert_allclose(quadratic.shares_of(jnp.array([1.0, 3.0])), shares)


def test_checks_name_value_range_and_remedy():
    for margin in (0, 0.25, 0.999):
        quadratic.check_margin(margin)
    for margin in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ConfigurationError, match=rf"margin = {margin}.*\[0, 1\).*Use"):
            quadratic.check_margin(margin)
    assert quadratic.joint_feasible_range(4.0, 0.25, 10, 10) == (1.0, 4.0)
    assert quadratic.joint_feasible_range(5.0, 0.5, 5, 4) == (2.0, 4.0)
    quadratic.check_drift(1.0, 4.0, 0.25, 10)
    quadratic.check_drift(0.0, 0.0, 0.25, 10)
    for drift, slots in ((0.9, 10), (4.1, 10), (3.9, 5), (float("nan"), 10)):
        with pytest.raises(ConfigurationError, match=rf"drift = {drift}.*\[.*\].*Change"):
            quadratic.check_drift(drift, 4.0, 0.25, slots)
    with pytest.raises(ConfigurationError, match=r"cohort of 1.*at least 2"):
        quadratic.check_drift(0.0, 4.0, 0.0, 1)
