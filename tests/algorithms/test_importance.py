"""Laws of PerFIT's pruning: exact numbers, ties by index, a schedule that ends where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.algorithms.importance import by_rank, flatten, keep_top, schedule, taylor_scores, unflatten

ADAPTERS = {
    "q_proj": {"a": jnp.arange(6.0).reshape(1, 3, 2) - 2, "b": jnp.ones((1, 2, 4))},
    "v_proj": {"a": jnp.full((1, 3, 2), 0.5), "b": jnp.zeros((1, 2, 1))},
}


@settings(max_examples=50, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 5, 12]))  # each compiles
def test_exactly_so_many_are_kept_and_ties_go_by_index(data, size):
    """Scores from three values only, so that most are tied; what was pruned before never comes back."""
    scores = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=size, max_size=size)), np.float32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    count = data.draw(st.integers(0, int(mask.sum())))
    kept = np.asarray(jax.jit(keep_top)(jnp.array(scores), jnp.array(mask), jnp.int32(count)))
    expected = np.zeros(size, bool)
    expected[sorted(np.flatnonzero(mask), key=lambda p: (-scores[p], p))[:count]] = True
    np.testing.assert_array_equal(kept, expected)


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 10**7), share=st.floats(0, 1), prunings=st.sampled_from([1, 2, 8]))
def test_the_schedule_falls_and_ends_exactly_at_the_budget(total, share, prunings):
    budget = max(1, int(share * total))
    counts = np.asarray(schedule(total, jnp.int32(budget), prunings), np.int64)
    assert counts.shape == (prunings,)
    assert counts[-1] == budget
    assert (np.diff(counts) <= 0).all()
    expected = total * (budget / total) ** (np.arange(1, prunings + 1) / prunings)
    np.testing.assert_allclose(counts, expected, rtol=1e-4, atol=1)


def test_scores_are_the_products_and_flatten_has_an_inverse():
    gradient = {name: {side: leaf + 1 for side, leaf in module.items()} for name, module in ADAPTERS.items()}
    scores = unflatten(taylor_scores(ADAPTERS, gradient), ADAPTERS)
    for name, module in ADAPTERS.items():
        for side, theta in module.items():
            np.testing.assert_array_equal(scores[name][side], np.abs(theta * (theta + 1)))
    assert flatten(ADAPTERS).shape == (6 + 8 + 6 + 2,)


def test_a_rank_has_the_mean_score_of_its_column_and_row():
    scores = np.random.default_rng(0).random(22).astype(np.float32)
    tree = unflatten(jnp.array(scores), ADAPTERS)
    found = unflatten(by_rank(jnp.array(scores), ADAPTERS), ADAPTERS)
    for name, sides in tree.items():
        for rank in range(2):
            mean = np.concatenate([sides["a"][0, :, rank], sides["b"][0, rank]]).mean()
            np.testing.assert_allclose(found[name]["a"][0, :, rank], mean, rtol=1e-6)
            np.testing.assert_allclose(found[name]["b"][0, rank], mean, rtol=1e-6)


def test_one_pruning_goes_straight_to_the_budget():
    assert schedule(10, jnp.int32(3), 1).tolist() == [3]
    assert schedule(16, jnp.int32(4), 2).tolist() == pytest.approx([8, 4], abs=1)
