"""A sweep's folder: trials keep their numbers, and a sweep may only grow."""

import pytest
from support.sweeps import opened, record_run, sweep_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.run import assignments
from fedjax_qp.sweeps.space import base_values
from fedjax_qp.sweeps.trials import read_attempt, run_locks
from fedjax_qp.sweeps.worker import Assignment, Task, mark_failed, split, unfinished


def test_trials_keep_their_numbers_when_the_grid_grows(tmp_path):
    with opened(sweep_of(tmp_path, space={"local.epochs": [2, 4]})):
        pass
    with opened(sweep_of(tmp_path, space={"local.epochs": [1, 2, 3, 4]}, seeds=[0, 5])) as store:
        found = {trial.number: trial.point.settings["local.epochs"] for trial in store.trials}
    assert found == {0: 2, 1: 4, 2: 1, 3: 3}


def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [2, 4]})
    with opened(sweep) as store:
        file = store.folder / "trials.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with opened(sweep) as store:
        assert [trial.number for trial in store.trials] == [0, 1]
    assert file.read_bytes() == whole


def test_two_processes_cannot_have_one_sweep(tmp_path):
    sweep = sweep_of(tmp_path)
    with opened(sweep), pytest.raises(ConfigurationError, match="another process"):
        opened(sweep)
    opened(sweep).close()  # it was given back


def test_a_sweep_that_cannot_open_gives_its_folder_back(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [2, 4]})
    with opened(sweep) as store:
        file = store.folder / "trials.jsonl"
    whole = file.read_bytes()
    file.write_text('{"number": 7}\n')
    with pytest.raises(ConfigurationError, match="is not trial 0") as kept:  # the error keeps the half-made store
        opened(sweep)
    file.write_bytes(whole)
    opened(sweep).close()
    del kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {"local.epochs": [2]}}, "space.local.epochs"),
        ({"space": {"local.epochs": [2, 4], "rounds": [3]}}, "space.rounds"),
        ({"seeds": [1]}, "seeds"),
        ({"overrides": {"rounds": 9}}, "base.rounds: 4 → 9"),
        ({"search": "random", "trials": 2}, "search: 'grid' → 'random'"),
        ({"variants": [{"name": "a"}]}, "variants"),
        ({"early_stopping": {}}, "early_stopping"),
    ],
)
def test_a_change_to_the_past_is_refused_and_named(tmp_path, changes, named):
    same = {"space": {"local.epochs": [2, 4]}}
    with opened(sweep_of(tmp_path, **same)):
        pass
    with pytest.raises(ConfigurationError, match=named):
        opened(sweep_of(tmp_path, **{**same, **changes}))


@pytest.mark.parametrize("changes", [{"workers": 3}, {"rank": {"last": 3}}, {"retries": 0}, {"runs_per_task": 1}])
def test_what_changes_no_run_may_change(tmp_path, changes):
    with opened(sweep_of(tmp_path)):
        pass
    with opened(sweep_of(tmp_path, **changes)) as store:
        assert len(store.trials) == 1


def test_variants_may_be_added_but_not_changed(tmp_path):
    first = {"name": "a", "space": {"local.epochs": [2]}}
    with opened(sweep_of(tmp_path, variants=[first])):
        pass
    grown = {"name": "a", "space": {"local.epochs": [2, 3]}}
    with opened(sweep_of(tmp_path, variants=[{"name": "b", "settings": {"rounds": 2}}, grown])) as store:
        assert [trial.point.variant for trial in store.trials] == ["a", "b", "a"]
    with pytest.raises(ConfigurationError, match="variants.b.settings.rounds: 2 → 3"):
        opened(sweep_of(tmp_path, variants=[{"name": "b", "settings": {"rounds": 3}}, grown]))


def test_failed_runs_are_tried_again_and_ended_ones_are_not(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [1, 2, 3, 4]})
    with opened(sweep) as store:
        for trial, status in zip(store.trials, ("complete", "diverged", "failed", None), strict=True):
            record_run(store, trial, 0, [0.5], status)
        left = unfinished(store.folder, assignments(store, base_values(sweep), store.trials))
    assert [run.trial for run in left] == ["trial002", "trial003"]


def task_of(store, *names) -> Task:
    runs = tuple(Assignment(name, seed, {}) for name, seed in names)
    return Task("task", str(store.folder), store.attempt, runs, store.sweep.rank, None, (), (0, 1))


def test_a_task_is_taken_apart_between_trials_down_to_single_runs(tmp_path):
    with opened(sweep_of(tmp_path)) as store:
        parts, keys = [task_of(store, ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0))], set()
        first = split(parts[0])
        assert first is not None and [len(part.runs) for part in first] == [2, 3]
        singles = []
        while parts:
            part = parts.pop()
            keys.add(part.key)
            halves = split(part)
            if halves is None:
                singles.append(part.runs[0].name)
            parts += halves or ()
        assert sorted(singles) == ["a-seed0", "a-seed1", "b-seed0", "b-seed1", "c-seed0"]
        assert len(keys) == 9  # Dask would take two tasks of one key for the same
        mark_failed(task_of(store, ("a", 0)), "out of memory")
        assert store.trials[0].name == "trial000"
        assert (store.runs_folder / "a-seed0" / "outcome.json").read_text().count("out of memory") == 1


def test_a_lock_is_waited_for_until_the_sweep_has_ended(tmp_path):
    with opened(sweep_of(tmp_path)) as store:
        attempt, waits = store.attempt, []

        def wait() -> None:
            waits.append(1)
            if len(waits) == 3:
                store.end_attempt()

        def given_up() -> bool:
            return read_attempt(store.folder) != attempt

        with (
            run_locks(store.folder, ["a", "b"], given_up, wait) as first,
            run_locks(store.folder, ["b"], given_up, wait) as second,
        ):
            assert (first, second, len(waits)) == (True, False, 3)
        with run_locks(store.folder, ["a", "b"], given_up, wait) as again:
            assert again
