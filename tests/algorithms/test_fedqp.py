"""FedQP's mutants in parameter space: the start models that clients really get, against plain numpy."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.fedmut import MutationServer, start_model
from fedjax_qp.algorithms.local import Upload
from fedjax_qp.contract.federations import run_rounds, small_engine, small_model, worst_difference
from fedjax_qp.federated import Cohort, Params
from fedjax_qp.registry import ConfigurationError

ALPHA, MEMBERS = 2.0, 10


def vector(tree) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@cache
def made_server() -> MutationServer:
    """A made-up server whose last update has layers of very different length."""
    trainable = small_model().init(jax.random.key(3)).trainable
    leaves, structure = jax.tree.flatten(trainable)
    scales = np.logspace(-1.5, 0.5, len(leaves))
    update = jax.tree.unflatten(structure, [leaf * scale for leaf, scale in zip(leaves, scales, strict=True)])
    keys = jax.random.split(jax.random.key(11), 3)
    rows = [jax.tree.map(lambda leaf, k=key: jax.random.normal(k, leaf.shape), update) for key in keys]
    references = jax.tree.map(lambda *leaves: jnp.stack([*leaves, jnp.zeros_like(leaves[0])]), *rows)  # one empty row
    return MutationServer(Params(trainable, {}), update, jnp.int32(60), references)


@pytest.fixture(scope="module")
def server() -> MutationServer:
    return made_server()


@cache  # several tests look at the same ones
def mutants_of_it(*arguments, **options) -> tuple[np.ndarray, dict]:
    return mutants(made_server(), *arguments, **options)


def mutants(server: MutationServer, members: int = MEMBERS, name: str = "fedqp", **options) -> tuple[np.ndarray, dict]:
    """The mutations x_i as rows, and the dispatch's metrics."""
    algorithm = algorithms.build(name, small_model(), optax.sgd(0.1), alpha=ALPHA, **options)
    cohort = Cohort(jnp.arange(members), jnp.ones(members), jnp.ones(members))
    shared, own, metrics = jax.jit(algorithm.dispatch)(server, cohort, jax.random.key(7))
    models = [start_model(shared, jax.tree.map(lambda leaf, i=i: leaf[i], own)) for i in range(members)]
    return np.stack([vector(model) for model in models]) - vector(server.params.trainable), jax.device_get(metrics)


def cosines(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return rows @ direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction)


def test_some_of_fedmuts_mutants_look_backward(server):
    drawn, _ = mutants_of_it(name="fedmut")
    assert (cosines(drawn, vector(server.update)) < -0.1).any()


