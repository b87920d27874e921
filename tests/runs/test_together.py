"""Several runs in one program are the runs they would be alone."""

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from support.contract import assert_agree, reference
from support.federations import CASES, federation_of
from support.runs import write

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Config
from fedjax_qp.contract.federations import ROUNDS, small_state, small_work, worst_difference
from fedjax_qp.engine import Data, Layout, Runs, make_engine
from fedjax_qp.engine.chunk import run_chunk
from fedjax_qp.engine.plan import plan_chunk
from fedjax_qp.experiment import build, first_state
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.programs import groups
from fedjax_qp.runs.run import resume, run, run_all

QUIET = Console(quiet=True)


def method_of(case: str):
    name, options, _ = CASES[case]
    resolved, federation = algorithms.resolve(name, dict(options)), federation_of(case)
    floats = {key: value for key, value in resolved.items() if isinstance(value, float)}

    def method(settings):
        return algorithms[name](federation.model, federation.optimizer, **{**resolved, **settings})

    return method, floats


def joint_plan(case: str, method, runs: int, lanes: int):
    work = small_work(federation_of(case), method({}))
    return plan_chunk([work] * runs, 0, ROUNDS, capacity=ROUNDS, lanes=lanes, evaluate_every=1, last_round=100)


def begin(case: str, method, runs: int):
    return [small_state(method({}), federation=federation_of(case))] * runs


@pytest.mark.parametrize("case", CASES)
def test_every_float_option_may_be_an_array(case):
    """So that `runs.programs.groups` may take it for granted of any registered method."""
    method, floats = method_of(case)
    federation = federation_of(case)
    runs = Runs(
        {name: np.full(2, value, np.float32) for name, value in floats.items()}, jax.random.split(jax.random.key(0))
    )
    data = Data(federation.frozen, federation.train, federation.test, federation.personal)
    state, metrics = jax.eval_shape(
        partial(run_chunk, method, federation.model, None),
        jax.tree.map(lambda *leaves: np.stack(leaves), *begin(case, method, 2)),
        data,
        joint_plan(case, method, 2, lanes=2),
        runs,
    )
    assert state.round.shape == (2,)
    assert metrics["client/loss"].shape == (ROUNDS, 2, 5)


@pytest.mark.parametrize(
    ("case", "parallel", "devices"),
    [
        ("fedprox", "vmap", 1),
        ("fedqp-history", "vmap", 1),
        pytest.param("fedqp-history", "shard_map", 8, marks=pytest.mark.slow),
        pytest.param("fedqp-clients", "vmap", 1, marks=pytest.mark.slow),  # sees every upload
        ("ditto", "vmap", 1),  # has client memory
        pytest.param("perfit", "vmap", 1, marks=pytest.mark.slow),  # prepares its clients
    ],
)
def test_a_run_among_others_is_the_run_alone(case, parallel, devices):
    """With other options and seeds beside it, in the first place or in the last."""
    method, floats = method_of(case)
    federation = federation_of(case)
    plan = joint_plan(case, method, 3, lanes=8)
    data = Data(federation.frozen, federation.train, federation.test, federation.personal)
    for place in (0, 2):
        seeds, factors = np.full(3, 7), np.full(3, 0.5, np.float32)
        seeds[place], factors[place] = 0, 1
        settings = {name: np.float32(value) * factors for name, value in floats.items()}
        runs = Runs(settings, jnp.stack([jax.random.key(int(seed)) for seed in seeds]))
        engine = make_engine(method, federation.model, data, Layout(8, devices, parallel=parallel), runs)
        state, metrics = engine.run(engine.place_states(begin(case, method, 3)), engine.place_plan(plan))
        mine, other = (jax.tree.map(lambda leaf, run=run: leaf[run], state) for run in (place, 1))
        expected_state, expected_metrics = reference(case)
        assert_agree(case, expected_state, mine)
        np.testing.assert_allclose(metrics["test/loss"][:, place], expected_metrics["test/loss"], rtol=1e-4)
        assert worst_difference(other, mine) > 1e-4


