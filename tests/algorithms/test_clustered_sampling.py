"""Clustered sampling's laws, small cases by hand, and whole runs, whose cohorts depend on what clients sent."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from fedjax_qp import config
from fedjax_qp.algorithms.clustered_sampling import by_similarity, by_size, distances, draw
from fedjax_qp.config import Local, Participation
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.engine.plan import Workload, plan_chunk, sample_cohort
from fedjax_qp.experiment import Experiment, build, first_state
from fedjax_qp.federated import Sampling
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.loop import simulate

sizes_and_members = st.lists(st.integers(1, 60), min_size=1, max_size=12).flatmap(
    lambda sizes: st.tuples(st.just(np.array(sizes)), st.integers(1, len(sizes)))
)


@settings(max_examples=60, deadline=None)
@given(drawn=sizes_and_members, seed=st.integers(0, 1000), kind=st.sampled_from(["size", "angle", "L2", "L1"]))
def test_everybody_is_drawn_by_size(drawn, seed, kind):
    """Every W_k is a distribution, and a client is drawn M·p_i times on average: the mean model is unbiased."""
    sizes, members = drawn
    gradients = np.random.default_rng(seed).normal(size=(len(sizes), 3)) * (np.arange(len(sizes)) % 3 > 0)[:, None]
    table = by_size(sizes, members) if kind == "size" else by_similarity(sizes, members, np.hsplit(gradients, 3), kind)
    assert table.shape == (members, len(sizes)) and (table >= 0).all()
    np.testing.assert_array_equal(table.sum(1), sizes.sum())
    np.testing.assert_array_equal(table.sum(0), members * sizes)


def test_by_size_by_hand():
    """Masses 3·n_i against a capacity of 12."""
    table = by_size(np.array([1, 4, 2, 3, 2]), 3)
    np.testing.assert_array_equal(table, [[0, 12, 0, 0, 0], [0, 0, 3, 9, 0], [3, 0, 3, 0, 6]])


def test_by_similarity_by_hand():
    """Three directions, two clients each; the lengths do not matter to the angle."""
    directions = np.eye(3)[[0, 1, 2, 0, 1, 2]] * np.array([1, 5, 2, 9, 1, 1])[:, None]
    table = by_similarity(np.full(6, 7), 3, [directions], "angle")
    assert sorted(map(tuple, table // 21)) == [(0, 0, 1, 0, 0, 1), (0, 1, 0, 0, 1, 0), (1, 0, 0, 1, 0, 0)]


def test_angles():
    """In the order of pairs 01, 02, 03, 12, 13, 23; clients 2 and 3 were never drawn."""
    gradients = np.array([[2.0, 0], [1, 1], [0, 0], [0, 0]])
    np.testing.assert_allclose(
        distances([gradients], "angle"), np.pi * np.array([0.25, 0.5, 0.5, 0.5, 0.5, 0]), atol=1e-7
    )


def test_distances_add_up_over_arrays():
    gradients = np.random.default_rng(0).normal(size=(4, 5))
    for measure, metric in (("L2", "euclidean"), ("L1", "cityblock")):
        np.testing.assert_allclose(distances(np.hsplit(gradients, [2]), measure), pdist(gradients, metric))


def test_a_heavy_client_has_distributions_of_its_own():
    table = by_similarity(np.array([10, 1, 1]), 2, [np.eye(3)], "angle")
    np.testing.assert_array_equal(table, [[12, 0, 0], [8, 2, 2]])


def test_a_cluster_for_each_client_is_everybody():
    for table in (by_size(np.full(5, 3), 5), by_similarity(np.full(5, 3), 5, [np.zeros((5, 2))], "angle")):
        assert set(draw(table, np.random.default_rng(0))) == set(range(5))


def test_a_client_drawn_twice_shares_its_fate_and_has_room_in_the_plan():
    largest = Sampling(lambda sizes, memories, members, generator: np.full(members, sizes.argmax()))
    work = Workload(
        [np.arange(3), np.arange(40), np.arange(5), np.arange(4)],
        Participation(cohort=3, dropout=0.5),
        Local(epochs=1, batch_size=8),
        seed=0,
        sampling=largest,
    )
    plan = plan_chunk([work], 0, 8, capacity=8, lanes=2, evaluate_every=1, last_round=8)
    np.testing.assert_array_equal(plan.cohorts.clients, 1)
    assert {tuple(steps) for steps in plan.cohorts.steps} == {(0, 0, 0), (5, 5, 5)}


# --- whole runs -------------------------------------------------------------------------------------------------------


def experiment(**algorithm) -> Experiment:
    values = {
        "name": "clustered",
        "rounds": 4,
        "seed": 3,  # one whose cohorts hold a client twice
        "data": "digits",
        "model": {"name": "mlp", "hidden": []},
        "partition": {"name": "dirichlet", "clients": 8, "beta": 0.3, "minimum": 5},
        "algorithm": {"name": "clustered_sampling", **algorithm},
        "local": {"epochs": 1, "batch_size": 40},
        "participation": {"cohort": 3},
        "engine": {"lanes": 1, "rounds_per_chunk": 1},
    }
    return build(config.from_dict(values))


@pytest.fixture(scope="module")
def similar() -> tuple[Experiment, list]:
    run = experiment()
    return run, [chunk for (chunk,) in simulate([run])]


def test_the_next_cohort_follows_from_what_the_last_one_sent(similar):
    run, chunks = similar
    with pytest.raises(ValueError, match="depend on the client memories"):
        sample_cohort(run.work, 1)
    before = jax.tree.map(np.zeros_like, chunks[0].state.clients)
    for number, chunk in enumerate(chunks):
        cohort = sample_cohort(run.work._replace(memories=before), number)
        changed = zip(jax.tree.leaves(before), jax.tree.leaves(chunk.state.clients), strict=True)
        took_part = np.any([(old != new).reshape(len(old), -1).any(1) for old, new in changed], axis=0)
        assert set(np.flatnonzero(took_part)) == set(cohort.clients)
        before = chunk.state.clients


def test_a_resumed_run_draws_the_same_cohorts(similar):
    run, chunks = similar
    resumed = [chunk for (chunk,) in simulate([run], [chunks[1].state])]
    for a, b in zip(jax.tree.leaves(resumed[-1].state), jax.tree.leaves(chunks[-1].state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_repeated_clients_count_as_often(similar):
    """Rounds by hand from what the clients sent: the mean over draws."""
    run, chunks = similar
    before, begun = jax.tree.map(np.zeros_like, chunks[0].state.clients), first_state(run).server.params.trainable
    repeated = 0
    for number, chunk in enumerate(chunks):
        clients = sample_cohort(run.work._replace(memories=before), number).clients
        sent = jax.tree.map(lambda leaf, clients=clients: leaf[clients].mean(0), chunk.state.clients)
        after = chunk.state.server.params.trainable
        assert worst_difference(jax.tree.map(np.add, begun, sent), after) <= 1e-5
        before, begun, repeated = chunk.state.clients, after, repeated + (len(set(clients)) < len(clients))
    assert repeated > 0


def test_chunks_of_several_rounds_are_refused():
    values = config.to_dict(experiment(by="size").config)
    values["engine"]["rounds_per_chunk"] = 2
    assert build(config.from_dict(values)).config.engine.rounds_per_chunk == 2  # sizes are known beforehand
    values["algorithm"]["by"] = "similarity"
    with pytest.raises(ConfigurationError, match=r"rounds_per_chunk = 2.*choose 1"):
        build(config.from_dict(values))
