"""The median rule on made records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sweeps import opened, record_run, sweep_of

from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.sweeps.stopping import Curves, Judge, Peer, curve, number, value_at
from fedjax_qp.sweeps.trials import Store


def store_of(tmp_path, accuracies, **settings) -> Store:
    """A sweep whose trials have these accuracies, by trial and seed."""
    seeds = list(range(len(accuracies[0])))
    epochs = list(range(1, len(accuracies) + 1))
    settings = {"early_stopping": {"after": 2, "least_trials": 2}, "rank": {"last": 1}, **settings}
    sweep = sweep_of(tmp_path, space={"local.epochs": epochs}, seeds=seeds, **settings)
    store = opened(sweep)
    for trial, of_seeds in zip(store.trials, accuracies, strict=True):
        for seed, values in enumerate(of_seeds):
            record_run(store, trial, seed, values, None)
    return store


def verdict(
    store: Store, trial: int, seed: int, values: list[float], metric: str = "test_accuracy", together: tuple = ()
) -> str | None:
    peers = [Peer(one.name, one.point.variant) for one in store.trials]
    sweep = store.sweep
    judge = Judge(store.folder, store.attempt, sweep.rank, sweep.early_stopping, peers, sweep.seeds, together)
    return judge.verdict(f"trial{trial:03d}", seed, [{"round": n, metric: value} for n, value in enumerate(values, 1)])


def test_worse_than_the_median_of_the_others_at_the_same_round(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6, 0.9]], [[0.5, 0.7, 0.9]], [[0.5, 0.8]], [[]]])
    assert verdict(store, 3, 0, [0.1]) is None  # too early
    assert verdict(store, 3, 0, [0.1, 0.71]) is None
    assert verdict(store, 3, 0, [0.9, 0.69]) == "stopped early"  # the median is 0.7
    reason = (store.folder / "stopped" / "trial003.json").read_text()
    assert "0.69 in round 2" in reason and "median 0.7 of 3 other trials" in reason


def test_less_is_better_where_the_metric_says_so(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6]], [[0.5, 0.7]], [[]]], rank={"metric": "train_loss", "last": 1})
    assert verdict(store, 2, 0, [9.0, 0.99], "train_loss") is None  # the others' loss is 1
    assert verdict(store, 2, 0, [0.1, 1.01], "train_loss") == "stopped early"


def test_too_few_others(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6]], [[0.5]], [[]]])
    assert verdict(store, 2, 0, [0.1, 0.1]) is None  # only one of them has come to round 2


def test_a_trial_that_diverged_later_is_no_judge(tmp_path):
    store = store_of(tmp_path, [[[0.5, 0.6]], [[0.5, 0.7]], [[]]])
    assert verdict(store, 2, 0, [0.1, 0.1]) == "stopped early"
    (store.folder / "stopped" / "trial002.json").unlink()
    (store.run_folder(store.trials[0], 0) / "failure.json").write_text("{}")
    assert verdict(store, 2, 0, [0.1, 0.1]) is None  # one judge is left, and two are asked for


def test_rounds_that_are_computed_again_are_judged_as_before(tmp_path):
    """When round 2 was judged first, the trial beside it had not yet diverged."""
    store = store_of(tmp_path, [[[0.5, 0.6]], [[0.5, 0.7]], [[]]])
    folder = store.run_folder(store.trials[0], 0)
    RunFolder(folder).failure.path.write_text("{}")
    RunFolder(folder).end.path.write_text('{"reason": "diverged", "round": 2}')
    assert verdict(store, 2, 0, [0.1, 0.1], together=("trial000", "trial002")) == "stopped early"
    (store.folder / "stopped" / "trial002.json").unlink()
    RunFolder(folder).end.path.write_text('{"reason": "diverged", "round": 1}')
    assert verdict(store, 2, 0, [0.1, 0.1], together=("trial000", "trial002")) is None


def test_a_trial_is_judged_with_all_of_its_seeds_and_stops_with_all(tmp_path):
    good = [[0.5, 0.6], [0.5, 0.6]]
    store = store_of(tmp_path, [good, good, [[0.1, 0.1, 0.1], [0.1]]])
    assert verdict(store, 2, 0, [0.1, 0.1]) is None  # seed 1 is not there yet
    assert verdict(store, 2, 1, [0.1, 1.15]) is None  # together they are better
    assert verdict(store, 2, 1, [0.1, 0.9]) == "stopped early"
    assert verdict(store, 2, 0, [0.9, 0.9, 0.9]) == "stopped early"


def test_side_by_side_the_better_half_survives_every_judgement(tmp_path):
    """Eight equally long runs in order of goodness, judged in turn at each of six rounds."""
    curves = [[[0.1 * trial] * 6] for trial in range(1, 9)]
    store = store_of(tmp_path, curves)
    stopped = set()
    for round in range(1, 7):
        for trial in range(8):
            if trial not in stopped and verdict(store, trial, 0, curves[trial][0][:round]):
                stopped.add(trial)
    assert stopped == {0, 1, 2, 3}


def test_variants_are_judged_apart(tmp_path):
    variants = [{"name": "good", "space": {"local.epochs": [1, 2, 3]}}, {"name": "bad", "settings": {"rounds": 3}}]
    sweep = sweep_of(tmp_path, variants=variants, early_stopping={"after": 1, "least_trials": 2}, rank={"last": 1})
    store = opened(sweep)
    for trial in store.trials[:3]:
        record_run(store, trial, 0, [0.9, 0.9], None)
    assert verdict(store, 3, 0, [0.1, 0.1]) is None
    assert verdict(store, 2, 0, [0.1, 0.1]) == "stopped early"


def test_a_worker_of_an_earlier_attempt_leaves(tmp_path):
    store = store_of(tmp_path, [[[0.5]], [[0.5]]], early_stopping=None)
    assert verdict(store, 0, 0, [0.5]) is None
    sweep = store.sweep
    judge = Judge(store.folder, store.attempt, sweep.rank, None, [], sweep.seeds)
    store.end_attempt()
    assert judge.verdict("trial000", 0, [{"round": 1}]) == "interrupted"


def test_curves_follow_a_growing_file(tmp_path):
    store = store_of(tmp_path, [[[0.5]], [[]]])
    curves = Curves("test_accuracy")
    folder = store.run_folder(store.trials[0], 0)
    assert curves.curve(folder) == [(1, 0.5)]
    record_run(store, store.trials[0], 0, [0.5, 0.25], None)
    assert (curves.curve(folder), curves.rounds(folder)) == ([(1, 0.5), (2, 0.25)], 2)
    assert (curves.curve(tmp_path / "none"), curves.rounds(tmp_path / "none")) == ([], 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 9), st.integers(1, 9))
def test_the_value_is_the_mean_of_the_last_evaluations_up_to_a_round(values, round, last):
    found = value_at([(2 * n, value) for n, value in enumerate(values, 1)], 2 * round, last)
    kept = values[:round][-last:]
    assert found == pytest.approx(sum(kept) / len(kept))
    assert value_at([(5, 1.0)], 4, last) is None


def test_metrics_by_name():
    line = {"round": 1, "mutation/drift": 0.5, "personal": {"perplexity": {"mean": 3.0}}, "test_loss": None, "l": [1]}
    assert number(line, "mutation/drift") == 0.5
    assert number(line, "personal/perplexity/mean") == 3.0
    assert [number(line, name) for name in ("test_loss", "l", "personal", "personal/loss/mean", "x/y")] == [None] * 5
    assert curve([line, {"round": 2}], "mutation/drift") == [(1, 0.5)]
