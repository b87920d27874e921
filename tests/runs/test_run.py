"""A run from configuration to folder; interruption at any point and resumption to the same bits."""

import io
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from support.runs import assert_bitwise, final_state, quiet, start, wait_for_rounds, write

from fedjax_qp import cli, config
from fedjax_qp.experiment import advice, build
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.autotune import LaneTimer
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.loop import NonFiniteLoss, chunk_bounds, simulate
from fedjax_qp.runs.run import resume, run, run_all


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One finished run of four rounds."""
    folder = tmp_path_factory.mktemp("finished")
    return run(config.load(write(folder)), quiet()).folder


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "environment.json", "records.jsonl", "checkpoints", "tensorboard", "run.png"} <= names
    assert RunFolder(finished).environment.read()["packages"]["jax"] == jax.__version__
    startup = RunFolder(finished).startup.read()
    assert startup.keys() == {"data", "program"} and min(startup.values()) > 0
    lines = RunFolder(finished).records()
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    wanted = {"test_accuracy", "test_loss", "class_accuracy", "client_accuracy", "train_loss", "mutation/drift"}
    wanted |= {"qp/residual", "qp/iterations", "qp/failures", "qp/corrected_share", "mutation/cosine_before"}
    wanted |= {"mutation/cosine_after", "update/cosine_between_clients"}
    assert wanted <= lines[-1].keys()
    watched = {watch.metric for watch in RunFolder(finished).watches()}
    assert watched <= wanted | {"mutation/drift_largest"} <= lines[-1].keys()
    assert lines[-1]["test_accuracy"] > lines[0]["test_accuracy"]


def test_the_solver_ran_inside_the_compiled_round(finished):
    lines = RunFolder(finished).records()
    assert lines[0]["qp/iterations"] == 0 or lines[0]["mutation/drift"] == 0  # nothing to correct in round 1
    assert all(line["qp/iterations"] >= 1 and line["qp/residual"] <= 1e-4 for line in lines[1:])
    assert all(line["qp/failures"] == 0 for line in lines)  # so the residuals are those of jaxopt's answers
    assert min(lines[-1]["mutation/cosine_after"]) >= -1e-5
    assert min(lines[-1]["mutation/cosine_before"]) < -0.01


def test_a_second_run_in_the_same_folder_is_refused(finished):
    for changes, what in (([], "a run: "), (["algorithm=fedavg"], "a run of another algorithm .fedqp.: ")):
        with pytest.raises(ConfigurationError, match=f"already holds {what}.*fedjax-qp resume"):
            run(RunFolder(finished).config(changes), quiet())


def test_more_rounds_continue_where_the_run_ended(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    outcome = resume(tmp_path / "copy", ["rounds=8"], quiet())
    assert outcome.rounds == 8
    whole = run(RunFolder(finished).config(["rounds=8", f"folder={tmp_path}", "name=whole"]), quiet())
    assert_bitwise(final_state(tmp_path / "copy"), final_state(whole.folder))
    assert [line["round"] for line in RunFolder(tmp_path / "copy").records()] == list(range(1, 9))


DAMAGED_RECORDS = {  # what is left of the lines of four rounds, and where the run can go back to
    "empty": ([], None),
    "half": ([1, 2], 2),
    "last line deleted": ([1, 2, 3], 2),
    "first line deleted": ([2, 3, 4], None),
    "line doubled": ([1, 2, 2, 3, 4], None),
    "last line doubled": ([1, 2, 3, 4, 4], 2),
    "lines swapped": ([1, 2, 4, 3], 2),
    "first lines swapped": ([2, 1, 3, 4], None),
}


@pytest.mark.parametrize("damage", DAMAGED_RECORDS)
def test_records_that_do_not_reach_the_checkpoint_are_restored_or_refused(finished, tmp_path, damage):
    kept, back = DAMAGED_RECORDS[damage]
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    lines = RunFolder(finished).records_file.read_bytes().splitlines(keepends=True)
    RunFolder(folder).records_file.write_bytes(b"".join(lines[round - 1] for round in kept))
    output = Console(file=io.StringIO(), width=300)
    if back is None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(
            ConfigurationError, match=r"records\.jsonl is not complete \(.*restore the file from a backup"
        ):
            resume(folder, [], output)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return
    resume(folder, [], output)
    assert f"going back to round {back}" in output.file.getvalue()
    assert RunFolder(folder).records_file.read_bytes() == b"".join(lines)
    assert_bitwise(final_state(folder), final_state(finished))


def test_recorded_rounds_are_not_thrown_away_without_a_word(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    resume(folder, ["rounds=6"], quiet())
    shutil.rmtree(RunFolder(folder).checkpoints_folder)
    with pytest.raises(ConfigurationError, match="has records of 6 rounds, but no checkpoint: restore"):
        resume(folder, [], quiet())


@pytest.mark.parametrize("ended", [True, False])
def test_a_kill_in_the_first_save_costs_its_rounds_alone(finished, tmp_path, ended):
    """The first save may be the last one too; the mark of the end is written before it."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    for partial in RunFolder(folder).checkpoints_folder.iterdir():
        partial.rename(partial.with_name(f"{partial.name}.partial"))
    if not ended:
        RunFolder(folder).end.remove()
    output = Console(file=io.StringIO(), width=300)
    resume(folder, [], output)
    assert "starting from round 1; the 4 recorded rounds are computed again" in output.file.getvalue()
    assert_bitwise(final_state(folder), final_state(finished))


