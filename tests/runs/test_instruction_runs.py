"""Whole runs of instruction tuning on a tiny Llama with a tokenizer of its own: run, resume, compare, export, answer."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the extra `language`")
pytest.importorskip("tokenizers")

from rich.console import Console
from support.instructions import SMALL, instruction_settings, write_instructions
from support.runs import start, wait_for_rounds

from fedjax_qp import config
from fedjax_qp.cli import main
from fedjax_qp.engine import evaluation
from fedjax_qp.experiment import build
from fedjax_qp.models.language.peft import import_adapter
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports import compare
from fedjax_qp.reports.personal import has_personal, personal_json, personal_markdown, personal_summary
from fedjax_qp.runs.export import answer, client_params, export_clients
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import restore, resume, run

ENTRIES = 2 * 2 * ((16 + 16) + (16 + 8))  # layers · rank · (in + out) of q_proj and v_proj, rank 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer and three files of records."""
    return write_instructions(tmp_path_factory.mktemp("instructions"))


def made(place, **changes) -> config.Config:
    return config.from_dict(instruction_settings(place, **changes))


@pytest.fixture(scope="module")
def finished(place):
    """PerFIT and FedIT, two rounds each."""
    console = Console(quiet=True)
    perfit = run(made(place), console).folder
    fedit = run(made(place, name="fedit", algorithm="fedit"), console).folder
    return perfit, fedit


def test_both_train_equally_many_entries_and_test_every_client_twice(finished):
    for folder in finished:
        last = RunFolder(folder).records()[-1]
        assert last["client/trained_entries"] == ENTRIES
        for view in ("personal", "tuned"):
            perplexity = last[view]["perplexity"]
            assert len(perplexity["clients"]) == 3
            assert perplexity["min"] > 1 and np.isfinite(perplexity["max"])
            assert perplexity["unseen"] is None
        assert last["personal"]["perplexity"]["mean"] != last["tuned"]["perplexity"]["mean"]
    first, second = RunFolder(finished[0]).records()
    assert first["client/upload_bytes"] == 4 * ENTRIES + np.ceil(2 * ENTRIES / 8)  # values, and the mask once
    assert second["client/upload_bytes"] == second["client/download_bytes"] == 4 * ENTRIES


def test_training_lowers_the_loss(place):
    outcome = run(made(place, name="longer", algorithm="fedit", rounds=6), Console(quiet=True))
    losses = [line["train_loss"] for line in RunFolder(outcome.folder).records()]
    assert losses[-1] < losses[0] - 0.05


def test_resumed_perfit_is_bitwise_the_uninterrupted_one(place, finished):
    folder = run(made(place, name="halves", rounds=1), Console(quiet=True)).folder
    resume(folder, ["rounds=2"], Console(quiet=True))
    whole, halves = (restore(one)[1] for one in (finished[0], folder))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_array_equal(a, b)
    assert RunFolder(folder).records() == RunFolder(finished[0]).records()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 12])
def test_killed_perfit_resumes_bitwise(place, tmp_path, rounds):
    """A search every five rounds, so that the second kill comes after masks have changed."""
    searching = {"name": "perfit", "warm_up": 1, "prunings": 2, "score_batches": 1, "search_every": 5}
    changes = {"rounds": 40, "algorithm": searching}
    whole = run(made(place, folder=str(tmp_path / "whole"), **changes), Console(quiet=True)).folder
    file = tmp_path / "killed.yaml"
    config.save(made(place, folder=str(tmp_path / "killed"), **changes), file)
    folder = config.load(file).run_folder
    process = start(["run", str(file)])
    wait_for_rounds(process, folder, rounds)
    process.kill()
    process.communicate()
    assert len(RunFolder(folder).records()) < 40
    resume(folder, [], Console(quiet=True))
    first, second = (jax.tree.leaves(restore(one)[1]) for one in (whole, folder))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert RunFolder(folder).records() == RunFolder(whole).records()


