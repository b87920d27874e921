"""Laws of PerFIT: exact budgets, entries that stay 0, averages per position, and FedIT as its limit."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.regression import RANK, SIZES, regression

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.importance import flatten, unflatten
from fedjax_qp.algorithms.local import LocalState
from fedjax_qp.contract.federations import Played, play, worst_difference
from fedjax_qp.federated import Batch, Client, Cohort, Model, Params
from fedjax_qp.registry import ConfigurationError

QUICK = {"warm_up": 1, "prunings": 2, "score_batches": 1}
LEVELS = (0.5, 1.0, 1.5)
ALL = len(SIZES)


def build(expansion=2, **options):
    federation = regression(expansion)
    return algorithms.build(
        "perfit", federation.model, federation.optimizer, expansion=expansion, **{**QUICK, **options}
    )


@cache
def played(expansion: int = 2, rounds: int = 2, cohort: int = ALL, **options) -> Played:
    return play(build(expansion, **options), regression(expansion), rounds, cohort=cohort)


def kept(memory) -> int:
    return int(sum(mask.sum() for mask in jax.tree.leaves(memory.masks)))


def entries(expansion: int = 1) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(regression(expansion).model.init(jax.random.key(0)).trainable))


def test_masks_of_ones_are_fedit():
    federation = regression(2)
    fedit = algorithms.build("fedit", federation.model, federation.optimizer, expansion=2)
    other = play(fedit, federation, cohort=ALL)
    run = played(warm_up=0, levels=(2.0,))
    assert all(kept(memory) == entries(2) for memory in run.memories)
    assert worst_difference(other.server.adapters, jax.tree.map(lambda leaf: leaf[0], run.server.adapters)) <= 1e-5
    for mine, theirs in zip(run.memories, other.memories, strict=True):
        assert worst_difference(theirs.adapters, mine.adapters) <= 1e-5


def test_budgets_are_exact_and_equal_fedits():
    run = played(levels=LEVELS)
    for client, memory in enumerate(run.memories):
        assert kept(memory) == round(LEVELS[client % 3] * entries(2) / 2)
        assert int(run.metrics[0][client]["client/trained_entries"]) == kept(memory)
    federation = regression()
    fedit = play(algorithms.build("fedit", federation.model, federation.optimizer), federation, 1)
    of_fedit = {int(metrics["client/trained_entries"]) for metrics in fedit.metrics[0].values()}
    assert of_fedit == {entries()} == {kept(memory) for memory in run.memories[1::3]}


def test_pruned_entries_stay_zero_under_adam_with_weight_decay():
    for memory in played(levels=LEVELS).memories:
        pruned = ~np.asarray(flatten(memory.masks))
        assert pruned.any()
        np.testing.assert_array_equal(np.asarray(flatten(memory.adapters))[pruned], 0)
        assert (np.asarray(flatten(memory.adapters))[~pruned] != 0).any()


@cache
def compiled(grouped: bool):
    """PerFIT of two levels, and its two functions that average."""
    algorithm = build(levels=(0.5, 1.5), grouped=grouped)
    return algorithm, jax.jit(algorithm.finish), jax.jit(algorithm.combine)


def report(grouped: bool, server, client: int, theta, mask, size: float):
    """What a client with these adapters and masks uploads."""
    algorithm, finish, _ = compiled(grouped)
    federation = regression(2)
    cohort = Cohort(np.array([client]), np.array([size]), np.array([1]))
    shared, own, _ = algorithm.dispatch(server, cohort, jax.random.key(0))
    memory = algorithm.init_client(federation.model.init(jax.random.key(0)))
    carry = LocalState(Params(theta, (), mask), (), jnp.zeros(()), jnp.zeros((), jnp.int32))
    mine = jax.tree.map(lambda leaf: leaf[0], own)
    facts = Client(jnp.int32(client), jnp.float32(size), jnp.int32(1), mine, memory)
    return finish(shared, carry, facts)[0]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), grouped=st.booleans(), density=st.sampled_from([0.1, 0.5, 1.0]))
def test_positions_are_averaged_over_their_owners(seed, grouped, density):
    """Against a loop over positions; what nobody owns keeps its old value; groups do not mix."""
    algorithm, _, combine = compiled(grouped)
    params = regression(2).model.init(jax.random.key(0))
    server = algorithm.init_server(params, 1)
    generator = np.random.default_rng(seed)
    total = entries(2)
    old = generator.normal(size=(2 if grouped else 1, total)).astype(np.float32)
    rows = [unflatten(jnp.array(row), params.trainable) for row in old]
    server = server._replace(adapters=jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows))
    masks = generator.random((5, total)) < density
    thetas = np.where(masks, generator.normal(size=(5, total)), 0).astype(np.float32)
    sizes = generator.integers(1, 30, 5)
    uploads = [
        report(grouped, server, client, *(unflatten(jnp.array(x), params.trainable) for x in pair), float(size))
        for client, (size, *pair) in enumerate(zip(sizes, thetas, masks, strict=True))
    ]
    after, _ = combine(server, jax.tree.map(lambda *leaves: sum(leaves), *uploads), jax.random.key(0))
    expected = old.copy()
    for group in range(len(old)):
        members = [client for client in range(5) if not grouped or client % 2 == group]
        for position in range(total):
            owners = [client for client in members if masks[client, position]]
            if owners:
                weights = [sizes[client] for client in owners]
                expected[group, position] = np.average([thetas[client, position] for client in owners], weights=weights)
    found = [flatten(jax.tree.map(lambda leaf, g=group: leaf[g], after.adapters)) for group in range(len(old))]
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prunings", [1, 3])
def test_the_search_keeps_the_largest_products(prunings):
    """A linear loss has the same gradient everywhere, so the mask must be the top of |θ·∂L/∂θ|, however it is pruned."""
    params = regression(2).model.init(jax.random.key(0))
    generator = np.random.default_rng(0)
    theta, slope = generator.normal(size=(2, entries(2))).astype(np.float32)
    slopes = unflatten(jnp.array(slope), params.trainable)

    def loss(frozen, params, batch, key):
        terms = jax.tree.map(lambda s, t: (s * t).sum(), slopes, params.trainable)
        return sum(jax.tree.leaves(terms)), ()

    model = Model(init=lambda key: params, loss=loss, evaluate=lambda *_: {})
    options = {"warm_up": 1, "prunings": prunings, "score_batches": 2}
    algorithm = algorithms.build("perfit", model, optax.sgd(0.0), **options)
    server = algorithm.init_server(Params(unflatten(jnp.array(theta), params.trainable), ()), 1)
    shared, own, _ = algorithm.dispatch(server, Cohort(*np.ones((3, 1), np.int32)), jax.random.key(0))
    batches = Batch(np.zeros((1 + 2 * prunings, 1)), np.ones((1 + 2 * prunings, 1), bool))
    mine = jax.tree.map(lambda leaf: leaf[0], own)
    memory = algorithm.prepare((), shared, mine, algorithm.init_client(params), batches, jax.random.key(1))
    expected = np.zeros(entries(2), bool)
    expected[np.argsort(-np.abs(theta * slope))[: entries(2) // 2]] = True
    np.testing.assert_array_equal(flatten(memory.masks), expected)
    np.testing.assert_array_equal(flatten(memory.adapters), np.where(expected, theta, 0))


def test_whole_ranks_are_kept_to_the_exact_budget():
    """All ranks of a client but one are whole or gone, so that more products stay than of single entries."""
    run, entrywise = played(search="taylor_ranks", rounds=1), played(rounds=1)
    for client, memory in enumerate(run.memories):
        assert kept(memory) == entries()
        shares = [
            np.concatenate([sides["a"][layer, :, rank], sides["b"][layer, rank]]).mean()
            for sides in jax.tree.map(np.asarray, memory.masks).values()
            for layer in range(len(sides["a"]))
            for rank in range(2 * RANK)
        ]
        assert sum(0 < share < 1 for share in shares) <= 1
        metrics = (some.metrics[0][client] for some in (run, entrywise))
        whole, single = (float(found["client/product_share"]) for found in metrics)
        assert whole > single


@pytest.mark.parametrize(("every", "cohort"), [(None, ALL), (2, ALL), (None, 5)])
def test_searches_happen_when_they_should(every, cohort):
    """A search shows in the traffic: the dense average comes down."""
    run = played(rounds=4, cohort=cohort, search="random", search_every=every)
    seen = set()
    for number, metrics in enumerate(run.metrics):
        if every is not None and number % every == 0:
            seen = set()
        for client, found in metrics.items():
            received = 4 * entries(2) if client not in seen else 4 * entries()
            assert int(found["client/download_bytes"]) == received
            bits = -(-entries(2) // 8) if client not in seen else 0
            assert int(found["client/upload_bytes"]) == 4 * entries() + bits
        seen |= set(metrics)


def test_random_masks_are_as_large_and_each_clients_own():
    own = [np.asarray(flatten(memory.masks)) for memory in played(search="random", rounds=1).memories]
    common = [np.asarray(flatten(memory.masks)) for memory in played(search="common_random", rounds=1).memories]
    assert {int(mask.sum()) for mask in own + common} == {entries()}
    assert not (own[0] == own[1]).all()
    assert all((mask == common[0]).all() for mask in common)
    algorithm = build(search="common_random")
    seeds = {int(algorithm.init_server(regression(2).model.init(jax.random.key(k)), 1).seed) for k in range(3)}
    assert len(seeds) == 3, "another seed of the run must give another common mask"


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_a_clients_next_start_is_mixed_and_masked(mix):
    run, algorithm = played(), build(personal_mix=mix)
    for memory in run.memories:
        served = algorithm.serve(run.server, memory)
        average, own, mask = (
            np.asarray(flatten(tree))
            for tree in (jax.tree.map(lambda leaf: leaf[0], run.server.adapters), memory.adapters, memory.masks)
        )
        expected = np.where(mask, mix * average + (1 - mix) * own, 0)
        np.testing.assert_allclose(flatten(served.trainable), expected, rtol=1e-6, atol=1e-7)
        assert worst_difference(memory.masks, served.masks) == 0
        assert worst_difference(memory.adapters, algorithm.tuned(run.server, memory).trainable) == 0


def test_who_never_took_part_is_served_the_dense_average_of_all_groups():
    options = {"levels": (0.5, 1.5), "grouped": True}
    run, algorithm = played(rounds=1, cohort=5, **options), build(**options)
    absent = set(range(ALL)) - set(run.metrics[0])
    assert absent
    everybody = algorithm.serve(run.server, ())
    for client in absent:
        for view in (algorithm.serve, algorithm.tuned):
            served = view(run.server, run.memories[client])
            assert worst_difference(everybody.trainable, served.trainable) <= 1e-6
            assert all(mask.all() for mask in jax.tree.leaves(served.masks))


def test_empty_and_dead_parts_and_products_are_counted():
    run = played(search="random", rounds=1)
    for client, memory in enumerate(run.memories):
        dead = empty = products = possible = 0
        for module in memory.masks.values():
            a, b = np.asarray(module["a"]), np.asarray(module["b"])
            products += np.einsum("lik,lkj->", a.astype(int), b.astype(int))
            possible += a.size * b.shape[-1]
            for layer in range(a.shape[0]):
                empty += not (a[layer].any() or b[layer].any())
                for rank in range(2 * RANK):
                    in_a, in_b = a[layer, :, rank].sum(), b[layer, rank].sum()
                    dead += in_a if in_b == 0 else in_b if in_a == 0 else 0
        assert int(run.metrics[0][client]["client/dead_entries"]) == dead
        assert int(run.metrics[0][client]["client/empty_modules"]) == empty
        assert float(run.metrics[0][client]["client/product_share"]) == pytest.approx(products / possible)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match="at most algorithm.expansion = 2"):
        build(levels=(1.0, 2.5))
    with pytest.raises(ConfigurationError, match="at least one is needed"):
        build(levels=())
    with pytest.raises(ConfigurationError, match="warm_up = 0"):
        build(warm_up=0)
