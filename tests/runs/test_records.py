"""Records against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from fedjax_qp.engine.plan import Lanes, Plan, Preparations
from fedjax_qp.federated import Cohort
from fedjax_qp.runs import record_numbers
from fedjax_qp.runs.record_file import Recorder
from fedjax_qp.runs.records import chunk_records, nonfinite_clients

SHARES = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]])  # four clients, two classes


def made_plan(rounds: int = 2) -> Plan:
    """Three rounds of room, cohorts of three; client 7 drops out of the first round, all of the second."""
    clients = np.array([[5, 7, 9], [1, 2, 3], [0, 0, 0]], np.int32)
    steps = np.array([[4, 0, 2], [0, 0, 0], [0, 0, 0]], np.int32)
    nothing = np.zeros((1, 3, 1), np.int32)
    lanes = Lanes(nothing, nothing, nothing[..., None], nothing[..., 0])
    evaluate = np.array([True, False, True])
    cohorts = Cohort(clients, np.ones((3, 3), np.float32), steps)
    nobody = Preparations(nothing[:, :, :0], nothing[:, :, :0, None, None], nothing[..., 0])
    return Plan(cohorts, clients, lanes, nobody, evaluate, np.array(rounds, np.int32))


def made_metrics() -> dict[str, np.ndarray]:
    return {
        "client/loss": np.array([[1.0, np.nan, 3.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]], np.float32),
        "client/update_norm": np.array([[0.5, 100.0, 1.5], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]], np.float32),
        "mutation/drift": np.array([0.25, np.inf, 0.0], np.float32),
        "mutation/cosine_after": np.array([[0.5, np.nan, 1.0]] * 3, np.float32),
        "qp/iterations": np.array([7, 8, 0], np.int32),
        "test/loss": np.array([20.0, 0.0, 0.0], np.float32),
        "test/correct": np.array([[8.0, 6.0], [0.0, 0.0], [0.0, 0.0]], np.float32),
        "test/count": np.array([[10.0, 30.0], [0.0, 0.0], [0.0, 0.0]], np.float32),
    }


def test_record_of_an_evaluated_round_with_a_dropout():
    first, _ = chunk_records(made_metrics(), made_plan(), 10, SHARES)
    assert first["round"] == 11
    assert first["train_loss"] == 2.0  # (1 + 3) / 2, without the dropped client
    assert (first["reporting"], first["local_steps"]) == (2, 6)
    assert first["client/update_norm"] == 1.0
    assert first["mutation/drift"] == 0.25
    assert first["mutation/cosine_after"] == [0.5, None, 1.0]
    assert first["qp/iterations"] == 7
    assert first["test_loss"] == 0.5  # 20 / 40
    assert first["test_accuracy"] == pytest.approx(14 / 40)  # not the mean over classes, 0.5
    assert first["class_accuracy"] == pytest.approx([0.8, 0.2])


def test_client_accuracy_weighs_classes_by_each_clients_labels():
    first, _ = chunk_records(made_metrics(), made_plan(), 10, SHARES)
    spread = first["client_accuracy"]  # clients: 0.8, 0.2, 0.5, 0.35
    assert list(spread) == ["mean", "q05", "q10", "q25", "q50", "q75", "q90", "q95", "min", "max"]
    assert spread["mean"] == pytest.approx(0.4625)
    assert spread["min"] == pytest.approx(0.2)
    assert spread["q50"] == pytest.approx(0.425)
    assert spread["q10"] == pytest.approx(0.245)  # a tenth of the way through 3 gaps: 0.2 + 0.3·0.15


def test_client_accuracy_leaves_out_classes_without_test_examples():
    metrics = made_metrics()
    metrics["test/correct"][0], metrics["test/count"][0] = [8, 0], [10, 0]
    first, _ = chunk_records(metrics, made_plan(), 0, SHARES)
    assert first["class_accuracy"] == [pytest.approx(0.8), None]
    assert first["client_accuracy"]["min"] == pytest.approx(0.8)  # client 1 holds only the untested class
    metrics["test/count"][0] = 0
    first, _ = chunk_records(metrics, made_plan(), 0, SHARES)
    assert first["test_accuracy"] is None
    assert set(first["client_accuracy"].values()) == {None}


def test_personal_tests_are_spread_over_those_who_took_part():
    metrics = made_metrics()
    losses = np.zeros((3, 10), np.float32)
    losses[0] = np.arange(10) * np.log(2)
    metrics |= {"personal/loss": losses, "personal/correct": np.ones((3, 10, 1)), "personal/count": np.ones((3, 10, 1))}
    metrics["personal/count"][0, 9] = 4
    first, second = chunk_records(metrics, made_plan(), 10, None, seen={1})
    perplexity = first["personal"]["perplexity"]  # 2^k, but client 9 has four tokens: 2^(9/4)
    assert perplexity["clients"] == pytest.approx([2.0**k for k in range(9)] + [2**2.25], rel=1e-5)
    assert perplexity["mean"] == pytest.approx((2 + 2**5 + 2**2.25) / 3)  # clients 1, 5 and 9; 7 dropped out
    assert (perplexity["min"], perplexity["max"]) == (pytest.approx(2), pytest.approx(32))
    assert perplexity["unseen"] == pytest.approx((1 + 4 + 8 + 16 + 64 + 128 + 256) / 7)
    assert first["personal"]["accuracy"]["clients"][9] == 0.25
    assert "tuned" not in first and "personal" not in second
    of_images, _ = chunk_records(metrics, made_plan(), 10, SHARES, seen={1})
    assert set(of_images["personal"]) == {"loss", "accuracy"}


def test_losses_count_by_examples_and_all_else_by_client():
    metrics = made_metrics()
    metrics["client/personal_loss"] = np.array([[4.0, 5.0, 8.0]] * 3, np.float32)
    metrics["client/counted"] = np.array([[30, 7, 10], [0, 0, 0], [0, 0, 0]])
    first, second = chunk_records(metrics, made_plan(), 10, SHARES)
    assert first["train_loss"] == 1.5  # (30·1 + 10·3) / 40, without the dropped client
    assert first["client/personal_loss"] == 5.0  # (30·4 + 10·8) / 40
    assert first["client/update_norm"] == 1.0  # (0.5 + 1.5) / 2
    assert second["train_loss"] is None
    assert "client/counted" not in first


def test_language_runs_have_no_accuracy_by_label_mixture():
    """Their only "class" is the token: a mixture of it would be the common accuracy, once for each client."""
    first, _ = chunk_records(made_metrics(), made_plan(), 10, None)
    assert first["test_accuracy"] == pytest.approx(14 / 40)
    assert "client_accuracy" not in first


def personal_metrics(losses: list[float], counts: list[float]) -> dict[str, np.ndarray]:
    """Of ten clients, in the first of three rounds."""
    metrics = made_metrics() | {
        "personal/loss": np.zeros((3, 10)),
        "personal/correct": np.zeros((3, 10, 1)),
        "personal/count": np.zeros((3, 10, 1)),
    }
    metrics["personal/loss"][0, : len(losses)] = losses
    metrics["personal/count"][0, : len(counts), 0] = counts
    return metrics


def test_a_client_whose_loss_is_not_finite_improves_no_mean():
    metrics = personal_metrics([10.0, 12.0, np.nan, 0.0], [10, 10, 10, 0])
    first, _ = chunk_records(metrics, made_plan(), 10, None, seen={0, 1, 2, 3})
    loss = first["personal"]["loss"]  # of clients 0, 1 and 2; 3 has no tests, 5 and 9 neither
    assert (loss["mean"], loss["max"], loss["q95"]) == (None, None, None)
    assert (loss["min"], loss["q25"], loss["q50"]) == (1.0, pytest.approx(1.1), pytest.approx(1.2))
    assert loss["q75"] is None  # half-way between 1.2 and what is no number
    assert loss["clients"][:4] == [1.0, pytest.approx(1.2), None, None]
    assert first["personal"]["nonfinite"] == [2]
    metrics["personal/loss"][0, 2] = 14.0
    first, _ = chunk_records(metrics, made_plan(), 10, None, seen={0, 1, 2, 3})
    assert first["personal"]["loss"]["mean"] == pytest.approx(1.2)  # the client without tests is left out
    assert "nonfinite" not in first["personal"]


def test_a_perplexity_beyond_all_numbers_is_no_small_one():
    metrics = personal_metrics([10.0, 12.0, 8000.0], [10, 10, 10])
    first, _ = chunk_records(metrics, made_plan(), 10, None, seen={0, 1, 2})
    perplexity = first["personal"]["perplexity"]  # exp(800) overflows
    assert (perplexity["mean"], perplexity["max"]) == (None, None)
    assert perplexity["min"] == pytest.approx(np.e)
    assert first["personal"]["loss"]["mean"] == pytest.approx((1 + 1.2 + 800) / 3)
    assert first["personal"]["nonfinite"] == [2]
    assert perplexity["unseen"] is None
    unseen, _ = chunk_records(metrics, made_plan(), 10, None, seen={0, 1})
    assert unseen["personal"]["perplexity"]["unseen"] is None
    assert unseen["personal"]["perplexity"]["mean"] == pytest.approx((np.e + np.exp(1.2)) / 2)


def test_only_infinite_losses_leave_nothing():
    first, _ = chunk_records(personal_metrics([np.inf], [5]), made_plan(), 10, None, seen={0})
    assert all(first["personal"]["loss"][name] is None for name in ("mean", "q05", "q50", "q95", "min", "max"))


def test_tests_that_are_not_finite_are_said():
    assert record_numbers.nonfinite_tests([]) is None
    metrics = personal_metrics([10.0, np.inf, np.nan], [10, 10, 10])
    made = chunk_records(metrics, made_plan(), 10, None, seen={0, 1, 2})
    assert record_numbers.nonfinite_tests([{"round": 1, "test_loss": 0.5, "test_accuracy": 0.5}]) is None
    said = record_numbers.nonfinite_tests(made)
    assert said is not None and "the personal model of clients 1, 2 (round 11)" in said
    common = record_numbers.nonfinite_tests([{"round": r, "test_loss": None, "test_accuracy": 0.25} for r in (3, 4)])
    assert common is not None and "the common test set (rounds 3, 4)" in common


def test_round_without_reports_and_evaluation():
    _, second = chunk_records(made_metrics(), made_plan(), 10, SHARES)
    assert second["round"] == 12
    assert second["train_loss"] is None
    assert (second["reporting"], second["local_steps"]) == (0, 0)
    assert second["mutation/drift"] is None  # infinite
    assert not [name for name in second if name.startswith(("test", "class", "client_"))]


def test_records_are_plain_json_and_only_of_rounds_in_use():
    for rounds in (0, 1, 2):
        made = chunk_records(made_metrics(), made_plan(rounds), 0, SHARES)
        assert len(made) == rounds
        assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_nonfinite_clients_are_named_unless_they_dropped_out():
    metrics = made_metrics()
    assert nonfinite_clients(metrics, made_plan(), 10) is None
    metrics["client/loss"][0, 2] = np.inf
    assert nonfinite_clients(metrics, made_plan(), 10) == (11, [9])
    assert nonfinite_clients(metrics, made_plan(0), 10) is None


def test_a_null_of_an_empty_group_of_clients_is_missing_whoever_else_is_not_finite():
    metrics = personal_metrics([10.0, 12.0, np.inf], [10, 10, 10])
    for seen, mean, unseen in (
        ({0, 1, 2}, math.nan, None),
        ({1, 2}, math.nan, 1.0),
        ({0, 1}, 1.1, math.nan),
        (set(), None, math.nan),
    ):
        first, _ = chunk_records(metrics, made_plan(), 10, None, seen=seen)
        record = json.loads(json.dumps(first))
        for name, expected in (("mean", mean), ("unseen", unseen)):
            found = record_numbers.value(record, f"personal/loss/{name}")
            assert found is None if expected is None else found == pytest.approx(expected, nan_ok=True)


def test_same_metrics_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with Recorder(tmp_path / name) as recorder:
            recorder.write(chunk_records(made_metrics(), made_plan(), 0, SHARES))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != b""
