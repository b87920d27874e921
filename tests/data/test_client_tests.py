"""Tests of each client's own, against numbers worked out by hand and against what they promise."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp import config
from fedjax_qp.data import label_counts, match, own_counts, partitions
from fedjax_qp.engine import evaluation
from fedjax_qp.experiment import advice, build, resolve
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.loop import simulate
from fedjax_qp.runs.programs import groups
from fedjax_qp.runs.records import quotient


def numbers_of(dealt: list[np.ndarray], labels: np.ndarray, classes: int) -> np.ndarray:
    return label_counts(dealt, labels, classes)


def test_matched_by_hand():
    """10 test examples of class 0 among 6, 3 and 1 of training, 5 of class 1 among 0, 4 and 4; 3 of class 2, nobody's."""
    counts = np.array([[6, 0, 0], [3, 4, 0], [1, 4, 0]])
    labels = np.repeat([0, 1, 2], [10, 5, 3])
    dealt = match(counts, labels, np.random.default_rng(0))
    # Class 1: 2.5 each; nobody is behind from class 0, so the first gets the fifth.
    assert numbers_of(dealt, labels, 3).tolist() == [[6, 0, 0], [3, 3, 0], [1, 2, 0]]


def test_what_rounding_leaves_over_goes_to_those_furthest_behind():
    counts = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]])
    labels = np.repeat([0, 1, 2, 3], 2)  # shares of ½, 1 and ½ of each class
    dealt = match(counts, labels, np.random.default_rng(0))
    assert numbers_of(dealt, labels, 4).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    clients=st.integers(1, 12), classes=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), most=st.sampled_from([2, 40])
)
def test_matched_laws(clients, classes, seed, most):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, most, (clients, classes))
    labels = generator.integers(0, classes, 50)
    dealt = match(counts, labels, np.random.default_rng(seed))
    everything = np.concatenate(dealt)
    assert len(np.unique(everything)) == len(everything)  # disjoint
    of_class, found = np.bincount(labels, minlength=classes), numbers_of(dealt, labels, classes)
    held = counts.sum(0) > 0
    np.testing.assert_array_equal(found.sum(0), np.where(held, of_class, 0))  # and all that anybody has
    shares = of_class * counts / np.maximum(counts.sum(0), 1)
    assert (np.abs(found - shares) < 1).all()
    assert (found[counts == 0] == 0).all()
    again = match(counts, labels, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(dealt, again, strict=True))


def test_own_is_a_share_of_at_least_one_and_not_all():
    parts = [np.arange(n) for n in (2, 4, 10, 13)]
    assert own_counts(parts, 0.2) == [1, 1, 2, 3]
    assert own_counts(parts, 0.99) == [1, 3, 9, 12]
    with pytest.raises(ConfigurationError, match=r"client 1 has 1: choose partition\.test = matched"):
        own_counts([np.arange(3), np.arange(1)], 0.2)


def made(partition: dict, **changes) -> config.Config:
    values = {
        "name": "personal",
        "rounds": 1,
        "data": "digits",
        "partition": partition,
        "model": {"name": "mlp", "hidden": [8]},
        "algorithm": "ditto",
        "local": {"learning_rate": 0.05, "momentum": 0, "batch_size": 32, "epochs": 1},
        "participation": {"cohort": 3},
        "engine": {"lanes": 2, "rounds_per_chunk": 1},
        **changes,
    }
    return config.from_dict(values)


DIRICHLET = {"name": "dirichlet", "clients": 5, "beta": 0.5, "minimum": 10}


@pytest.mark.parametrize("partition", [DIRICHLET, {"name": "iid", "clients": 4}, {"name": "shards", "clients": 4}])
def test_matched_clients_are_tested_on_their_own_labels(partition):
    common = build(made(partition)).task
    matched = build(made(partition | {"test": "matched"})).task
    assert common.personal is None and matched.personal is not None
    for a, b in zip(common.parts, matched.parts, strict=True):
        np.testing.assert_array_equal(a, b)  # training is not touched
    labels, mask = np.asarray(matched.personal.examples.labels), np.asarray(matched.personal.mask)
    found = np.stack([np.bincount(labels[k][mask[k]], minlength=10) for k in range(len(matched.parts))])
    of_class = np.bincount(np.asarray(matched.dataset.test.labels), minlength=10)
    assert (np.abs(found - of_class * matched.counts / matched.counts.sum(0)) < 1).all()
    assert found.sum() == len(matched.dataset.test.labels)
    shares = quotient(found, found.sum(1, keepdims=True))
    assert np.abs(shares - matched.shares).sum(1).mean() / 2 < 0.06  # what rounding costs


def test_own_tests_leave_the_training_part():
    common, own = (build(made(DIRICHLET | {"test": kind})).task for kind in ("common", "own"))
    assert own.personal is not None
    for k, (before, part) in enumerate(zip(common.parts, own.parts, strict=True)):
        mask = np.asarray(own.personal.mask[k])
        assert mask.sum() == max(round(0.2 * len(before)), 1) and len(part) + mask.sum() == len(before)
        left = np.setdiff1d(before, part)
        np.testing.assert_array_equal(
            np.asarray(own.personal.examples.inputs[k])[mask], np.asarray(own.dataset.train.inputs)[left]
        )
    assert own.sizes == [len(part) for part in own.parts] and (own.counts.sum(1) == own.sizes).all()


