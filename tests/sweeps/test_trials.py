"""A sweep's folder: trials keep their numbers, a sweep may only grow, and Optuna knows how it stands."""

import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState
from support.sweeps import opened, record_run, sweep_of, trial_with, trials_of

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.sweeps.run import assignments
from fedjax_qp.sweeps.space import Rank
from fedjax_qp.sweeps.trials import curve, open_storage, read_attempt, run_locks, value_of
from fedjax_qp.sweeps.worker import Task, split


def test_trials_keep_their_numbers_when_the_grid_grows(tmp_path):
    with opened(sweep_of(tmp_path, space={"local.epochs": [2, 4]})):
        pass
    with opened(sweep_of(tmp_path, space={"local.epochs": [1, 2, 3, 4]}, seeds=[0, 5])) as store:
        found = {trial.number: trial.settings["local.epochs"] for trial in trials_of(store)}
    assert found == {0: 2, 1: 4, 2: 1, 3: 3}


def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [2, 4]})
    with opened(sweep) as store:
        file, before = store.folder / "study.log", trials_of(store)
    file.write_bytes(file.read_bytes()[:-7])
    with opened(sweep) as store:
        assert trials_of(store) == before and len(before) == 2
    with opened(sweep) as store:  # and nothing stands behind half a line
        assert trials_of(store) == before


def test_two_processes_cannot_have_one_sweep(tmp_path):
    sweep = sweep_of(tmp_path)
    with opened(sweep), pytest.raises(ConfigurationError, match="another process"):
        opened(sweep)
    opened(sweep).close()  # it was given back


def test_a_sweep_that_cannot_open_gives_its_folder_back(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [2, 4]})
    with opened(sweep) as store:
        file = store.folder / "study.log"
    whole = file.read_bytes()
    file.write_bytes(b"what is this\n" + whole)
    with pytest.raises(
        ConfigurationError, match=r"study.log is damaged"
    ) as kept:  # the error keeps the half-made store
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
        assert len(trials_of(store)) == 1


def test_variants_may_be_added_but_not_changed(tmp_path):
    first = {"name": "a", "space": {"local.epochs": [2]}}
    with opened(sweep_of(tmp_path, variants=[first])):
        pass
    grown = {"name": "a", "space": {"local.epochs": [2, 3]}}
    added = {"name": "b", "settings": {"rounds": 2}}
    for _ in range(2):  # the second time it is as it was
        with opened(sweep_of(tmp_path, variants=[added, grown])) as store:
            assert [trial.name for trial in trials_of(store)] == ["a-000", "a-001", "b-000"]
    with pytest.raises(ConfigurationError, match="variants.b.settings.rounds: 2 → 3"):
        opened(sweep_of(tmp_path, variants=[{"name": "b", "settings": {"rounds": 3}}, grown]))


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (None, {"seeds": [1]}, None),
        ({"seeds": [1]}, {"seeds": [1, 2], "baseline": "a"}, None),
        ({"seeds": [1]}, {"seeds": [2]}, "compare.seeds"),
        ({"seeds": [1]}, {"seeds": [1], "rounds": 9}, "compare.rounds: None → 9"),
        ({"seeds": [1]}, None, "compare"),
    ],
)
def test_a_comparison_may_be_added_and_given_seeds(tmp_path, before, after, named):
    variants = [{"name": "a", "space": {"local.epochs": [1, 2]}}, {"name": "b"}]
    with opened(sweep_of(tmp_path, variants=variants, compare=before)):
        pass
    changed = sweep_of(tmp_path, variants=variants, compare=after)
    if named is None:
        opened(changed)
    else:
        with pytest.raises(ConfigurationError, match=named):
            opened(changed)


