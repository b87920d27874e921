"""Laws of the examples that are held out of each client's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.data import hold_out
from fedjax_qp.registry import ConfigurationError


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(6, 30), min_size=1, max_size=6),
    test=st.integers(0, 5),
    train=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_hold_out_laws(sizes, test, train, seed):
    parts = np.split(np.random.default_rng(seed).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    kept, held_out = hold_out(parts, np.random.default_rng(seed), test=test, train=train)
    for part, left, taken in zip(parts, kept, held_out, strict=True):
        assert len(taken) == test and len(left) == min(len(part) - test, train or len(part))
        both = np.concatenate([left, taken])
        assert len(np.unique(both)) == len(both) and np.isin(both, part).all()
        assert (np.diff(left) > 0).all() and (np.diff(taken) > 0).all()
    # What is held out of a client depends neither on `train` nor on the other clients' sizes.
    others = [np.arange(test + 1), *parts[1:]] if len(parts) > 1 else parts
    all_kept, same = hold_out(others, np.random.default_rng(seed), test=test)
    np.testing.assert_array_equal(same[-1], held_out[-1])
    assert np.isin(kept[-1], all_kept[-1]).all()


def test_hold_out_draws_differ_by_client_and_seed():
    parts = [np.arange(50), np.arange(50)]
    draws = [hold_out(parts, np.random.default_rng(seed), test=10)[1] for seed in range(2)]
    assert len({tuple(part) for draw in draws for part in draw}) == 4


def test_hold_out_explains_what_cannot_be():
    parts = [np.arange(9), np.arange(4)]
    with pytest.raises(ConfigurationError, match=r"client 1 has 4 examples.*test = 4.*Lower test"):
        hold_out(parts, np.random.default_rng(0), test=4)
    for options, message in (({"test": -1}, "test = -1"), ({"test": 1, "train": 0}, "train = 0")):
        with pytest.raises(ConfigurationError, match=message):
            hold_out(parts, np.random.default_rng(0), **options)