def test_two_programs_with_other_numbers_are_one(compilations):
    """The options are arguments, not constants."""
    method, floats = method_of("fedmut")
    federation = federation_of("fedmut")
    data = Data((), federation.train, federation.test)
    plan = joint_plan("fedmut", method, 2, lanes=2)
    runs = Runs(
        {name: np.array([value, 0], np.float32) for name, value in floats.items()}, jax.random.split(jax.random.key(0))
    )
    engine = make_engine(method, federation.model, data, Layout(2), runs)
    state, _ = engine.run(engine.place_states(begin("fedmut", method, 2)), engine.place_plan(plan))
    before = compilations()
    jax.block_until_ready(engine.run(state, engine.place_plan(plan)))
    assert compilations() == before


# --- whole runs -------------------------------------------------------------------------------------------------------


def some_runs(folder: Path, name: str, **changes) -> list[Config]:
    """Two learning rates and two seeds; cohorts of 4, rounds in chunks of 2."""
    file = write(folder, **changes)
    return [
        config.load(file, [f"seed={seed}", f"local.learning_rate={rate}", f"name={name}-{rate}", "engine.lanes=2"])
        for rate in (0.05, 0.1)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[Config]:
    """Four finished runs."""
    configs = some_runs(tmp_path_factory.mktemp("four"), "four")
    outcomes = run_all(configs, QUIET)
    assert [(outcome.rounds, outcome.reason) for outcome in outcomes] == [(4, "finished")] * 4
    return configs


def losses(folder: Path) -> list[float]:
    return [line[name] for line in RunFolder(folder).records() for name in ("train_loss", "test_loss")]


def test_runs_together_leave_the_records_of_runs_alone(four, tmp_path):
    assert groups(four) == [[0, 1, 2, 3]]
    for one in (four[0], four[3]):
        alone = run(dataclasses.replace(one, folder=str(tmp_path)), QUIET)
        np.testing.assert_allclose(losses(one.run_folder), losses(alone.folder), rtol=1e-4)
    assert len({tuple(losses(one.run_folder)) for one in four}) == 4


def test_finished_runs_are_kept(four):
    before = {one.run_folder: RunFolder(one.run_folder).records_file.stat().st_mtime_ns for one in four}
    outcomes = run_all(four, QUIET)
    assert {outcome.reason for outcome in outcomes} == {"finished"}
    assert before == {one.run_folder: RunFolder(one.run_folder).records_file.stat().st_mtime_ns for one in four}


def test_another_configuration_does_not_take_over_a_folder(four):
    changed = dataclasses.replace(four[0], evaluation=dataclasses.replace(four[0].evaluation, every=2))
    with pytest.raises(ConfigurationError, match=r"holds a run with other settings \(evaluation.every: 1 → 2\)"):
        run_all([changed], QUIET)
    with pytest.raises(ConfigurationError, match="two runs have the folder"):
        run_all([four[0], four[0]], QUIET)


def test_runs_are_continued_together_and_alone(four, tmp_path):
    """Stopped after a chunk, two go on together and one alone: the same records as without the stop, but for rounding."""
    configs = some_runs(tmp_path, "four")[:3]
    outcomes = run_all(configs, QUIET, stop=lambda run, history: "enough")
    assert [(outcome.rounds, outcome.reason) for outcome in outcomes] == [(2, "enough")] * 3
    assert run_all(configs, QUIET) == outcomes  # ended is ended
    for one in configs:
        RunFolder(one.run_folder).end.remove()
    for go_on in (
        lambda output: run_all(configs[:2], output),
        lambda output: resume(configs[2].run_folder, console=output),
    ):
        output = Console(file=io.StringIO(), width=300)
        go_on(output)
        assert output.file.getvalue().count("up to rounding, not to the last bit") == 1
        output = Console(file=io.StringIO(), width=300)
        go_on(output)
        assert "up to rounding" not in output.file.getvalue()  # nothing is left to compute
    for one, whole in zip(configs, four, strict=False):
        np.testing.assert_allclose(losses(one.run_folder), losses(whole.run_folder), rtol=1e-4)


def test_more_rounds_are_noted_and_an_interruption_ends_what_follows(tmp_path):
    one, other = some_runs(tmp_path, "two", rounds=2)[:2]
    run_all([one], QUIET)
    assert json.loads((one.run_folder / "layout.json").read_text())["program"]["runs"] == 1
    longer = [dataclasses.replace(each, rounds=6) for each in (one, other)]
    calls = iter([None, "interrupted"])
    outcomes = run_all(longer, QUIET, stop=lambda run, history: next(calls))
    assert [(outcome.rounds, outcome.reason) for outcome in outcomes] == [(2, "interrupted"), (4, "interrupted")]
    assert config.load(one.run_folder / "config.yaml").rounds == 6
    assert [outcome.rounds for outcome in run_all(longer, QUIET)] == [6, 6]


def test_common_times_are_marked_as_such(four):
    marks = [json.loads((one.run_folder / "layout.json").read_text()) for one in four]
    programs = [mark.pop("program") for mark in marks]
    assert [program.pop("place") for program in programs] == [0, 1, 2, 3]
    assert len({program.pop("id") for program in programs}) == 1
    assert programs == [{"runs": 4}] * 4
    layout = {"lanes": 2, "devices": 1, "model_devices": 1, "parallel": "vmap"}
    assert marks == [{**layout, "trials": [], "too_large": []}] * 4


@pytest.mark.slow
def test_a_run_of_several_that_goes_on_alone_measures_its_lanes_once(tmp_path):
    file = write(tmp_path)
    configs = [config.load(file, [f"seed={seed}", "engine.lanes=auto"]) for seed in (0, 1)]
    run_all(configs, QUIET, stop=lambda run, history: "enough")
    folder = configs[0].run_folder
    assert json.loads((folder / "layout.json").read_text())["program"]["runs"] == 2
    marks = []
    for rounds in (6, 8):
        resume(folder, [f"rounds={rounds}"], console=QUIET)
        marks.append(json.loads((folder / "layout.json").read_text()))
    assert marks[0]["program"]["runs"] == 1 and marks[0]["trials"]
    assert marks[1] == marks[0]


def test_one_that_stops_leaves_the_others_as_they_are(four, tmp_path):
    configs = some_runs(tmp_path, "four", rounds=4)
    asked = []

    def stop(run: int, history: list[dict]) -> str | None:
        asked.append((run, len(history)))
        return "hopeless" if run == 1 else None

    outcomes = run_all(configs, QUIET, stop=stop)
    assert [(outcome.rounds, outcome.reason) for outcome in outcomes] == [
        (4, "finished"),
        (2, "hopeless"),
        (4, "finished"),
        (4, "finished"),
    ]
    assert (1, 2) in asked and (1, 4) not in asked
    for one, whole in zip(configs, four, strict=True):
        found, expected = losses(one.run_folder), losses(whole.run_folder)
        np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_one_that_diverges_leaves_the_others_as_they_are(four, tmp_path):
    file = write(tmp_path)
    configs = [
        config.load(file, [f"local.learning_rate={rate}", f"name=d-{rate}", "engine.lanes=2"]) for rate in (1e38, 0.05)
    ]
    broken, fine = run_all(configs, QUIET)
    assert (broken.reason, fine.reason) == ("diverged", "finished")
    assert "training loss is not finite in round" in str(broken.error)
    assert RunFolder(broken.folder).failure.read()["reason"] == "non-finite loss"
    np.testing.assert_allclose(losses(fine.folder), losses(four[0].run_folder), rtol=1e-4)


class Killed(Exception):
    """Stands for a kill: nothing is marked or saved after it, and saves that are under way are as well before it as after."""


def contents(one: Config) -> tuple[bytes, dict[int, list[np.ndarray]]]:
    """A run's records and the leaves of all its checkpoints."""
    like = first_state(build(one))
    with RunFolder(one.run_folder).checkpoints() as checkpoints:
        states = {round: jax.tree.leaves(checkpoints.restore_round(like, round)) for round in checkpoints.rounds()}
    return RunFolder(one.run_folder).records_file.read_bytes(), states


def assert_same_bits(found: Config, expected: Config) -> None:
    (records_found, states), (records_expected, wanted) = contents(found), contents(expected)
    assert records_found == records_expected
    assert states.keys() == wanted.keys()
    for round, leaves in states.items():
        for leaf, right in zip(leaves, wanted[round], strict=True):
            assert leaf.dtype == right.dtype and leaf.tobytes() == right.tobytes()


def ending_runs(folder: Path) -> list[Config]:
    """Ten rounds of five runs, of which the second is given up after round 4, and the last diverges at once."""
    file = write(folder, rounds=10)
    rates = (0.05, 0.1, 0.02, 0.07, 1e38)
    return [config.load(file, [f"local.learning_rate={rate}", f"name=r{rate}", "engine.lanes=2"]) for rate in rates]


def give_up(run: int, history: list[dict]) -> str | None:
    return "hopeless" if run == 1 and len(history) == 4 else None


def killed_at(kill: tuple[int, int], run: int, history: list[dict]) -> str | None:
    if (run, len(history)) == kill:
        raise Killed
    return give_up(run, history)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[Config]:
    configs = ending_runs(tmp_path_factory.mktemp("whole"))
    reasons = [outcome.reason for outcome in run_all(configs, QUIET, stop=give_up)]
    assert reasons == ["finished", "hopeless", "finished", "finished", "diverged"]
    return configs


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(0, 2)], marks=pytest.mark.slow),  # before anybody's first checkpoint
        pytest.param([(2, 2)], marks=pytest.mark.slow),  # some have the first one
        [(2, 4)],  # the second run has ended ahead of the others
        pytest.param([(0, 6)], marks=pytest.mark.slow),  # all are where it ended
        [(3, 6), (2, 8)],
    ],
)
def test_a_kill_between_two_saves_changes_no_bit(whole, tmp_path, kills):
    """The runs go back to a round of which all have a checkpoint; those that have ended keep their place."""
    configs = ending_runs(tmp_path)
    for kill in kills:
        with pytest.raises(Killed):
            run_all(configs, QUIET, stop=partial(killed_at, kill))
    outcomes = run_all(configs, QUIET, stop=give_up)
    assert [outcome.reason for outcome in outcomes] == ["finished", "hopeless", "finished", "finished", "diverged"]
    for found, expected in zip(configs[:4], whole[:4], strict=True):
        assert_same_bits(found, expected)
    assert RunFolder(configs[4].run_folder).records_file.read_bytes() == b""