@pytest.mark.parametrize("margin", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("form", ["nearest", "box", "joint"])
def test_corrected_mutants_are_acute(server, form, margin):
    rows, metrics = mutants_of_it(form=form, margin=margin, drift=max(0.9, ALPHA * margin))
    g = vector(server.update)
    size, lengths = ALPHA * np.linalg.norm(g), np.linalg.norm(rows, axis=1)
    assert (rows @ g / np.linalg.norm(g) - margin * lengths).min() >= -2e-5 * size
    clear = lengths > 0.05 * size  # the angle of a mutant that was corrected to almost nothing is rounding noise
    np.testing.assert_allclose(metrics["mutation/cosine_after"][clear], cosines(rows, g)[clear], atol=1e-4)
    assert metrics["qp/residual"] <= 1e-4
    assert 0 < metrics["qp/corrected_share"] <= 1


def test_nearest_moves_along_the_update_and_no_further_than_needed(server):
    drawn, _ = mutants_of_it(name="fedmut")
    rows, _ = mutants_of_it(form="nearest")
    g = vector(server.update)
    multiplier = np.maximum(-drawn @ g / (g @ g), 0)
    np.testing.assert_allclose(rows, drawn + multiplier[:, None] * g, atol=2e-5 * ALPHA * np.linalg.norm(g))


@pytest.mark.parametrize("form", ["box", "joint"])
def test_boxed_forms_stay_in_fedmuts_box(server, form):
    rows, _ = mutants_of_it(form=form, margin=0.2, drift=0.6)
    g = vector(server.update)
    assert (np.abs(rows) <= ALPHA * np.abs(g) * (1 + 1e-5) + 1e-6).all()


@pytest.mark.parametrize(("members", "drift"), [(10, 0.5), (10, 1.2), (5, 0.5)])
def test_joint_has_exactly_the_chosen_mean(server, members, drift):
    rows, metrics = mutants_of_it(members, form="joint", drift=drift)
    g = vector(server.update)
    np.testing.assert_allclose(rows.mean(0), drift * g, atol=1e-5 * np.abs(g).max())
    assert metrics["mutation/drift"] == pytest.approx(drift, abs=1e-5)


@pytest.mark.parametrize("form", ["nearest", "box", "joint", "references"])
@pytest.mark.parametrize("members", [10, 5])
def test_ablations_have_the_same_mean(server, form, members):
    corrected, _ = mutants_of_it(members, form=form)
    shifted, shifted_metrics = mutants_of_it(members, form=form, use="shifted")
    alone, alone_metrics = mutants_of_it(members, form=form, use="drift")
    drawn, _ = mutants_of_it(members, name="fedmut")
    size = np.linalg.norm(vector(server.update))
    np.testing.assert_allclose(shifted.mean(0), corrected.mean(0), atol=1e-5 * size)
    np.testing.assert_allclose(alone, np.broadcast_to(corrected.mean(0), alone.shape), atol=1e-5 * size)
    active = members - members % 2
    np.testing.assert_allclose((shifted - drawn)[:active] - (shifted - drawn)[0], 0, atol=1e-5 * size)
    assert shifted_metrics["mutation/drift"] == pytest.approx(alone_metrics["mutation/drift"], abs=1e-5)
    g = vector(server.update)
    for rows, metrics in ((shifted, shifted_metrics), (alone, alone_metrics)):  # the angles of what is sent
        clear = np.linalg.norm(rows, axis=1) > 0.05 * size
        np.testing.assert_allclose(metrics["mutation/cosine_after"][clear], cosines(rows[clear], g), atol=1e-3)


def test_the_odd_client_is_not_corrected(server):
    for form in ("nearest", "box", "joint", "references"):
        rows, _ = mutants_of_it(5, form=form)
        np.testing.assert_allclose(rows[-1], 0, atol=1e-6)


def test_max_drift_limits_the_mean(server):
    _, free_metrics = mutants_of_it(form="box", margin=0.3)
    _, metrics = mutants_of_it(form="box", margin=0.3, max_drift=0.2)
    assert free_metrics["mutation/drift_largest"] > 0.3
    assert metrics["mutation/drift_largest"] == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("references", ["clients", "history"])
def test_referenced_mutants_are_acute_with_every_direction(server, references):
    drawn, _ = mutants_of_it(name="fedmut")
    made, metrics = mutants_of_it(form="references", references=references, references_kept=4)
    rows = [jax.tree.map(lambda leaf, i=index: leaf[i], server.references) for index in range(3)]
    directions = np.stack([vector(server.update), *(vector(row) for row in rows)])
    before = np.stack([cosines(drawn, direction) for direction in directions])
    assert before.min() < -0.1
    g = vector(server.update)
    inner = made @ (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
    assert inner.min() >= -2e-3 * ALPHA * np.linalg.norm(g)  # acute up to ε·v, and v ≲ α‖g‖
    clear = np.linalg.norm(made, axis=1) > 0.05 * ALPHA * np.linalg.norm(g)
    np.testing.assert_allclose(metrics["mutation/cosine_after"][clear], cosines(made, g)[clear], atol=1e-4)
    assert metrics["mutation/drift"] == pytest.approx(made.mean(0) @ g / (g @ g), abs=1e-4)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(server.update)])[:-1]
    by_layer = [
        mean @ part / (part @ part) for mean, part in zip(np.split(made.mean(0), ends), np.split(g, ends), strict=True)
    ]
    assert metrics["mutation/drift_largest"] == pytest.approx(max(by_layer), rel=1e-3)


