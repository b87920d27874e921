"""Runs from Python: the same bits as on the command line, and tables of numbers that were worked out by hand."""

import gc
import json

import numpy as np
import pandas as pd
import pytest
from support.comparisons import made_run
from support.runs import SMALL

import fedjax_qp as fq
from fedjax_qp.cli import main
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder

METHODS = {"FedAvg": fq.fedavg(weighting="uniform"), "FedQP": fq.fedqp(form="nearest", alpha=1.0)}


def trained(**settings) -> fq.Runs:
    """The ten lines of the package's docstring on smaller data, with lanes that are given."""
    return fq.run(
        data=fq.digits(),
        partition=fq.dirichlet(clients=12, beta=0.5, minimum=5),
        model=fq.mlp(hidden=[16]),
        local=fq.Local(learning_rate=0.05, momentum=0.0, epochs=1, batch_size=16),
        participation=fq.Participation(cohort=4),
        engine=fq.Engine(lanes=2, rounds_per_chunk=2),
        rounds=3,
        **settings,
    )


@pytest.fixture(scope="module")
def runs() -> fq.Runs:
    return trained(methods=METHODS, seeds=[0, 1])


def test_frame_has_a_row_for_each_method_seed_and_round(runs):
    frame = runs.frame()
    assert list(frame.columns[:3]) == ["method", "seed", "round"]
    assert frame[["method", "seed", "round"]].to_numpy().tolist() == [
        [method, seed, round] for method in METHODS for seed in (0, 1) for round in (1, 2, 3)
    ]
    assert frame["test_accuracy"].between(0, 1).all()
    assert frame.loc[frame["method"] == "FedAvg", "mutation/drift"].isna().all()


def test_records_are_those_of_the_command_line(runs, tmp_path):
    """Bit for bit, with the settings as YAML."""
    settings = {
        **SMALL,
        "name": "FedQP",
        "rounds": 3,
        "folder": str(tmp_path / "runs"),
        "local": {"learning_rate": 0.05, "momentum": 0.0, "epochs": 1, "batch_size": 16},
        "tracking": {"tensorboard": False},
    }
    settings.pop("evaluation")
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "run.yaml"), "--seeds", "0", "1"])
    assert ended.value.code == 0
    for mine, seed in zip(runs.folders[2:], (0, 1), strict=True):
        same = RunFolder(tmp_path / "runs" / f"FedQP-seed{seed}")
        assert RunFolder(mine).records_file.read_bytes() == same.records_file.read_bytes()
    loaded = fq.load(tmp_path / "runs")
    mine = runs.frame().query("method == 'FedQP'").reset_index(drop=True)
    pd.testing.assert_frame_equal(loaded.frame(), mine[loaded.frame().columns])
    pd.testing.assert_frame_equal(fq.load(f"{tmp_path}/runs/FedQP-seed*").frame(), loaded.frame())
    np.testing.assert_equal(loaded.params(seed=1).trainable, runs.params("FedQP", 1).trainable)
    assert len(fq.load(loaded, tmp_path / "runs" / "FedQP-seed0")) == 2


def test_params_are_of_one_run(runs):
    kernel = runs.params("FedAvg", seed=0).trainable["dense1"]["kernel"]
    assert isinstance(kernel, np.ndarray)
    assert kernel.shape == (64, 16)
    with pytest.raises(ConfigurationError, match="names 2 runs: choose of 'FedAvg', seed 0; 'FedAvg', seed 1"):
        runs.params("FedAvg")


def test_simulate_keeps_the_loop_open(runs):
    chunks = fq.simulate(
        data=fq.digits(),
        partition=fq.dirichlet(clients=12, beta=0.5, minimum=5),
        model=fq.mlp(hidden=[16]),
        method=METHODS["FedQP"],
        seed=1,
        local=fq.Local(learning_rate=0.05, momentum=0.0, epochs=1, batch_size=16),
        participation=fq.Participation(cohort=4),
        engine=fq.Engine(lanes=2, rounds_per_chunk=2),
        rounds=3,
    )
    found = [record for chunk in chunks for record in chunk.records]
    assert [record["round"] for record in found] == [1, 2, 3]
    shared = runs.frame().query("method == 'FedQP' and seed == 1")
    np.testing.assert_allclose([record["train_loss"] for record in found], shared["train_loss"], rtol=1e-4)