def test_runs_without_a_common_checkpoint_say_that_they_go_on_apart(tmp_path, capsys):
    configs = some_runs(tmp_path, "apart", rounds=8)[:2]
    outcomes = run_all(configs, QUIET, stop=lambda run, history: "interrupted" if len(history) == 6 else None)
    assert [outcome.reason for outcome in outcomes] == ["interrupted"] * 2
    for one, round in zip(configs, (4, 6), strict=True):
        shutil.rmtree(RunFolder(one.run_folder).checkpoints_folder / str(round))
    outcomes = run_all(configs, Console(width=300))
    assert [outcome.rounds for outcome in outcomes] == [8, 8]
    assert "have no checkpoint of one round" in capsys.readouterr().out


def test_groups_hold_what_differs_in_numbers_only(tmp_path):
    file = write(tmp_path)

    def load(*overrides: str) -> Config:
        return config.load(file, list(overrides))

    configs = [
        load(),
        load("seed=5"),
        load("algorithm.alpha=0.5", "partition.beta=5"),
        load("local.epochs=3", "participation.dropout=0.5"),
        load("local.batch_size=8"),
        load("algorithm.form=joint"),
        load("algorithm=fedavg"),
        load("model.hidden=[8]"),
        load("participation.cohort=5"),
        load("local.momentum=0"),
        load("local.clip_norm=1.0"),
        load("engine.client_store=host"),
        load("engine.client_store=host", "seed=1"),
    ]
    assert groups(configs) == [[0, 1, 2, 3, 9], [4], [5], [6], [7], [8], [10], [11, 12]]