def test_records_are_judged_by_the_settings_that_they_were_made_with(finished, tmp_path):
    """Eight rounds without a checkpoint are few where one is due every four."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    resume(folder, ["rounds=8", "checkpoints.every_chunks=2"], quiet())
    shutil.rmtree(RunFolder(folder).checkpoints_folder)
    output = Console(file=io.StringIO(), width=300)
    resume(folder, ["checkpoints.every_chunks=1"], output)
    assert "starting from round 1; the 8 recorded rounds are computed again" in output.file.getvalue()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"reason": 5, "round": 4}', '{"reason": "finished", "round": 400}']
)
def test_a_damaged_mark_does_not_end_a_run(finished, tmp_path, content):
    folder = Path(shutil.copytree(finished, tmp_path / "small-seed0"))
    RunFolder(folder).end.path.write_text(content)
    (outcome,) = run_all([RunFolder(folder).config([f"folder={tmp_path}"])], quiet())
    assert (outcome.rounds, outcome.reason) == (4, "finished")
    assert RunFolder(folder).end.read() == {"reason": "finished", "round": 4}


def test_two_starts_at_once_leave_one_run_with_its_own_settings(tmp_path):
    """The loser says so and leaves nothing behind, however close they are."""
    file = write(tmp_path, algorithm="fedavg")
    rates = (0.05, 0.2, 0.1)
    processes = [start(["run", str(file), f"local.learning_rate={rate}", "rounds=2"]) for rate in rates]
    said = [process.communicate(timeout=480)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2, 2], said
    won = codes.index(0)
    folder = config.load(file).run_folder
    assert RunFolder(folder).config().local.learning_rate == rates[won]
    alone = run(config.load(file, [f"local.learning_rate={rates[won]}", "rounds=2", "name=alone"]), quiet())
    assert RunFolder(alone.folder).records_file.read_bytes() == RunFolder(folder).records_file.read_bytes()
    assert all(
        "another process" in text or "already holds a run" in text
        for text, code in zip(said, codes, strict=True)
        if code
    )


def test_a_misspelt_name_comes_before_what_is_in_the_way(finished):
    with pytest.raises(ConfigurationError, match="did you mean fedavg"):
        run(RunFolder(finished).config(["algorithm=fedavgg"]), quiet())
    with pytest.raises(ConfigurationError, match="name=small-fedavg"):
        run(RunFolder(finished).config(["algorithm=fedavg"]), quiet())


def test_no_number_is_shown_before_the_first_evaluation(tmp_path):
    output = Console(file=io.StringIO(), width=200, force_terminal=True)
    run(config.load(write(tmp_path), ["rounds=4", "evaluation.every=4"]), output)
    said = output.file.getvalue()
    assert "nan" not in said and "compiling" in said and "reading the data" in said
    assert re.search(r"finished after round 4: accuracy 0\.\d{4}", said)


def test_a_change_of_the_past_is_refused_by_name(finished):
    with pytest.raises(ConfigurationError, match="algorithm.alpha: 1.0 → 2.*local.learning_rate: 0.05 → 0.1"):
        resume(finished, ["algorithm.alpha=2", "local.learning_rate=0.1"], quiet())


def test_fewer_rounds_than_were_run_are_refused_and_leave_everything_as_it_was(finished):
    def contents() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in finished.rglob("*") if file.is_file()}

    before = contents()
    with pytest.raises(ConfigurationError, match="rounds = 3 is less than the 4 that are in .*at least those"):
        resume(finished, ["rounds=3"], quiet())
    assert contents() == before


def test_resuming_nothing_says_so(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no run"):
        resume(tmp_path, [], quiet())


def test_an_unwritable_folder_is_refused_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written.*folder=PATH"):
        run(config.load(write(tmp_path), [f"folder={tmp_path / 'file' / 'runs'}"]), quiet())


def test_a_non_finite_loss_names_round_and_clients_and_keeps_the_last_checkpoint(tmp_path):
    loaded = config.load(
        write(tmp_path, algorithm="fedavg"), ["local.learning_rate=1e30", "local.momentum=0", "rounds=6"]
    )
    with pytest.raises(NonFiniteLoss, match=r"round \d+, clients \[.*\].*learning_rate"):
        run(loaded, quiet())
    assert RunFolder(loaded.run_folder).records() == []
    fine = config.load(write(tmp_path, algorithm="fedavg"), ["name=fine"])
    folder = run(fine, quiet()).folder
    before = final_state(folder)
    text = RunFolder(folder).config_file.read_text().replace("learning_rate: 0.05", "learning_rate: 1.0e+30")
    RunFolder(folder).config_file.write_text(text)
    with pytest.raises(NonFiniteLoss):
        resume(folder, ["rounds=8"], quiet())
    assert_bitwise(before, final_state(folder))
    assert len(RunFolder(folder).records()) == 4


def test_a_divergence_in_the_last_step_is_noticed(tmp_path):
    """The loss is taken before the step: only the update's norm shows this one."""
    loaded = config.load(
        write(tmp_path, algorithm="fedavg"), ["local.learning_rate=1e38", "local.maximum_steps=1", "rounds=2"]
    )
    with pytest.raises(NonFiniteLoss, match="round 1, clients"):
        run(loaded, quiet())
    assert RunFolder(loaded.run_folder).failure.read()["reason"] == "non-finite loss"


