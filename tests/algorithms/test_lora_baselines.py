"""Laws of the methods that PerFIT is judged against: Ditto, HetLoRA, FlexLoRA, FLoRA; and that all train equally much."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.regression import RANK, SCALE, SIZES, regression

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.flexlora import truncated_svd
from fedjax_qp.algorithms.flora import draw
from fedjax_qp.algorithms.hetlora import product_norm
from fedjax_qp.algorithms.ranks import client_ranks, rank_masks, stacked
from fedjax_qp.contract.federations import Played, play, worst_difference
from fedjax_qp.federated import Client, Cohort
from fedjax_qp.registry import ConfigurationError

ALL = len(SIZES)
TWO_LEVELS = (1, 3)  # ranks of the default levels, 0.5 and 1.5, of rank 2


def build(name, expansion=1, **options):
    federation = regression(expansion)
    return algorithms.build(name, federation.model, federation.optimizer, **options)


@cache
def played(name: str, expansion: int = 1, rounds: int = 2, cohort: int = ALL, **options) -> Played:
    return play(build(name, expansion, **options), regression(expansion), rounds, cohort=cohort)


def start(expansion: int = 1):
    return regression(expansion).model.init(jax.random.key(0)).trainable


def product(adapters):
    """The dense A·B of every layer."""
    return {name: np.asarray(adapter["a"] @ adapter["b"], np.float64) for name, adapter in adapters.items()}


def weighted_products(run: Played, number: int):
    """Σ_k p_k A_k B_k of one round's uploads."""
    uploads = list(run.uploads[number].values())
    total = sum(float(upload.weight) for upload in uploads)
    products = [product(upload.adapters) for upload in uploads]
    return jax.tree.map(
        lambda *dense: sum(float(u.weight) / total * d for u, d in zip(uploads, dense, strict=True)), *products
    )


def test_dittos_global_model_is_fedavgs():
    assert worst_difference(played("fedavg").server, played("ditto", proximal=0.5).server) <= 1e-6


def test_ditto_without_pull_is_local_training():
    alone, run = played("local_lora"), played("ditto", proximal=0.0)
    algorithm = build("ditto")
    for mine, theirs in zip(run.memories, alone.memories, strict=True):
        assert worst_difference(theirs.adapters, mine.params.trainable) <= 1e-5
        for view in (algorithm.serve, algorithm.tuned):
            assert worst_difference(mine.params, view(run.server, mine)) == 0


def test_dittos_pull_brings_the_models_together():
    distances = []
    for proximal in (0.0, 1.0, 10.0):
        run = played("ditto", proximal=proximal)
        moved = [jax.tree.map(jnp.subtract, m.params.trainable, run.servers[-1].params.trainable) for m in run.memories]
        distances.append(sum(float(optax.tree.norm(difference)) for difference in moved))
    assert distances[0] > distances[1] > distances[2]


def test_who_never_took_part_is_served_dittos_global_model():
    run, algorithm = played("ditto", rounds=1, cohort=5), build("ditto")
    absent = set(range(ALL)) - set(run.metrics[0])
    assert absent
    for client in absent:
        assert worst_difference(run.server.params, algorithm.tuned(run.server, run.memories[client])) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_norm_of_a_product_without_the_product(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"q_proj": ((2, 6, 3), (2, 3, 8)), "v_proj": ((2, 6, 3), (2, 3, 4))}
    adapters = {
        name: {"a": jax.random.normal(keys[2 * i], of_a), "b": jax.random.normal(keys[2 * i + 1], of_b)}
        for i, (name, (of_a, of_b)) in enumerate(shapes.items())
    }
    expected = np.sqrt(sum((dense**2).sum() for dense in product(adapters).values()))
    np.testing.assert_allclose(product_norm(adapters), expected, rtol=1e-4)
    assert float(product_norm(jax.tree.map(jnp.zeros_like, adapters))) == 0


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_clients_train_their_first_ranks_only(name):
    run = played(name, expansion=2)
    for client, memory in enumerate(run.memories):
        rank = TWO_LEVELS[client % 2]
        assert int(memory.rank) == rank
        masks = rank_masks(memory.adapters, rank)
        outside = jax.tree.map(lambda leaf, mask: jnp.where(mask, 0, leaf), memory.adapters, masks)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(outside))
        assert worst_difference(masks, build(name, 2).serve(run.server, memory).masks) == 0


