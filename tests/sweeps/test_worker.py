"""What a worker tells Optuna of its runs, and what Optuna's pruners answer, on made records."""

import pytest
from support.sweeps import opened, record_run, sweep_of, trials_of

from fedjax_qp.sweeps import run as running
from fedjax_qp.sweeps.trials import Store
from fedjax_qp.sweeps.worker import Judge

MEDIAN = {"after": 2, "least_trials": 2}


def store_of(tmp_path, ended, **settings) -> Store:
    """A sweep whose first trials have ended with these accuracies, by trial and seed; one more has not begun."""
    epochs = list(range(1, len(ended) + 2))
    settings = {"early_stopping": MEDIAN, "rank": {"last": 1}, "space": {"local.epochs": epochs}, **settings}
    store = opened(sweep_of(tmp_path, seeds=list(range(len(ended[0]))), **settings))
    for trial, of_seeds in zip(trials_of(store), ended, strict=False):
        for seed, values in enumerate(of_seeds):
            record_run(store, trial, seed, values)
    store.settle()
    return store


def judge_of(store: Store) -> Judge:
    """Of the last trial, with all of its seeds."""
    last = trials_of(store)[-1]
    runs = [run for run in running.assignments(store, [last.study]) if run.trial == last]
    [task] = running.tasks_of(store, runs, 1)
    return Judge(task)


def history(values, metric="test_accuracy") -> list[dict]:
    return [{"round": n, metric: value} for n, value in enumerate(values, 1)]


def test_values_are_reported_round_by_round_once_all_seeds_are_there(tmp_path):
    store = store_of(tmp_path, [[[0.5], [0.5]]], early_stopping=None, rank={"last": 2})
    judge = judge_of(store)
    assert judge.verdict(0, history([0.1, 0.3])) is None
    assert store.study("small").trials[1].intermediate_values == {}
    assert judge.verdict(1, history([0.5, 0.7])) is None
    assert store.study("small").trials[1].intermediate_values == pytest.approx({1: 0.3, 2: 0.4})
    judge.verdict(0, history([0.1, 0.3, 0.5]))
    judge.verdict(1, history([0.5, 0.7, 0.9]))
    assert store.study("small").trials[1].intermediate_values == pytest.approx({1: 0.3, 2: 0.4, 3: 0.6})


def test_a_seed_of_another_task_is_read_from_its_folder(tmp_path):
    store = store_of(tmp_path, [[[0.5], [0.5]]])
    record_run(store, trials_of(store)[-1], 1, [0.3], None)
    judge_of(store).verdict(0, history([0.1]))
    assert store.study("small").trials[1].intermediate_values == {1: 0.2}


def test_worse_than_the_median_of_complete_trials_at_the_same_round(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6, 0.9]], [[0.5, 0.8, 0.9]]])
    assert judge_of(store).verdict(0, history([0.1])) is None  # too early
    assert judge_of(store).verdict(0, history([0.1, 0.69])) == "given up by the median pruner in round 2"


def test_better_than_the_median(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6, 0.9]], [[0.5, 0.8, 0.9]]])
    assert judge_of(store).verdict(0, history([0.1, 0.71])) is None


@pytest.mark.parametrize(("loss", "stopped"), [(0.99, False), (1.01, True)])
def test_less_is_better_where_the_metric_says_so(tmp_path, loss, stopped):
    store = store_of(tmp_path, [[[0.5, 0.6]], [[0.5, 0.7]]], rank={"metric": "train_loss", "last": 1})
    verdict = judge_of(store).verdict(0, history([9.0, loss], "train_loss"))  # the others' loss is 1
    assert (verdict is not None) is stopped


def test_too_few_complete_trials(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6]]])
    assert judge_of(store).verdict(0, history([0.1, 0.1])) is None


def test_a_trial_stops_with_all_of_its_seeds_and_after_a_kill_where_it_did(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6], [0.5, 0.6]], [[0.5, 0.6], [0.5, 0.6]]])
    judge = judge_of(store)
    assert judge.verdict(0, history([0.1, 0.1])) is None  # seed 1 is not there yet
    assert judge.verdict(1, history([0.1, 0.2])) == "given up by the median pruner in round 2"
    again = judge_of(store)
    assert again.verdict(0, history([0.1])) is None  # a round that is computed again
    assert again.verdict(0, history([0.1, 0.1, 0.9])) == "given up by the median pruner in round 2"


def test_halving_judges_trials_that_run_side_by_side(tmp_path):
    """Four runs of one program at the first rung: of each four that have come there the best goes on."""
    sweep = sweep_of(tmp_path, space={"local.epochs": [1, 2, 3, 4]}, early_stopping={"pruner": "halving", "after": 2})
    store = opened(sweep)
    [task] = running.tasks_of(store, running.assignments(store, ["small"]), 1)
    judge = Judge(task)
    assert [judge.verdict(place, history([0.9])) for place in range(4)] == [None] * 4  # too early
    said = [judge.verdict(place, history([0.9, value])) for place, value in enumerate((0.5, 0.4, 0.6, 0.3))]
    assert [verdict is None for verdict in said] == [True, False, True, False]


def test_variants_are_judged_apart(tmp_path):
    variants = [{"name": "good", "space": {"local.epochs": [1, 2]}}, {"name": "bad", "settings": {"rounds": 3}}]
    store = opened(sweep_of(tmp_path, variants=variants, early_stopping=MEDIAN, rank={"last": 1}))
    for trial in trials_of(store)[:2]:
        record_run(store, trial, 0, [0.9, 0.9])
    store.settle()
    assert judge_of(store).verdict(0, history([0.1, 0.1])) is None


def test_a_worker_of_an_earlier_attempt_leaves(tmp_path):
    store = store_of(tmp_path, [[[0.5]]], early_stopping=None)
    judge = judge_of(store)
    assert judge.verdict(0, history([0.5])) is None
    store.end_attempt()
    assert judge.verdict(0, history([0.5, 0.5])) == "interrupted"