def test_every_client_leaves_with_its_own_adapter(place, finished, tmp_path):
    experiment, state = restore(finished[0])
    folders = export_clients(experiment, state, tmp_path, "aggregated")
    assert [folder.name for folder in folders] == ["client_0", "client_1", "client_2"]
    masks = []
    for client, folder in enumerate(folders):
        adapters, rank, alpha = import_adapter(folder, SMALL)
        assert (rank, alpha) == (4, 8.0)  # expanded, at the same scale
        params = client_params(experiment, state, client, "aggregated")
        jax.tree.map(np.testing.assert_array_equal, adapters, params.trainable)
        masks.append(np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(params.masks)]))
        assert masks[-1].sum() == ENTRIES
    assert (masks[0] != masks[1]).any()


def test_the_command_line_exports_and_answers(finished, tmp_path, capsys):
    for arguments in (
        ["adapters", str(finished[0]), "--output", str(tmp_path / "out"), "--view", "tuned"],
        ["answer", str(finished[0]), "name a colour", "--client", "1", "--new-tokens", "4"],
        ["compare", *map(str, finished), "--baseline", "fedit", "--output", str(tmp_path / "comparison")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert (tmp_path / "out" / "client_2" / "adapter_model.safetensors").is_file()
    assert "name a colour" in capsys.readouterr().out
    assert "Δ tuned" in (tmp_path / "comparison-clients.md").read_text()


def test_answers_follow_the_adapters(finished):
    experiment, state = restore(finished[0])
    params = client_params(experiment, state, 0, "tuned")
    strong = params._replace(trainable=jax.tree.map(lambda leaf: 50 * leaf, params.trainable))
    texts = [
        answer(experiment.task.language, one, ["please count the number"], template="short", new_tokens=12)
        for one in (params, strong)
    ]
    assert texts[0] != texts[1]


def test_the_table_compares_in_the_same_view(finished):
    runs = compare.load_runs(finished)
    assert has_personal(runs)
    rows = personal_summary(runs, baseline="fedit")
    perfit, fedit = rows
    expected = 100 * (perfit.perplexity["tuned"].mean / fedit.perplexity["tuned"].mean - 1)
    assert perfit.change["tuned"].mean == pytest.approx(expected)
    assert fedit.change["tuned"] is None
    assert len(personal_markdown(rows).splitlines()) == 4
    assert json.loads(personal_json(rows))[0]["trained_entries"] == ENTRIES
    with pytest.raises(ConfigurationError, match="unknown baseline"):
        personal_summary(runs, baseline="nobody")


def test_flops_of_a_training_token_are_counted_by_hand(place):
    language = build(made(place)).task.language
    matrices = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32) + 16 * 64  # q, k and v, o, the three of SwiGLU; head
    adapters = 2 * 4 * ((16 + 16) + (16 + 8))  # the expanded rank is trained densely in the warm-up
    assert language.training_flops(24) == 4 * matrices + 12 * 2 * 24 * 16 + 6 * adapters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "lenet"},
            "model = 'lenet' does not fit data = 'records': it takes images, .*: choose one of pretrained",
        ),
        ({"data": "digits", "partition": "iid"}, "model = 'pretrained' does not fit data = 'digits'"),
        ({"model": {"name": "pretrained", "path": "/nowhere"}}, "nowhere"),
        ({"engine": {"client_store": "host", "lanes": 1}}, "client_store = 'host' keeps most clients off"),
        ({"algorithm": {"name": "perfit", "warm_up": 50}}, "warm_up = 50 takes all 4 local steps of client 0"),
        ({"algorithm": {"name": "perfit", "warm_up": 1, "levels": [3.0]}}, "at most algorithm.expansion = 2"),
        ({"algorithm": {"name": "perfit", "warm_up": 1, "levels": [0.01]}}, "some would be empty"),
        ({"text": {"cut_off": 24, "test_records": 40}}, "client 0"),
        ({"text": {"cut_off": 3}}, "cut_off = 3 leaves nothing to train on of client 0"),
        ({"text": {"cut_off": 24, "template": "chat"}}, "chat template"),
    ],
)
def test_bad_settings_are_named_with_the_remedy(place, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        build(made(place, **changes))


def test_tests_that_fit_no_memory_are_named_with_the_remedy(place, monkeypatch):
    machine = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=2**10))
    monkeypatch.setattr(evaluation, "psutil", machine)
    with pytest.raises(ConfigurationError, match=r"text\.test_records = 4 or text\.cut_off = 24"):
        build(made(place))
