"""Training examples on the host: the same results, and a device sees the examples of its own lanes alone."""

import jax
import numpy as np
import pytest
from support.federations import federation_of, small_algorithm

from fedjax_qp.contract.federations import (
    ROUNDS,
    images,
    run_rounds,
    small_engine,
    small_plan,
    small_work,
    worst_difference,
)
from fedjax_qp.engine.host_data import HostExamples
from fedjax_qp.engine.plan import IDLE


@pytest.mark.parametrize(
    ("case", "parallel", "devices"),
    [
        ("fedqp-nearest", "vmap", 1),
        ("fedavg", "shard_map", 4),
        ("fedavg", "pmap", 4),
        pytest.param("perfit", "shard_map", 2, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_with_the_data_on_the_device(case, parallel, devices):
    """PerFIT reads examples in its preparations too."""
    algorithm, federation = small_algorithm(case), federation_of(case)
    states = [
        run_rounds(
            algorithm,
            small_engine(algorithm, parallel, devices, federation, data_store),
            lanes=4,
            rounds=2 * ROUNDS,
            federation=federation,
        )[0]
        for data_store in ("device", "host")
    ]
    assert worst_difference(*states) <= 1e-6


def test_each_device_gets_the_examples_of_its_lanes():
    plan, train = small_plan(0, ROUNDS, lanes=4), images().train
    local, tables = HostExamples(train, devices=2).take(plan)
    rows = len(tables.labels) // 2
    for device in range(2):
        mine, numbers = (p.lanes.examples[2 * device : 2 * device + 2] for p in (local, plan))
        np.testing.assert_array_equal(mine == IDLE, numbers == IDLE)
        own = tables.inputs[device * rows : (device + 1) * rows]
        np.testing.assert_array_equal(own[mine[mine != IDLE]], train.inputs[numbers[numbers != IDLE]])
        named = {image.tobytes() for image in np.asarray(train.inputs)[np.unique(numbers[numbers != IDLE])]}
        assert {image.tobytes() for image in np.asarray(own)} == named


def test_tables_keep_their_shape(compilations):
    """Later chunks, a round of which has less work, find the same program."""
    algorithm = small_algorithm("fedavg")
    engine = small_engine(algorithm, "shard_map", 2, data_store="host")
    run_rounds(algorithm, engine, lanes=2)
    before = compilations()
    run_rounds(algorithm, engine, lanes=2, rounds=3 * ROUNDS)
    assert compilations() == before
    store, work = HostExamples(images().train, devices=2), small_work()
    sizes = [
        len(jax.tree.leaves(store.take(small_plan(0, rounds, lanes=2, work=work))[1])[0]) for rounds in (ROUNDS, 1)
    ]
    assert sizes[0] == sizes[1]