def test_an_early_stopped_run_stays_stopped(tmp_path):
    settings = ["rounds=40", "evaluation.target_accuracy=0.15", "evaluation.stop_at_target=true"]
    first = run(config.load(write(tmp_path), settings), quiet())
    assert resume(first.folder, [], quiet())[1:] == first[1:]


def test_a_drift_near_one_is_warned_of(tmp_path):
    output = Console(file=io.StringIO(), width=200)
    run(config.load(write(tmp_path), ["algorithm.form=joint", "algorithm.alpha=2", "algorithm.drift=0.95"]), output)
    said = output.file.getvalue()
    assert "mean coefficient is 0.95" in said and said.count("warning") == 1  # not in every chunk
    assert "algorithm.drift" in said and "max_drift" not in said  # this form has no such option


def test_momentum_with_a_method_for_plain_sgd_is_warned_of(tmp_path):
    for momentum, expected in ((0.5, True), (0, False)):
        output = Console(file=io.StringIO(), width=200)
        changes = ["rounds=1", f"local.momentum={momentum}", f"name=momentum-{momentum}"]
        run(config.load(write(tmp_path, algorithm="scaffold"), changes), output)
        assert (
            "local.momentum = 0.5, but algorithm = 'scaffold' is made for plain SGD" in output.file.getvalue()
        ) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], []),
        (["algorithm.form=joint", "algorithm.drift=0.7"], []),
        (["algorithm.form=nearest", "algorithm.drift=0.7"], ["algorithm.drift = 0.7 has no effect"]),
        (["algorithm.form=box", "algorithm.epsilon=0.1"], ["algorithm.epsilon = 0.1 has no effect"]),
        (["algorithm.form=references", "algorithm.references=clients", "algorithm.epsilon=0.1"], []),
        (["local.optimizer=adam", "local.momentum=0.5"], ["local.momentum = 0.5 has no effect"]),
        (["local.optimizer=sgd", "local.momentum=0.5"], []),
        (["text.cut_off=10"], ["text.cut_off = 10 has no effect: data = 'digits'"]),
        (["participation.straggler_work=0.1"], ["participation.straggler_work = 0.1 has no effect"]),
        (["participation.straggler_work=0.1", "participation.stragglers=0.5"], []),
    ],
)
def test_settings_without_an_effect_are_named(tmp_path, changes, expected):
    found = advice(build(config.load(write(tmp_path), changes)))
    assert len(found) == len(expected) and all(map(str.startswith, found, expected))


