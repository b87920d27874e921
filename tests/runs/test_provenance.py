"""A run goes on with the data and weights that it began with, and with no others, whatever lies under their names."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.runs import write

from fedjax_qp import config
from fedjax_qp.experiment import build
from fedjax_qp.instruments.subject import open_run
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs import provenance as module
from fedjax_qp.runs.environment import environment
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.provenance import Provenance, provenance
from fedjax_qp.runs.run import restore, resume, run, run_all

QUIET = Console(quiet=True)


def write_images(file: Path, seed: int = 0) -> None:
    """Other images under the same labels."""
    labels = np.arange(240) % 10
    images = np.random.default_rng(seed).integers(0, 256, (240, 8, 8)).astype(np.uint8)
    clients = np.arange(240) % 12
    np.savez(
        file,
        train_inputs=images,
        train_labels=labels,
        test_inputs=images[:50],
        test_labels=labels[:50],
        client_ids=clients,
    )


@pytest.fixture
def loaded(tmp_path):
    write_images(tmp_path / "mine.npz")
    data = {"name": "arrays", "path": str(tmp_path / "mine.npz")}
    return config.load(write(tmp_path, data=data, partition="natural", algorithm="fedavg", rounds=2))


def test_other_data_under_the_same_name_are_refused(tmp_path, loaded):
    folder = run(loaded, QUIET).folder
    before = RunFolder(folder).records_file.read_bytes()
    write_images(tmp_path / "mine.npz", seed=1)
    message = "begun with other content: .*training examples.* differ .*mine.npz.*[Rr]estore"
    for use in (
        lambda: resume(folder, ["rounds=4"], QUIET),
        lambda: restore(folder),
        lambda: open_run(folder),
        lambda: run_all([RunFolder(folder).config(["rounds=4"])], QUIET),
    ):
        with pytest.raises(ConfigurationError, match="mine.npz"):
            use()
    with pytest.raises(ConfigurationError, match=message):
        resume(folder, ["rounds=4"], QUIET)
    with pytest.raises(
        ConfigurationError, match="data differs from what .*seed0"
    ):  # another seed, to be compared with it
        run_all([RunFolder(folder).config([f"seed={seed}"]) for seed in (0, 1)], QUIET)
    assert not (folder.parent / "small-seed1").exists()
    assert RunFolder(folder).records_file.read_bytes() == before
    write_images(tmp_path / "mine.npz")
    assert resume(folder, ["rounds=4"], QUIET).rounds == 4


def test_another_split_is_refused(tmp_path, loaded):
    folder = run(loaded, QUIET).folder
    contents = dict(np.load(tmp_path / "mine.npz"))
    np.savez(tmp_path / "mine.npz", **{**contents, "client_ids": contents["client_ids"][::-1]})
    with pytest.raises(ConfigurationError, match="partition.* differ"):
        resume(folder, ["rounds=4"], QUIET)


def test_images_are_hashed_once_though_they_are_data_and_training_examples(loaded, monkeypatch):
    experiment, hashed = build(loaded), []
    plain = module._leaf_digest
    monkeypatch.setattr(module, "_leaf_digest", lambda leaf: hashed.append(leaf) or plain(leaf))
    (found,) = provenance([experiment])
    inputs = experiment.task.train.inputs
    assert sum(leaf is inputs for leaf in hashed) == 1 and {"data", "training examples"} <= found.digests.keys()


def test_sizes_of_evaluation_batches_are_no_content(loaded):
    digests = [
        provenance([build(config.from_dict(config.to_dict(loaded) | {"evaluation": {"batch_size": size}}))])[0].digests
        for size in (7, 500)
    ]
    assert digests[0] == digests[1]


def test_a_run_of_an_earlier_version_is_said_once_to_be_unchecked(tmp_path, loaded, capsys):
    folder = run(loaded, QUIET).folder
    RunFolder(folder).provenance.path.unlink()
    for rounds, said in ((4, True), (6, False)):
        resume(folder, [f"rounds={rounds}"], Console(width=300))
        assert ("cannot be checked" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("name", "said"), [("tokenizer", True), ("model configuration", True), ("data", False)])
def test_other_versions_of_packages_are_named_where_they_may_be_the_reason(tmp_path, name, said):
    settings = {"data": {"name": "records"}, "model": {"name": "pretrained"}}
    Provenance({name: "0"}, settings).write(RunFolder(tmp_path))
    with pytest.raises(ConfigurationError, match=f"{name} differs") as refused:
        Provenance({name: "1"}, settings).check(RunFolder(tmp_path), print)
    assert ("versions of packages" in str(refused.value)) == said
    pytest.importorskip("tokenizers")
    assert {"transformers", "tokenizers"} <= environment()["packages"].keys()  # pyright: ignore[reportAttributeAccessIssue]


def test_other_weights_and_another_tokenizer_are_noticed(tmp_path, shared_folder):
    """Language models: the folder stays, its content does not."""
    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(shared_folder / "models" / "stories260k", tmp_path / "model"))
    (tmp_path / "records.jsonl").write_text(
        "".join(f'{{"instruction": "Say {n % 7}.", "output": "The cat {"sat " * (n % 5)}there."}}\n' for n in range(20))
    )
    values = {
        "name": "words",
        "data": {"name": "records", "files": str(tmp_path / "records.jsonl")},
        "partition": {"name": "iid", "clients": 2},
        "model": {"name": "pretrained", "path": str(model), "rank": 2},
        "algorithm": "fedit",
        "text": {"cut_off": 96, "template": "short", "test_records": 4},
        "participation": {"cohort": 2},
        "engine": {"lanes": 2},
        "evaluation": {"batch_size": 4},
    }
    (before,) = provenance([build(config.from_dict(values))])
    assert before == provenance([build(config.from_dict(values))])[0]
    assert {
        "data",
        "frozen weights",
        "tokenizer",
        "model configuration",
        "clients' test examples",
    } <= before.digests.keys()
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    weights[name] = weights[name] + np.float32(1e-3)
    save_file(weights, model / "model.safetensors")
    (after,) = provenance([build(config.from_dict(values))])
    assert [name for name in before.digests if after.digests[name] != before.digests[name]] == ["frozen weights"]
