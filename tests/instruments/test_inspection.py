"""Whole inspections of small runs, and what is refused."""

import csv
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from support.runs import write

from fedjax_qp import cli, config
from fedjax_qp.contract.federations import worst_difference
from fedjax_qp.federated import Batch
from fedjax_qp.instruments import fairness, mutations
from fedjax_qp.instruments.inspection import inspect_runs, side_by_side
from fedjax_qp.instruments.replay import mean_cosine
from fedjax_qp.instruments.settings import NAMES, Settings
from fedjax_qp.instruments.subject import InspectedRun, load, open_run, state_at, with_update
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import run

SMALL = Settings(
    examples=60, batch_size=40, points=5, grid=3, lines=2, radii=(0.1,), samples=4, ascent_steps=2,
    krylov=6, eigenvalues=2, probes=4, draws=20, client_examples=20, replays=1,
)  # fmt: skip

FEWER = ("surface", "conflict", "fairness")


def finish(folder: Path, name: str, algorithm: dict) -> Path:
    """A run of three rounds that keeps all of its checkpoints."""
    changes = [
        "checkpoints.keep=9",
        "engine.rounds_per_chunk=1",
        "rounds=3",
        "participation.dropout=0.3",
        f"name={name}",
    ]
    return run(config.load(write(folder, algorithm=algorithm), changes), Console(quiet=True)).folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """One that mutates, and one whose cohorts depend on the clients' memories."""
    folder = tmp_path_factory.mktemp("inspected")
    corrected = {"name": "fedqp", "form": "nearest", "alpha": 1.0}
    return finish(folder, "corrected", corrected), finish(folder, "clustered", {"name": "clustered_sampling"})


@pytest.fixture(scope="module")
def inspected(runs):
    return [*inspect_runs(runs[:1], settings=SMALL), *inspect_runs(runs[1:], what=FEWER, settings=SMALL)]


def numbers(folder: Path, name: str) -> dict:
    return json.loads((folder / "inspect" / f"{name}-round3.json").read_text())


def test_every_instrument_leaves_numbers_and_a_figure(runs, inspected):
    for folder, found in zip(runs, inspected, strict=True):
        wanted = NAMES if "corrected" in folder.name else FEWER
        assert sorted(found.headlines) == sorted(wanted)
        for name in wanted:
            image = imread(folder / "inspect" / f"{name}-round3.png")
            assert image.shape[0] > 300 and image.std() > 0.05
            result = numbers(folder, name)
            assert (result["round"], result["settings"]["examples"]) == (3, 60)
            assert all(math.isfinite(value) for value in result["headline"].values())


def test_the_centre_of_the_surface_is_the_loss(runs, inspected):
    for folder in runs:
        result = numbers(folder, "surface")
        for line in result["lines"].values():
            for losses in line["losses"]:
                assert losses[2] == pytest.approx(result["centre"], rel=1e-5)
        for plane in result["planes"].values():
            assert plane["losses"][1][1] == pytest.approx(result["centre"], rel=1e-5)
        if folder == runs[0]:
            assert numbers(folder, "sharpness")["centre"] == pytest.approx(result["centre"], rel=1e-5)
        subject = load(open_run(folder), None, SMALL)
        model, points = subject.run.experiment.model, subject.objective.points
        batches = [Batch(*jax.tree.map(lambda leaf, i=i: leaf[i], tuple(points))) for i in range(len(points.mask))]
        sums = [model.evaluate((), subject.params, batch) for batch in batches]
        expected = sum(float(s["loss"]) for s in sums) / 60
        assert result["centre"] == pytest.approx(expected, rel=1e-4)


def test_where_the_global_update_comes_from(runs):
    """FedQP's server remembers it; another's is the difference of two checkpoints, or else that to the next round."""
    corrected, clustered = (open_run(folder) for folder in runs)
    found = [with_update(load(run, round, SMALL)).update for run in (corrected, clustered) for round in (1, 2)]
    assert [update.source for update in found] == ["last", "last", "next", "last"]
    weights = [load(clustered, round, SMALL).params.trainable for round in (1, 2)]
    between = jax.tree.map(lambda old, new: new - old, *weights)
    assert worst_difference(between, found[3].tree) == 0
    assert worst_difference(between, found[2].tree) < 1e-3
    weights = [load(corrected, round, SMALL).params.trainable for round in (1, 2)]
    assert worst_difference(jax.tree.map(lambda old, new: new - old, *weights), found[1].tree) < 1e-3


def test_corrected_mutations_are_acute_and_drawn_ones_are_not(runs, inspected):
    result = numbers(runs[0], "mutations")
    assert 0 <= result["corrected_to_nothing"] < 20  # those drawn as −g, one in 16
    assert len(result["degrees_after"]) == 20 * 4 - result["corrected_to_nothing"]
    assert max(result["degrees_after"]) <= 90 + 0.1
    assert max(result["degrees_before"]) > 95
    assert result["headline"]["acute mutations after the QP (share)"] == 1.0
    # What was acute stays as it was drawn, what was not ends at a right angle: the nearest of the fan.
    before, after = (np.array(result[f"degrees_{name}"]) for name in ("before", "after"))
    opposite = before > 180 - 0.1  # they end at nothing, which has no angle
    assert opposite.sum() == result["corrected_to_nothing"]
    np.testing.assert_allclose(after, np.minimum(before[~opposite], 90), atol=0.1)