def test_hetlora_averages_by_norm_with_zero_padding():
    run = played("hetlora", expansion=2)
    memories = run.memories  # of the last round, in which all took part
    norms = [np.sqrt(sum((dense**2).sum() for dense in product(memory.adapters).values())) for memory in memories]
    means = jax.tree.map(
        lambda *leaves: sum(norm * np.asarray(leaf) for norm, leaf in zip(norms, leaves, strict=True)) / sum(norms),
        *(memory.adapters for memory in memories),
    )
    held = rank_masks(means, max(TWO_LEVELS))
    expected = jax.tree.map(lambda mean, mask, old: np.where(mask, mean, old), means, held, start(2))
    assert worst_difference(expected, run.server.adapters) <= 1e-5


def test_hetlora_with_equal_ranks_and_norms_is_fedavg():
    algorithm = build("hetlora", 2, levels=(2.0,))
    server = algorithm.init_server(regression(2).model.init(jax.random.key(0)), 1)
    clients = []
    for seed in range(3):
        drawn = jax.tree.map(lambda leaf, s=seed: jax.random.normal(jax.random.key(s), leaf.shape), start(2))
        size = product_norm(drawn)
        clients.append(jax.tree.map(lambda leaf, s=size: leaf / jnp.sqrt(s), drawn))
    shared, own, _ = algorithm.dispatch(server, _cohort(3), jax.random.key(0))
    one = Client(*jnp.ones((3, 1))[:, 0], own[0])
    carries = [algorithm.start(shared, own[0], None, None) for _ in clients]
    uploads = []
    for carry, adapters in zip(carries, clients, strict=True):
        trained = carry._replace(params=carry.params._replace(trainable=adapters))
        uploads.append(algorithm.finish(shared, trained, one)[0])
    after, _ = algorithm.combine(server, jax.tree.map(lambda *leaves: sum(leaves), *uploads), None)
    assert worst_difference(jax.tree.map(lambda *leaves: sum(leaves) / 3, *clients), after.adapters) <= 1e-5


def _cohort(members: int) -> Cohort:
    return Cohort(np.arange(members), np.ones(members), np.ones(members))


def test_a_rank_that_nobody_trains_keeps_its_values():
    run = played("hetlora", expansion=2)
    for name, adapter in run.server.adapters.items():
        np.testing.assert_array_equal(adapter["a"][..., 3:], start(2)[name]["a"][..., 3:])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), inner=st.integers(2, 12), rank=st.integers(1, 2))
def test_the_svd_of_a_product_without_the_product(seed, inner, rank):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(6, inner)).astype(np.float32), generator.normal(size=(inner, 9)).astype(np.float32)
    left, right = truncated_svd(jnp.array(a), jnp.array(b), rank)
    u, values, v = np.linalg.svd(a.astype(np.float64) @ b, full_matrices=False)
    best = (u[:, :rank] * values[:rank]) @ v[:rank]
    np.testing.assert_allclose(left @ right, best, atol=1e-3 * values[0])
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(right, axis=1), values[:rank], rtol=1e-4)


def test_flexlora_deals_out_the_best_approximations_of_the_mean_product():
    run = played("flexlora", expansion=2)
    dense = weighted_products(run, 1)
    for rank in TWO_LEVELS:
        held = rank_masks(run.server.adapters, rank)
        dealt = product(jax.tree.map(lambda leaf, mask: leaf * mask, run.server.adapters, held))
        for name, mean in dense.items():
            u, values, v = np.linalg.svd(mean, full_matrices=False)
            best = (u[..., :rank] * values[:, None, :rank]) @ v[:, :rank]
            np.testing.assert_allclose(dealt[name], best, atol=1e-4 * values.max())


