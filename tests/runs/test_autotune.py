"""`lanes: auto` keeps to the device's memory, and says what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import write

from fedjax_qp import config
from fedjax_qp.engine import Layout, bytes_needed, devices
from fedjax_qp.engine import layout as layouts
from fedjax_qp.engine.layout import open_layouts
from fedjax_qp.experiment import build
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import autotune as lanes
from fedjax_qp.runs.autotune import LaneTimer, choose_layout, memory_budget


def made(folder, *overrides, devices="1", rounds=1000000):
    """By default so long a run that a search for the best layout pays."""
    changes = [f"rounds={rounds}", "engine.lanes=auto", f"engine.devices={devices}", *overrides]
    return build(config.load(write(folder, algorithm="fedavg"), changes))


def timer_of(experiment, lanes, devices=1):
    return LaneTimer([experiment], Layout(lanes, devices))


def test_a_number_of_lanes_that_exceeds_the_memory_is_not_run(tmp_path, monkeypatch):
    """The budget lies between what one lane and what two lanes take."""
    experiment = made(tmp_path)
    one, two = (timer_of(experiment, count).bytes for count in (1, 2))
    assert one < two
    ran = []
    measured = LaneTimer.__call__
    monkeypatch.setattr(LaneTimer, "__call__", lambda timer: ran.append(timer.lanes) or measured(timer))
    budget = (one + two) / 2 / 2**30
    choice = choose_layout([made(tmp_path, f"engine.memory_gigabytes={budget}")])
    assert set(ran) == {1} and choice.layout.lanes == 1
    (found,) = choice.too_large
    assert (found.layout.lanes, found.bytes, found.skipped) == (2, two, [3, 4])
    assert "not tried: 2, which takes" in str(choice) and "nor 3, 4" in str(choice)
    assert "engine.memory_gigabytes" in str(choice) and "1: " in str(choice)


def test_too_little_memory_for_any_lane_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"1 lane\(s\).*take.*GiB of.*local.batch_size.*at least"):
        choose_layout([made(tmp_path, "engine.memory_gigabytes=0.0001")])


def test_the_budget_is_the_devices(tmp_path, monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    settings = made(tmp_path).config.engine
    whole = memory_budget(settings, Layout(1)).bytes
    assert 0 < whole < lanes.psutil.virtual_memory().total
    monkeypatch.setattr(lanes.jax, "local_devices", lambda: [Device()])
    assert memory_budget(settings, Layout(1)).bytes == 800


def test_the_bytes_of_a_program_are_counted_with_its_arguments():
    """200 × 200 floats come in, a product of theirs is kept for the second, and one comes out."""
    matrix = jnp.ones((200, 200))
    compiled = jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(matrix).compile()
    assert bytes_needed(compiled) >= 3 * matrix.nbytes


def test_a_runs_client_memories_count_though_the_trial_has_fewer(tmp_path):
    """Ditto keeps a model for each of the twelve clients; the trial has those of a cohort of four."""
    experiment = build(config.load(write(tmp_path, algorithm="ditto"), ["engine.lanes=auto", "engine.devices=1"]))
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    one = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    timer = timer_of(experiment, 1)
    beyond = timer.bytes - bytes_needed(timer.engine.compiled(timer.state, timer.plans[min(timer.plans)]))
    members = experiment.config.participation.cohort
    np.testing.assert_allclose(beyond, (len(experiment.work.parts) - members) * one, rtol=0.05)


def test_all_cores_or_one_device_whichever_is_faster(tmp_path, monkeypatch):
    """The rounds are said to take as long as a trial has lanes for each device: two devices with a lane each then win."""
    monkeypatch.setattr(layouts, "cores", lambda: 2)
    monkeypatch.setattr(LaneTimer, "__call__", lambda timer: timer.lanes / timer.layout.devices)
    experiment = made(tmp_path, devices="auto")
    assert experiment.config.engine.devices == "auto"
    choice = choose_layout([experiment])
    assert {trial.layout.devices for trial in choice.trials} == {1, 2}
    assert "lanes: 2 on 2 devices" in str(choice)
    assert choice.layout == Layout(2, 2, parallel="shard_map")
    assert experiment.config.engine.lanes == "auto", "a measurement changes no setting"


@pytest.mark.parametrize(("power", "tried"), [(0.0, [1, 2, 3, 4]), (1.2, [1, 2])])
def test_more_lanes_are_tried_only_while_they_may_win(tmp_path, monkeypatch, power, tried):
    """On a device that is far from full a step takes as long with more lanes; on a full one longer still than the clients."""
    monkeypatch.setattr(LaneTimer, "__call__", lambda timer: float(timer.lanes) ** power)
    choice = choose_layout([made(tmp_path)])
    assert [trial.layout.lanes for trial in choice.trials] == tried
    assert choice.layout.lanes == (tried[-1] if power == 0 else 1)


def test_a_short_run_does_not_search_for_longer_than_it_trains(tmp_path, monkeypatch):
    """A round takes a millisecond here: no second program is compiled for four of them."""
    monkeypatch.setattr(LaneTimer, "__call__", lambda timer: 1e-4 / timer.lanes)
    assert [trial.layout.lanes for trial in choose_layout([made(tmp_path, rounds=4)]).trials] == [1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["engine.lanes=2"], [[Layout(2)]]),
        (["engine.lanes=2", "engine.devices=2"], [[Layout(2, 2, parallel="shard_map")]]),
        (["engine.lanes=2", "engine.devices=2", "engine.parallel=pmap"], [[Layout(2, 2, parallel="pmap")]]),
        (["engine.lanes=auto", "engine.parallel=vmap"], [[Layout(1), Layout(2), Layout(3), Layout(4)]]),
        (
            ["engine.lanes=auto"],
            [
                [Layout(2, 2, parallel="shard_map"), Layout(4, 2, parallel="shard_map")],
                [Layout(1), Layout(2), Layout(3), Layout(4)],
            ],
        ),
    ],
)
def test_the_layouts_that_settings_leave_open(tmp_path, settings, expected, monkeypatch):
    monkeypatch.setattr(layouts, "cores", lambda: 2)
    assert open_layouts(config.load(write(tmp_path), settings).engine, 4) == expected


def test_every_core_is_a_device_unless_the_environment_says_otherwise(monkeypatch):
    asked = {}
    monkeypatch.setattr(devices.jax.config, "update", asked.__setitem__)
    devices.cores_as_devices()
    assert asked == {}, "these tests say how many"
    monkeypatch.delenv("XLA_FLAGS")
    devices.cores_as_devices()
    assert asked == {"jax_num_cpu_devices": devices.cores()}


def test_a_process_that_was_given_few_threads_has_few_cores(monkeypatch):
    monkeypatch.setattr(devices.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: range(4), raising=False)
    assert devices.cores() == 4
    monkeypatch.setenv("PJRT_NPROC", "2")
    assert devices.cores() == 2


def test_as_many_devices_as_clients_of_all_runs(monkeypatch):
    monkeypatch.setattr(layouts, "cores", lambda: 8)

    def numbers(settings, clients):
        return [options[0].devices for options in open_layouts(settings, clients)]

    assert numbers(config.Engine(), 4) == [4, 1]
    assert numbers(config.Engine(), 3 * 4) == [8, 1]
    assert numbers(config.Engine(devices=2), 4) == [2]
