"""The numbers of records, by name."""

import numpy as np

from fedjax_qp.runs import record_numbers


def test_rounds_to_reach():
    made = [{"round": 1, "test_accuracy": 0.5}, {"round": 2}, {"round": 3, "test_accuracy": 0.7}]
    assert record_numbers.rounds_to_reach(made, 0.5) == 1
    assert record_numbers.rounds_to_reach(made, 0.6) == 3
    assert record_numbers.rounds_to_reach(made, 0.8) is None


def test_a_null_is_missing_or_not_finite():
    view = {"perplexity": {"mean": None, "unseen": None, "min": 2.0}}
    record = {"round": 1, "train_loss": None, "reporting": 0, "test_loss": None, "test_accuracy": 0.5, "a/b": 3}
    record |= {"personal": view, "tuned": view | {"nonfinite": [1]}, "client_accuracy": {"q10": None}}
    assert record_numbers.value(record, "a/b") == 3.0 and record_numbers.value(record, "personal/perplexity/min") == 2.0
    for name in ("train_loss", "personal/perplexity/mean", "client_accuracy/q10", "personal/loss/mean", "x", "a/c"):
        assert record_numbers.value(record, name) is None
    for name in ("test_loss", "tuned/perplexity/mean"):
        assert np.isnan(record_numbers.value(record, name))
    assert np.isnan(record_numbers.value(record | {"reporting": 2}, "train_loss"))
    assert (
        record_numbers.value({"tuned": view | {"nonfinite": [1], "accuracy": 0.5}}, "tuned/perplexity/unseen") is None
    )


def test_the_headline_is_what_the_task_is_judged_by():
    accuracies = {"test_accuracy": 0.5, "class_accuracy": [0.4, 0.6]}
    personal = {"personal": {"perplexity": {"mean": 3.0}}}
    assert record_numbers.headline({"round": 1}) is None
    assert record_numbers.headline({"round": 1, **accuracies}) == ("accuracy", 0.5)
    assert record_numbers.headline({"round": 1, **accuracies, **personal}) == ("accuracy", 0.5)  # Ditto on images
    assert record_numbers.headline({"round": 1, "test_accuracy": 0.5, **personal}) == ("perplexity", 3.0)