def test_a_run_that_another_process_continues_is_left_alone(tmp_path):
    outcome = run(config.load(write(tmp_path), ["rounds=2"]), quiet())
    before = RunFolder(outcome.folder).records_file.read_bytes()
    message = "another process continues the run in .*: wait for it"
    with RunFolder(outcome.folder).lock(), pytest.raises(ConfigurationError, match=message):
        resume(outcome.folder, ["rounds=4"], quiet())
    assert RunFolder(outcome.folder).records_file.read_bytes() == before
    assert RunFolder(outcome.folder).config().rounds == 2
    assert resume(outcome.folder, ["rounds=4"], quiet()).rounds == 4


def test_a_run_may_move_to_a_machine_with_fewer_devices(tmp_path):
    whole = run(config.load(write(tmp_path), ["rounds=4", "engine.devices=2", "engine.lanes=2", "name=whole"]), quiet())
    moved = run(config.load(write(tmp_path), ["rounds=2", "engine.devices=2", "engine.lanes=2"]), quiet())
    output = Console(file=io.StringIO(), width=200)
    resume(moved.folder, ["rounds=4", "engine.devices=1", "engine.lanes=1"], output)
    assert "up to rounding" in output.file.getvalue()
    losses = [[line["train_loss"] for line in RunFolder(folder).records()] for folder in (whole.folder, moved.folder)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_no_stop_is_asked_for_after_the_last_round(tmp_path):
    loaded = config.load(write(tmp_path), ["rounds=2"])
    (outcome,) = run_all([loaded], quiet(), stop=lambda run, history: "enough")
    assert outcome.reason == "finished"


def test_early_stop_at_the_target_and_without_progress(tmp_path):
    target = config.load(
        write(tmp_path),
        ["rounds=40", "evaluation.target_accuracy=0.15", "evaluation.stop_at_target=true", "name=target"],
    )
    outcome = run(target, quiet())
    assert outcome.reason == "target reached" and outcome.rounds < 40 and outcome.rounds % 2 == 0
    assert record_numbers.rounds_to_reach(RunFolder(outcome.folder).records(), 0.15) <= outcome.rounds
    still = config.load(
        write(tmp_path), ["rounds=40", "local.learning_rate=1e-9", "evaluation.patience=3", "name=still"]
    )
    assert run(still, quiet()).reason == "no progress"


def test_chunks_are_a_fixed_function_of_the_round():
    assert chunk_bounds(0, 7, 3) == [(0, 3), (3, 3), (6, 1)]
    assert chunk_bounds(3, 7, 3) == [(3, 3), (6, 1)]
    assert chunk_bounds(4, 9, 3) == [(4, 2), (6, 3)]
    assert chunk_bounds(7, 7, 3) == []


def test_the_whole_run_compiles_one_program(tmp_path, compilations):
    """Five chunks compile as many programs as one chunk does."""

    def compiled(rounds: int) -> int:
        experiment = build(config.load(write(tmp_path), [f"rounds={rounds}", "participation.dropout=0.2"]))
        before = compilations()
        assert [int(chunk.state.round) for (chunk,) in simulate([experiment])] == list(range(2, rounds + 1, 2))
        return compilations() - before

    compiled(2)  # small helper programs of a first run are cached afterwards
    assert compiled(10) == compiled(2)


def test_client_store_on_the_host_gives_the_same_bits(tmp_path):
    """Client memory is a toy here (see test_engine); what is tested is the way of its rows to the device and back."""
    from support.federations import counting

    results = []
    for store in ("device", "host"):
        experiment = build(config.load(write(tmp_path), ["rounds=6", f"engine.client_store={store}"]))
        experiment = experiment._replace(algorithm=counting())
        results.append(list(simulate([experiment]))[-1][0].state)
    assert_bitwise(*results)
    assert results[0].clients["rounds"].sum() == 6 * 4


def test_the_measured_layout_lies_beside_the_settings_which_stay_what_they_were(tmp_path, monkeypatch):
    """A continued run takes the layout that it had, unless its settings change or its devices are gone."""
    outcome = run(config.load(write(tmp_path), ["engine.lanes=auto", "rounds=2"]), quiet())
    engine = config.load(outcome.folder / "config.yaml").engine
    assert (engine.lanes, engine.devices, engine.parallel) == ("auto", "auto", "auto")
    choice = json.loads((outcome.folder / "layout.json").read_text())
    assert choice["lanes"] in [trial["layout"]["lanes"] for trial in choice["trials"]]
    monkeypatch.setattr(LaneTimer, "trial", None)  # nothing is measured again
    for rounds, changes in ((4, []), (6, ["engine.lanes=1", "engine.devices=1"])):
        resume(outcome.folder, [f"rounds={rounds}", *changes], quiet())
        held = json.loads((outcome.folder / "layout.json").read_text())
        assert (held == choice) == (not changes)
    assert (held["lanes"], held["devices"], held["trials"]) == (1, 1, [])
    (outcome.folder / "layout.json").write_text(json.dumps({**choice, "devices": 512}))
    monkeypatch.undo()
    resume(outcome.folder, ["rounds=8"], quiet())
    assert json.loads((outcome.folder / "layout.json").read_text())["devices"] == 1


# --- interruption: separate processes ---------------------------------------------------------------------------------

LONG = ["rounds=60", "evaluation.every=5", "checkpoints.keep=2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(config.load(write(folder), LONG), quiet()).folder


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), 20, pytest.param(45, marks=pytest.mark.slow)]
)
def test_kill_and_resume_is_bitwise(tmp_path, uninterrupted, rounds):
    file = write(tmp_path)
    folder = config.load(file).run_folder
    process = start(["run", str(file), *LONG])
    wait_for_rounds(process, folder, rounds)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(RunFolder(folder).records()) < 60
    resumed = start(["resume", str(folder)])
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert_bitwise(final_state(uninterrupted), final_state(folder))
    assert RunFolder(folder).records() == RunFolder(uninterrupted).records()


def test_sigterm_finishes_the_chunk_and_says_how_to_resume(tmp_path, uninterrupted):
    file = write(tmp_path)
    folder = config.load(file).run_folder
    process = start(["run", str(file), *LONG[1:], "rounds=100000"])
    wait_for_rounds(process, folder, 10)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "SIGTERM" in output and re.search(r"fedjax-qp resume\s+\S+", output)
    done = int(final_state(folder).round)
    assert done == len(RunFolder(folder).records()) and done >= 10


def test_errors_end_with_one_line_and_status_two(tmp_path):
    process = start(["run", str(write(tmp_path)), "algorithm=fedmutt"])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "did you mean fedmut" in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("partitions", ["dirichlet", "minimum=10"]),
        ("scaffold", ["Karimireddy", "server_learning_rate: η_g", "option='II'"]),
        ("engine", ["rounds_per_chunk: Count = 10", "distance of checkpoints"]),
        ("fedqpp", ["did you mean fedqp"]),
    ],
)
def test_parts_are_listed_and_explained(name, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["list", name])
    printed = "".join(capsys.readouterr())
    assert all(words in printed for words in said)
    assert end.value.code == (2 if "qpp" in name else 0)
