"""Plans are complete, packed well, within their bound, and functions of (seed, round) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.config import Local, Participation
from fedjax_qp.engine.plan import (
    IDLE,
    Workload,
    client_batches,
    client_steps,
    pack,
    plan_bytes,
    plan_chunk,
    sample_cohort,
    steps_bound,
)
from fedjax_qp.federated import Preparation


def workload(
    sizes: list[int], *, cohort: int = 2, seed: int = 0, epochs: int = 2, batch_size: int = 4, **changes
) -> Workload:
    parts = [np.arange(size) + sum(sizes[:index]) for index, size in enumerate(sizes)]
    local = Local(epochs=epochs, batch_size=batch_size, maximum_steps=changes.pop("maximum_steps", None))
    return Workload(parts, Participation(cohort=cohort, **changes), local, seed)


def chunk(work: Workload, lanes: int, first_round: int = 0, rounds: int = 3):
    return plan_chunk([work], first_round, rounds, capacity=rounds, lanes=lanes, evaluate_every=2, last_round=5)


federations = st.lists(st.integers(1, 30), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=federations, lanes=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_every_cohort_member_sees_each_of_its_examples_once_an_epoch(sizes, lanes, seed, data):
    work = workload(sizes, cohort=data.draw(st.integers(1, len(sizes))), seed=seed)
    plan = chunk(work, lanes)
    for round in range(3):
        cohort = plan.cohorts.clients[round]
        assert len(set(cohort)) == len(cohort)
        for slot, client in enumerate(cohort):
            lane, step = np.nonzero(plan.lanes.slots[:, round] == slot)
            assert len(set(lane)) == 1
            np.testing.assert_array_equal(plan.lanes.local_steps[lane[0], round, step], np.arange(len(step)))
            np.testing.assert_array_equal(step, np.arange(step[0], step[0] + len(step)))
            seen = plan.lanes.examples[lane[0], round, step]
            examples, times = np.unique(seen[seen != IDLE], return_counts=True)
            np.testing.assert_array_equal(examples, work.parts[client])
            assert (times == work.local.epochs).all()


@settings(max_examples=60, deadline=None)
@given(sizes=federations, lanes=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_round_exceeds_the_bound(sizes, lanes, seed):
    work = workload(sizes, cohort=len(sizes) // 2 + 1, seed=seed)
    plan = chunk(work, lanes)
    assert plan.lanes.slots.shape == (lanes, 3, steps_bound([work], lanes))
    np.testing.assert_array_equal((plan.lanes.slots != IDLE).sum(2), plan.lanes.steps)


@pytest.mark.parametrize("preparation", [None, Preparation(batches=3, charged=1)])
@pytest.mark.parametrize("lanes", [1, 3])
def test_the_bytes_of_a_plan_are_known_before_it_is_made(lanes, preparation):
    work = workload([30, 8, 21, 13], cohort=3)._replace(preparation=preparation)
    plan = chunk(work, lanes)
    large = [
        *plan.cohorts,
        plan.rows,
        *plan.lanes[:3],
        *plan.preparations[:2],
    ]  # the others are one number a round and lane
    assert plan_bytes(work, 3, lanes) == sum(np.asarray(leaf).nbytes for leaf in large)


def test_packing_puts_the_longest_first_into_the_emptiest_lane():
    assert pack(np.array([5, 9, 4, 0, 3]), 2) == [[1, 4], [0, 2]]
    assert pack(np.array([1]), 3) == [[0], [], []]


def test_a_plan_does_not_depend_on_lanes_chunks_or_earlier_rounds():
    work = workload([3, 17, 9, 30], cohort=3)
    alone = chunk(work, lanes=1, first_round=2, rounds=1)
    within = chunk(work, lanes=3, first_round=0, rounds=3)
    np.testing.assert_array_equal(alone.cohorts.clients[0], within.cohorts.clients[2])
    for slot in range(3):
        one = alone.lanes.examples[:, 0][alone.lanes.slots[:, 0] == slot]
        other = within.lanes.examples[:, 2][within.lanes.slots[:, 2] == slot]
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("every", [None, 3])
def test_who_prepares_does_not_depend_on_the_chunks(every):
    work = workload([12, 17, 9, 30], cohort=2, dropout=0.3)
    work = work._replace(preparation=Preparation(batches=1, every=every, charged=1))
    whole = chunk(work, lanes=1, rounds=12)
    turns = np.concatenate([chunk(work, 1, round, rounds=1).preparations.turns for round in range(12)], axis=1)
    np.testing.assert_array_equal(whole.preparations.turns, turns)
    reported: set[int] = set()
    for round in range(12):
        if every is not None and round % every == 0:
            reported.clear()
        cohort = sample_cohort(work, round)
        clients = cohort.clients[cohort.steps > 0].tolist()
        assert whole.preparations.turns[0, round] == len(set(clients) - reported)
        reported.update(clients)


def test_evaluation_falls_on_multiples_and_on_the_last_round():
    np.testing.assert_array_equal(chunk(workload([4, 4]), 1, rounds=5).evaluate, [False, True, False, True, True])


def test_the_last_partial_batch_is_kept_and_padded():
    work = workload([6], cohort=1, epochs=1)
    batches = client_batches(work, 0, 0, 2)
    assert (batches != IDLE).sum(1).tolist() == [4, 2]
    assert client_steps(6, work.local) == 2


def test_dropouts_and_stragglers_are_in_the_plan():
    work = workload([40] * 50, cohort=50, dropout=0.3, stragglers=0.5, straggler_work=0.25)
    full = client_steps(40, work.local)
    steps = np.concatenate([sample_cohort(work, round).steps for round in range(40)])
    assert set(steps) == {0, full, full // 4}
    assert (steps == 0).mean() == pytest.approx(0.3, abs=0.05)
    assert (steps == full // 4).mean() == pytest.approx(0.35, abs=0.05)
    plan = chunk(work, lanes=4)
    planned = {slot for slot in np.unique(plan.lanes.slots[:, 0]) if slot != IDLE}
    assert planned == set(np.flatnonzero(plan.cohorts.steps[0]))


def test_maximum_steps_cuts_the_work():
    assert client_steps(1000, Local(epochs=5, batch_size=10, maximum_steps=2)) == 2


def test_cohorts_sample_all_clients_alike():
    work = workload([5] * 10, cohort=3)
    drawn = np.concatenate([sample_cohort(work, round).clients for round in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 0.1, atol=0.015)