def test_flora_merges_the_exact_sum_of_products():
    run = played("flora")
    first, second = weighted_products(run, 0), weighted_products(run, 1)
    expected = jax.tree.map(lambda a, b: SCALE * (a + b), first, second)
    assert worst_difference(expected, run.server.deltas) <= 1e-5
    assert worst_difference(jax.tree.map(lambda a: SCALE * a, first), run.server.previous) <= 1e-5


def test_flora_starts_afresh_every_round_and_all_clients_alike():
    algorithm = build("flora")
    server = algorithm.init_server(regression().model.init(jax.random.key(0)), 1)
    fresh = [algorithm.dispatch(server, _cohort(3), jax.random.key(number))[0].fresh for number in (0, 0, 1)]
    assert worst_difference(fresh[0], fresh[1]) == 0
    for name, adapter in fresh[0].items():
        assert (adapter["b"] == 0).all()
        assert not (adapter["a"] == fresh[2][name]["a"]).any()
        assert float(jnp.abs(adapter["a"]).max()) <= adapter["a"].shape[1] ** -0.5
        assert not (adapter["a"] == draw(start(), jax.random.key(5))[name]["a"]).any()


def test_flora_knows_a_clients_own_model_right_after_its_round():
    algorithm, run = build("flora"), played("flora", cohort=5)
    recent = set(run.metrics[1])
    assert recent != set(range(ALL))
    for client, memory in enumerate(run.memories):
        tuned, served = algorithm.tuned(run.server, memory), algorithm.serve(run.server, memory)
        assert worst_difference(run.server.deltas, served.statistics) == 0
        if client in recent:
            assert worst_difference(run.server.previous, tuned.statistics) == 0
            assert worst_difference(run.uploads[1][client].adapters, tuned.trainable) == 0
        else:
            assert worst_difference(run.server.deltas, tuned.statistics) == 0
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(tuned.trainable))


def test_stacking_is_the_weighted_sum():
    clients = [
        jax.tree.map(lambda leaf, s=s: jax.random.normal(jax.random.key(s), leaf.shape), start()) for s in (1, 2)
    ]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients)
    expected = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, *map(product, clients))
    assert worst_difference(expected, product(stacked(jnp.array([0.25, 0.75]), together))) <= 1e-5


@pytest.mark.parametrize(
    ("name", "expansion", "options"),
    [
        ("local_lora", 1, {}),
        ("fedsa_lora", 1, {}),
        ("ditto", 1, {"proximal": 0.5}),
        ("flora", 1, {}),
        ("hetlora", 2, {}),
        ("flexlora", 2, {}),
    ],
)
def test_all_methods_train_as_much_as_fedit(name, expansion, options):
    size = sum(leaf.size for leaf in jax.tree.leaves(start()))
    metrics = played(name, expansion, **options).metrics[0]
    assert np.mean([int(found["client/trained_entries"]) for found in metrics.values()]) == size


def test_ranks_of_levels():
    assert client_ranks((0.5, 1.5), 2 * RANK, 2) == list(TWO_LEVELS)
    assert client_ranks((0.01, 1.0, 2.0), 16, 2) == [1, 8, 16]
    for name in ("hetlora", "flexlora"):
        with pytest.raises(ConfigurationError, match="at most algorithm.expansion = 2"):
            build(name, 2, levels=(1.0, 3.0))


def test_flexlora_refuses_more_ranks_than_a_matrix_has():
    with pytest.raises(ConfigurationError, match="expanded rank 5 for a matrix of 6 × 4"):
        truncated_svd(jnp.ones((6, 10)), jnp.ones((10, 4)), 5)