def test_personal_results_are_those_of_each_clients_own_model():
    """Against a loop over clients: the model that `serve` gives, on the client's own test examples."""
    experiment = build(made(DIRICHLET | {"test": "matched"}))
    task, algorithm = experiment.task, experiment.algorithm
    assert task.personal is not None
    ((chunk,),) = simulate([experiment])
    (record,) = chunk.records
    assert set(record["personal"]) == set(record["tuned"]) == {"loss", "accuracy"}
    for client in range(len(task.parts)):
        memory = type(chunk.state.clients)(*(_row(leaf, client) for leaf in chunk.state.clients))
        params = algorithm.serve(chunk.state.server, memory)
        examples = type(task.personal.examples)(
            *(leaf[client].reshape(-1, *leaf.shape[3:]) for leaf in task.personal.examples)
        )
        mask = task.personal.mask[client].reshape(-1)
        sums = task.model.evaluate((), params, type("B", (), {"examples": examples, "mask": mask}))
        count = float(sums["count"].sum())
        assert record["personal"]["loss"]["clients"][client] == pytest.approx(float(sums["loss"]) / count, rel=1e-4)
        assert record["personal"]["accuracy"]["clients"][client] == pytest.approx(float(sums["correct"].sum()) / count)


def _row(tree, client: int):
    return jax.tree.map(lambda leaf: leaf[client], tree)


def test_a_personal_method_without_client_tests_is_told_so():
    said = advice(build(made(DIRICHLET)))
    assert len(said) == 1 and "partition.test=matched" in said[0]
    for kind in ("own", "matched"):
        assert advice(build(made(DIRICHLET | {"test": kind}))) == []
    for algorithm in ("scaffold", "moon", "fedqp"):  # they have memories, or several models, but serve one
        assert advice(build(made(DIRICHLET, algorithm=algorithm))) == []
    (no_effect,) = advice(build(made(DIRICHLET | {"test_share": 0.5}, algorithm="fedavg")))
    assert "partition.test_share = 0.5 has no effect" in no_effect


def machine_of(size: int) -> SimpleNamespace:
    """Stands in for psutil."""
    return SimpleNamespace(virtual_memory=lambda: SimpleNamespace(total=size))


def test_tests_of_uneven_clients_that_fit_no_memory_are_refused_before_they_are_cut(monkeypatch):
    """One client of 8,000 tests gives room for as many to 5,000 clients of one."""
    monkeypatch.setattr(evaluation, "psutil", machine_of(2**37))
    image = np.zeros((1, 32, 32, 3), np.uint8)
    clients = [np.broadcast_to(image, (8000, *image.shape[1:])), *[image] * 5000]
    with pytest.raises(ConfigurationError, match=r"take 114\.5 GiB.*5,001 clients.*8,000.*more even size") as error:
        evaluation.cut_client_tests(clients, 500)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500
    assert evaluation.cut_client_tests([image] * 3, 500).mask.shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("test", "remedy"),
    [
        ("own", r"partition\.test_share = 0\.2.*more even clients.*partition\.test = matched"),
        ("matched", r"partition\.test = common"),
    ],
)
def test_the_remedy_for_tests_that_fit_no_memory_is_named(monkeypatch, test, remedy):
    monkeypatch.setattr(evaluation, "psutil", machine_of(2**12))
    with pytest.raises(ConfigurationError, match=f"the clients' own tests take.*{remedy}") as error:
        build(made(DIRICHLET | {"test": test}))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 500


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"test": "mine"}, "test = 'mine'"),
        ({"test": "own", "test_share": 1.0}, r"test_share = 1\.0"),
        ({"test": "own", "test_share": 0}, "test_share = 0"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            resolve(made(DIRICHLET | options))
    with pytest.raises(ConfigurationError, match=r"client_store = 'host'.*partition\.test = common"):
        build(made(DIRICHLET | {"test": "own"}, engine={"lanes": 1, "client_store": "host"}))
    language = {"data": {"name": "records", "files": "any"}, "model": {"name": "pretrained", "path": "any"}}
    with pytest.raises(ConfigurationError, match=r"partition\.test = 'own'.*text\.test_records"):
        resolve(made({"name": "iid", "test": "own"}, algorithm="fedit", **language))


def test_every_partition_has_the_options():
    assert all({"test", "test_share"} <= set(partitions.options(name)) for name in partitions.names())


def test_runs_with_different_tests_share_no_program():
    seeds = [
        made(DIRICHLET | {"test": kind}, seed=seed, name=f"s{seed}") for kind in ("common", "own") for seed in (0, 1)
    ]
    assert groups(seeds) == [[0, 1], [2], [3]]
    rates = [made(DIRICHLET | {"test": "own"}, local={"learning_rate": rate}, name=f"r{rate}") for rate in (0.1, 0.2)]
    assert groups(rates) == [[0, 1]]