def test_client_references_are_results_minus_the_last_global_model(server):
    """More reporters than places: the first ones are kept. Fewer: the rest is empty."""
    params = server.params
    results = [jax.tree.map(lambda leaf, s=scale: leaf * s, params.trainable) for scale in (1.5, 2.0, 3.0)]
    differences = [jax.tree.map(jnp.subtract, result, params.trainable) for result in results]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *differences)
    ones = jnp.ones(3)
    uploads = Upload(ones, Params(stacked, {}), stacked, ones)
    for kept in (2, 5):
        algorithm = algorithms.build(
            "fedqp", small_model(), optax.sgd(0.1), form="references", references="clients", references_kept=kept
        )
        new, _ = algorithm.combine_each(algorithm.init_server(params, 1), uploads, None, None)
        for index in range(kept):
            row = jax.tree.map(lambda leaf, i=index: leaf[i], new.references)
            expected = differences[index] if index < 3 else jax.tree.map(jnp.zeros_like, params.trainable)
            assert worst_difference(expected, row) == 0
        assert worst_difference(new.update, jax.tree.map(lambda leaf: leaf.mean(0), stacked)) <= 1e-6
    silent = uploads._replace(weight=ones.at[0].set(0), reporters=ones.at[0].set(0))  # the first one drops out
    new, _ = algorithm.combine_each(algorithm.init_server(params, 1), silent, None, None)
    assert worst_difference(differences[1], jax.tree.map(lambda leaf: leaf[0], new.references)) == 0


def test_history_references_are_the_earlier_updates_newest_first(server):
    options = {"form": "references", "references": "history", "references_kept": 2}
    algorithm = algorithms.build("fedqp", small_model(), optax.sgd(0.1), **options)
    state = algorithm.init_server(server.params, 1)
    updates = [jax.tree.map(lambda leaf, s=s: leaf * s, server.update) for s in (1.0, 2.0, 3.0, 4.0)]
    for update in updates:
        one = jnp.ones(())
        state, _ = algorithm.combine(state, Upload(one, Params(update, {}), update, one), None)
    assert worst_difference(updates[3], state.update) == 0
    for index, expected in enumerate((updates[2], updates[1])):
        row = jax.tree.map(lambda leaf, i=index: leaf[i], state.references)
        assert worst_difference(expected, row) == 0


def test_when_nothing_points_backward_it_is_fedmut():
    """With β_0 = 1 backward mutations have length 0: all mutants are in the fan already."""
    loss, optimizer = small_model(), optax.sgd(0.05, 0.9)
    fedmut = algorithms.build("fedmut", loss, optimizer, alpha=1.0, beta0=1.0, mutation_rounds=10**6)
    fedqp = algorithms.build("fedqp", loss, optimizer, alpha=1.0, beta0=1.0, mutation_rounds=10**6, form="nearest")
    expected, _ = run_rounds(fedmut, small_engine(fedmut), lanes=3, rounds=2)
    state, _ = run_rounds(fedqp, small_engine(fedqp), lanes=3, rounds=2)
    assert worst_difference(expected.server.params, state.server.params) <= 1e-5


def test_without_an_update_nothing_is_mutated_and_all_numbers_are_finite(server):
    zero = {"update": server.update, "references": server.references}
    still = server._replace(**jax.tree.map(jnp.zeros_like, zero))
    for name, options in (
        ("fedmut", {}),
        *(("fedqp", {"form": form}) for form in ("nearest", "box", "joint", "references")),
    ):
        rows, metrics = mutants(still, name=name, **options)
        assert np.abs(rows).max() == 0
        assert metrics["mutation/drift"] == metrics["mutation/drift_largest"] == 0
        assert all(np.isfinite(value).all() for value in metrics.values())


def test_a_drift_that_the_cohort_cannot_have_is_refused(server):
    with pytest.raises(ConfigurationError, match=r"drift = 1.8 is not in \[0, 1.6\].*cohort of 5"):
        mutants_of_it(5, form="joint", drift=1.8)