def test_a_figure_and_a_table_show_themselves(runs, tmp_path):
    figure = runs.plot("train_loss", tmp_path / "loss.svg")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["FedAvg (2 seeds)", "FedQP (2 seeds)"]
    shown = runs._repr_html_()
    assert shown.startswith("<table") and "<th>method</th>" in shown and "<td>FedAvg</td>" in shown
    with pytest.raises(ConfigurationError, match="unknown metric 'test_acuracy': did you mean test_accuracy"):
        runs.plot("test_acuracy")


def test_clients_without_tests_of_their_own_are_no_table(runs):
    with pytest.raises(ConfigurationError, match="give the partition test='matched'"):
        runs.clients()


def test_a_named_folder_is_kept_and_a_temporary_one_is_not(tmp_path):
    settings = {"methods": fq.fedavg(), "progress": False}
    images = np.random.default_rng(0).integers(0, 255, (120, 4, 4), dtype=np.uint8)
    labels = np.arange(120) % 3
    common = {
        "partition": fq.iid(clients=4),
        "model": fq.mlp(hidden=[4]),
        "data": fq.Arrays((images, labels), (images[:30], labels[:30])),
        "participation": fq.Participation(cohort=2),
        "engine": fq.Engine(lanes=1),
        "rounds": 1,
    }
    kept = fq.run(**common, **settings, folder=tmp_path / "kept")
    assert kept.folders == [tmp_path / "kept" / "fedavg-seed0"]
    assert len(fq.run(**common, **settings, folder=tmp_path / "kept").frame()) == 1  # it has ended: nothing is trained
    gone = fq.run(**common, **settings)
    (folder,) = gone.folders
    assert folder.is_dir()
    np.testing.assert_equal(gone.params().trainable, kept.params().trainable)
    del gone
    gc.collect()
    assert not folder.parent.exists()
    assert kept.folders[0].is_dir()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [0, 0]}, "give each seed once"),
        ({"methods": {}}, "methods = {} is empty"),
        ({"learning_rate": 0.1}, "unknown setting 'learning_rate': did you mean local.learning_rate"),
        ({"methods": {"a/b": fq.fedavg()}}, "must be one name, without /"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        trained(**{"methods": METHODS, **settings})


def test_paired_differences_by_hand(tmp_path):
    """FedAvg 0.50 and 0.60, FedQP 0.52 and 0.66: differences of 2 and 6 points, mean 4, standard deviation √8."""
    qp = {"algorithm": {"name": "fedqp", "alpha": 2.0}}
    made_run(tmp_path, "FedAvg", 0, [0.1, 0.2, 0.48, 0.52])
    made_run(tmp_path, "FedAvg", 1, [0.1, 0.2, 0.55, 0.65])
    made_run(tmp_path, "FedQP", 0, [0.1, 0.2, 0.52, 0.52], **qp)
    made_run(tmp_path, "FedQP", 1, [0.1, 0.2, 0.66, 0.66], **qp)
    compared = fq.load(tmp_path).compare(baseline="FedAvg", last=2, target=0.5)
    frame = compared.frame()
    assert frame.loc["FedQP", "difference"] == pytest.approx(4.0)
    assert frame.loc["FedQP", "difference_std"] == pytest.approx(8**0.5)
    assert frame.loc["FedAvg", "accuracy"] == pytest.approx(0.55)
    assert frame.loc["FedAvg", "rounds_to_target"] == 3.5  # rounds 4 and 3
    assert "+4.00 ± 2.83" in compared._repr_html_()
    assert "+4.00 ± 2.83" in repr(fq.compare(tmp_path, baseline="FedAvg", last=2))
    with pytest.raises(ConfigurationError, match="unknown baseline 'FedProx'"):
        fq.compare(tmp_path, baseline="FedProx")


def test_clients_one_by_one(tmp_path):
    folder = made_run(tmp_path, "own", 3, [0.5])
    views = {
        "loss": {"mean": 1.5, "clients": [1.0, None, 2.0]},
        "accuracy": {"mean": 0.5, "clients": [0.75, None, 0.25]},
    }
    lines = [{"round": 1, "train_loss": 1.0}, {"round": 2, "personal": views, "tuned": views | {"nonfinite": [2]}}]
    RunFolder(folder).records_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    clients = fq.load(folder).clients()
    assert list(clients.columns) == ["method", "seed", "round", "view", "client", "loss", "accuracy"]
    assert clients["client"].tolist() == [0, 1, 2, 0, 1, 2]
    assert clients["view"].tolist() == ["aggregated"] * 3 + ["tuned"] * 3
    assert set(clients["round"]) == {2}
    assert clients["accuracy"].tolist()[:1] == [0.75]
    assert clients["accuracy"].isna().tolist() == [False, True, False] * 2


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="is no run folder and holds none"):
        fq.load(tmp_path)