def test_optuna_knows_how_each_trial_ended(tmp_path):
    sweep = sweep_of(tmp_path, space={"local.epochs": [1, 2, 3, 4]}, seeds=[0, 1], rank={"last": 2})
    with opened(sweep) as store:
        whole, diverged, stopped, running = (trial_with(store, epochs) for epochs in (1, 2, 3, 4))
        for seed in (0, 1):
            record_run(store, whole, seed, [0.1, 0.4 + 0.2 * seed, 0.6 + 0.2 * seed])
            record_run(store, diverged, seed, [0.9], "diverged" if seed else "finished")
            record_run(store, stopped, seed, [0.3, 0.4], "given up by the median pruner in round 2")
        record_run(store, running, 0, [0.5, 0.5])
        record_run(store, running, 1, [0.5], None)
        assert [frozen.user_attrs["name"] for _, frozen in store.settle()] == ["trial-000", "trial-001", "trial-002"]
    found = optuna.load_study(study_name="small", storage=open_storage(store.folder)).trials  # as a dashboard reads it
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED, TrialState.RUNNING]
    assert [one.state for one in found] == states
    assert found[0].value == pytest.approx(0.6) and found[0].user_attrs["std"] == pytest.approx(0.02**0.5)
    assert [one.user_attrs.get("status") for one in found] == ["complete", "diverged", "stopped", None]
    assert found[2].user_attrs["reason"] == "given up by the median pruner in round 2"
    assert [one.params["local.epochs"] for one in found] == [1, 2, 3, 4]


def test_an_opened_sweep_goes_on_with_what_failed_and_with_further_seeds(tmp_path):
    settings = {"space": {"local.epochs": [1, 2, 3]}, "rank": {"last": 1}}
    with opened(sweep_of(tmp_path, **settings)) as store:
        for trial in trials_of(store)[:2]:
            record_run(store, trial, 0, [0.5, 0.7])
        failing = store.phase("small").run_folders(trials_of(store)[2])[0]
        store.failures[failing] = "out of memory"
        store.settle()
        states = [one.state for one in store.study("small").trials]
        assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
        assert store.study("small").trials[2].user_attrs["reason"] == "out of memory"
    with opened(sweep_of(tmp_path, **settings)) as store:
        left = [run.name for run in assignments(store, ["small"]) if store.waits(run.folder)]
        assert left == ["trial-002-seed0"]
        found = store.study("small").trials
        assert found[0].state is TrialState.COMPLETE and found[2].state is TrialState.RUNNING
        assert found[0].intermediate_values == {1: 0.5, 2: 0.7}
    with opened(sweep_of(tmp_path, seeds=[0, 1], **settings)) as store:
        assert all(one.state is TrialState.RUNNING for one in store.study("small").trials)
        left = [run.name for run in assignments(store, ["small"]) if store.waits(run.folder)]
        assert left == ["trial-000-seed1", "trial-001-seed1", "trial-002-seed0", "trial-002-seed1"]


def test_a_trial_is_worth_the_mean_over_seeds_of_its_last_evaluations():
    histories = [
        [{"round": n, "m": value} for n, value in rounds] for rounds in ([(1, 1.0), (2, 3.0)], [(2, 5.0), (3, 7.0)])
    ]
    histories[0].append({"round": 3})  # not evaluated
    assert curve(histories, Rank("m", "max", 2)) == {2: (2.0 + 5.0) / 2}
    assert curve(histories, Rank("m", "max", 1)) == {2: 4.0}
    value = value_of(histories, Rank("m", "max", 2))
    assert value is not None and (value.mean, value.seeds) == (4.0, 2)
    assert value_of([histories[0], []], Rank("m", "max", 2)) is None


def task_of(store, *names) -> Task:
    trial, phase = trials_of(store)[0], store.phase("small")
    runs = tuple(
        assignments(store, ["small"])[0]._replace(trial=trial._replace(name=n), seed=s, phase=phase) for n, s in names
    )
    return Task("task", str(store.folder), store.attempt, runs, None)


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


def test_the_package_needs_optuna_for_sweeps_only():
    code = "import sys, fedjax_qp, fedjax_qp.sweeps.space; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
