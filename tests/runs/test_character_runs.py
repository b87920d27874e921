"""Runs on windows of text: from LEAF's files to accuracy, and models that do not fit the data."""

import json

import pytest

from fedjax_qp import config
from fedjax_qp.experiment import build
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.loop import simulate


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three roles that each say one thing over and over, so that the next character is never in doubt."""
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 24), ("test", 6)):
        data = {}
        for role, phrase in (("ANN", "yes, "), ("BOB", "no! "), ("CAT", "ab")):
            text = phrase * 60
            starts = range(count)
            data[role] = {"x": [text[k : k + 80] for k in starts], "y": [text[k + 80] for k in starts]}
        content = {"users": list(data), "num_samples": [count] * 3, "user_data": data}
        (tmp_path / part).mkdir()
        (tmp_path / part / "all.json").write_text(json.dumps(content))
    return tmp_path


def settings(folder, **changes):
    return config.from_dict(
        {
            "name": "roles",
            "rounds": 18,
            "data": {"name": "shakespeare_leaf", "folder": str(folder)},
            "partition": "natural",
            "model": {"name": "char_lstm", "embedding": 4, "hidden": 12, "layers": 1, "predict": "every"},
            "algorithm": {"name": "fedqp", "form": "nearest", "alpha": 0.5},
            "local": {"optimizer": "adam", "learning_rate": 0.03, "epochs": 4, "batch_size": 8},
            "participation": {"cohort": 3},
            "engine": {"lanes": 2, "rounds_per_chunk": 18},
            "evaluation": {"every": 18, "batch_size": 9},
            **changes,
        }
    )


def test_a_run_learns_what_the_roles_say(folder):
    experiment = build(settings(folder))
    assert [len(part) for part in experiment.work.parts] == [24] * 3
    assert experiment.task.notes == ("3 roles with 72 windows to train on, 18 to test on",)
    ((chunk,),) = simulate([experiment])
    assert chunk.records[-1]["test_accuracy"] > 0.95


def test_models_that_do_not_fit_the_data_are_refused(folder):
    with pytest.raises(
        ConfigurationError, match=r"model = 'lenet' does not fit data = 'shakespeare_leaf': .*char_lstm"
    ):
        build(settings(folder, model="lenet"))
    with pytest.raises(ConfigurationError, match=r"model = 'char_lstm' does not fit data = 'digits': .*lenet"):
        build(settings(folder, data="digits", partition={"name": "iid", "clients": 3}))
