"""Gradients of several batches in one step of the clients' optimizer."""

import jax
import numpy as np
import pytest

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Local, Participation
from fedjax_qp.contract.federations import digits, small_engine, small_model, small_state, worst_difference
from fedjax_qp.engine.plan import Workload, plan_chunk
from fedjax_qp.experiment import build, local_optimizer
from fedjax_qp.registry import ConfigurationError

SIZES = [16, 32, 24, 16, 8, 40, 16, 16, 8, 8, 16, 8]


def trained(batch_size: int, accumulate: int):
    """One round of FedAvg with full batches. Of one permutation, two batches of 4 are one of 8."""
    local = Local(learning_rate=0.05, momentum=0.9, epochs=1, batch_size=batch_size, accumulate=accumulate)
    ends = np.cumsum(SIZES)
    members = [np.arange(end - size, end) for size, end in zip(SIZES, ends, strict=True)]
    work = Workload(members, Participation(cohort=4), local, seed=0)
    algorithm = algorithms["fedavg"](small_model(), local_optimizer(local))
    plan = plan_chunk([work], 0, 1, capacity=1, lanes=3, evaluate_every=1, last_round=9)
    engine = small_engine(algorithm)
    state, _ = engine.run(engine.place_states([small_state(algorithm)]), engine.place_plan(plan))
    return jax.device_get(state.server)


def test_two_batches_accumulated_are_one_of_twice_the_size():
    assert len(digits().train.labels) >= sum(SIZES)
    whole, halves, single = trained(8, 1), trained(4, 2), trained(4, 1)
    assert worst_difference(whole, halves) <= 1e-5
    assert worst_difference(whole, single) > 1e-3  # it is not all the same


@pytest.mark.parametrize(
    ("partition", "accumulate"), [({"name": "iid", "clients": 20}, 12), ({"name": "iid", "clients": 20}, 100)]
)
def test_a_client_that_would_never_move_is_refused(partition, accumulate):
    settings = {"name": "x", "data": "digits", "partition": partition, "model": "mlp", "algorithm": "fedavg"}
    with pytest.raises(
        ConfigurationError, match=f"local.accumulate = {accumulate} is more than the [0-9]+ local steps"
    ):
        build(config.from_dict({**settings, "local": {"accumulate": accumulate, "epochs": 1}}))


def test_a_straggler_that_would_never_move_is_refused():
    settings = {"name": "x", "data": "digits", "partition": {"name": "iid", "clients": 20}, "model": "mlp"}
    settings |= {"algorithm": "fedavg", "local": {"accumulate": 4, "epochs": 1, "batch_size": 10}}
    assert build(config.from_dict(settings)).config.local.accumulate == 4
    late = {"stragglers": 0.1, "straggler_work": 0.25}
    with pytest.raises(ConfigurationError, match="local.accumulate = 4 is more than the 2 local steps"):
        build(config.from_dict({**settings, "participation": late}))