def test_the_corrected_mutants_are_those_of_the_next_round(runs, inspected):
    """The records of round 3 hold the angles that round's dispatch saw, before and after."""
    subject = load(open_run(runs[0]), 2, SMALL)
    found = mutations.of_next_round(subject)
    update = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(subject.state.server.update)])
    line = next(line for line in RunFolder(runs[0]).records() if line["round"] == 3)
    for tree, name in zip(found, ("before", "after"), strict=True):
        rows = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)
        cosines = rows @ update / np.linalg.norm(rows, axis=1) / np.linalg.norm(update)
        np.testing.assert_allclose(cosines, line[f"mutation/cosine_{name}"], atol=1e-4)


def test_a_replayed_round_is_the_run_s_own(runs):
    for folder in runs:
        opened = open_run(folder)
        for round in (1, 2):
            check_replay(opened, round)


def check_replay(opened: InspectedRun, round: int) -> None:
    found = opened.replay(state_at(opened, round))
    assert worst_difference(found.server, state_at(opened, round + 1).server) < 1e-4
    (line,) = (line for line in RunFolder(opened.folder).records() if line["round"] == round + 1)
    assert len(found.clients) == line["reporting"]
    if line["reporting"] > 1:
        recorded = line["update/cosine_between_clients"]
        np.testing.assert_allclose(mean_cosine(found.progress, found.clients), recorded, rtol=1e-3, atol=1e-4)


def test_accuracy_of_clients(runs, inspected):
    for folder in runs:
        result = numbers(folder, "fairness")
        line = RunFolder(folder).records()[-1]
        for name, quantile in (("q10", "q10"), ("worst", "min"), ("median", "q50"), ("mean", "mean")):
            assert result["mixture"]["spread"][name] == pytest.approx(line["client_accuracy"][quantile], abs=1e-6)
        experiment = open_run(folder).experiment
        subject = load(open_run(folder), None, SMALL)
        tests = fairness._own_examples(experiment, SMALL)
        assert tests.mask.sum(axis=(1, 2)).tolist() == [min(len(part), 20) for part in experiment.task.parts]
        batch = Batch(*jax.tree.map(lambda leaf: leaf[3, 0], tuple(tests)))
        sums = experiment.model.evaluate((), subject.params, batch)
        expected = float(sums["correct"].sum() / sums["count"].sum())
        assert len(tests.mask[3]) == 1
        assert result["training"]["accuracy"][3] == pytest.approx(expected, abs=1e-6)


def test_clients_without_a_tested_class_have_no_accuracy(runs, tmp_path):
    """None of them trains on a class of the test set."""
    subject = load(open_run(runs[0]), None, SMALL)
    experiment = subject.run.experiment
    nothing = experiment.task.test._replace(mask=np.zeros_like(experiment.task.test.mask))
    experiment = experiment._replace(task=experiment.task._replace(test=nothing))
    result = fairness.measure(subject._replace(run=subject.run._replace(experiment=experiment)), SMALL)
    assert set(result["mixture"]["accuracy"]) == {None}
    assert all(math.isnan(value) for value in result["mixture"]["spread"].values())
    assert set(result["mixture"]["spread"]) == set(result["training"]["spread"])
    assert len(fairness.headline(result)) == 8
    _, by_size = fairness.draw(result, "", tmp_path / "drawn.png").axes
    assert [line.get_label() for line in by_size.lines] == [fairness.VIEWS["training"]]
    result["training"]["accuracy"] = result["mixture"]["accuracy"]
    fairness.draw(result, "", tmp_path / "empty.png")


def test_side_by_side(runs, inspected, tmp_path, capsys):
    assert len(side_by_side(inspected).columns) == 4
    options = ["--what", "fairness", "--round", "2", "--client-examples", "20", "--examples", "60"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *map(str, runs), *options, "--output", str(tmp_path / "table.csv")])
    assert ended.value.code == 0
    assert "worst" in capsys.readouterr().out
    rows = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert rows[0] == ["instrument", "quantity", "corrected-seed0 round 2", "clustered-seed0 round 2"]
    assert all(0 <= float(value) <= 1 for row in rows[1:] for value in row[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": ["sharpnes"]}, "did you mean sharpness"),
        ({"round": 4}, "no checkpoint of round 4: choose one of 1, 2, 3"),
        ({"what": ["mutations"]}, "clustered_sampling.* mutates nothing"),
    ],
)
def test_what_cannot_be_inspected_is_refused(runs, options, message):
    with pytest.raises(ConfigurationError, match=message):
        inspect_runs([runs[1]], settings=SMALL, **options)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no run"):
        inspect_runs([tmp_path])
    with pytest.raises(ConfigurationError, match="nothing to inspect"):
        inspect_runs([])


def test_runs_of_language_models_are_refused(tmp_path):
    text = "{name: x, data: alpaca_demo, partition: iid, model: smollm2, algorithm: fedit}"
    RunFolder(tmp_path).config_file.write_text(text)
    with pytest.raises(ConfigurationError, match="language model"):
        inspect_runs([tmp_path])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": (0.0,)}, "radii"),
        ({"grid": 4}, "odd"),
        ({"probes": 1}, "standard error"),
        ({"krylov": 3}, "krylov = 3"),
        ({"examples": 0}, "examples = 0"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        Settings(**change)
