"""Rows: what sources give, and what federated training makes of them beside scikit-learn's central fits."""

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets, linear_model, metrics

import fedjax_qp as fq
from fedjax_qp.data import partitions, sources
from fedjax_qp.data.rows.dataset import build_rows, in_strata, split
from fedjax_qp.registry import ConfigurationError


def trained(data, model=None, partition=None, rounds=30, **local) -> dict[str, float]:
    """The last record's tests after all of five clients took part in every round."""
    settings = {"learning_rate": 0.05, "momentum": 0.0, "epochs": 2, "batch_size": 10, **local}
    runs = fq.run(
        data=data,
        partition=partition or fq.iid(clients=5),
        model=model or fq.linear(),
        methods={"FedAvg": fq.fedavg()},
        rounds=rounds,
        local=fq.Local(**settings),
        participation=fq.Participation(cohort=5),
        engine=fq.Engine(lanes=5),
        progress=False,
    )
    return runs.frame().filter(like="test_").iloc[-1].to_dict()


def central(dataset):
    """Standardised arrays of a data set, to train and test on."""
    train, test = (np.asarray(part.inputs, np.float64) for part in (dataset.train, dataset.test))
    return (train - train.mean(0)) / train.std(0), (test - train.mean(0)) / train.std(0)


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_classes_beside_logistic_regression(name):
    """Two test rows at most: few rows, and the central fit is regularised."""
    dataset = sources.build(name)
    rows, test = central(dataset)
    fit = linear_model.LogisticRegression(max_iter=1000).fit(rows, dataset.train.labels)
    found = trained(fq.Part(name))
    assert found["test_accuracy"] >= fit.score(test, dataset.test.labels) - 2 / len(test)
    expected = metrics.f1_score(dataset.test.labels, fit.predict(test), average="macro")
    assert found["test_f1"] == pytest.approx(expected, abs=0.04)
    if dataset.classes == 2:
        area = metrics.roc_auc_score(dataset.test.labels, fit.predict_proba(test)[:, 1])
        assert found["test_auc"] == pytest.approx(area, abs=0.01)


def test_numbers_beside_least_squares():
    dataset = sources.build("diabetes")
    rows, test = central(dataset)
    predicted = linear_model.LinearRegression().fit(rows, dataset.train.labels).predict(test)
    found = trained(fq.diabetes())
    assert found["test_r2"] == pytest.approx(metrics.r2_score(dataset.test.labels, predicted), abs=0.03)
    error = metrics.mean_squared_error(dataset.test.labels, predicted)
    assert found["test_mse"] == pytest.approx(error, rel=0.05)


def test_several_labels_beside_a_regression_of_each():
    numbers = np.random.default_rng(0)
    rows = numbers.normal(size=(900, 2, 4)).astype(np.float32)
    weights = numbers.normal(size=(8, 3))
    labels = (rows.reshape(900, 8) @ weights + numbers.normal(size=(900, 3)) > 0).astype(int)
    given = fq.Arrays((rows[:700], labels[:700]), (rows[700:], labels[700:]))
    found = trained(given, partition=fq.dirichlet(clients=5, beta=1.0))
    flat = rows.reshape(900, 8)
    fits = [linear_model.LogisticRegression().fit(flat[:700], column) for column in labels[:700].T]
    predicted = np.stack([fit.predict(flat[700:]) for fit in fits], axis=1)
    assert found["test_accuracy"] == pytest.approx((predicted == labels[700:]).mean(), abs=0.02)
    assert found["test_f1"] == pytest.approx(metrics.f1_score(labels[700:], predicted, average="macro"), abs=0.02)
    shares = np.stack([fit.predict_proba(flat[700:])[:, 1] for fit in fits], axis=1)
    assert found["test_auc"] == pytest.approx(metrics.roc_auc_score(labels[700:], shares), abs=0.01)


def test_synthetic_clients_are_as_different_as_asked():
    """At α = β = 0 all classifiers have the same prior but are drawn for each client; at 5 the means lie far apart."""
    near, far = (sources.build("synthetic", alpha=value, beta=value, clients=12) for value in (0.0, 5.0))
    for dataset in (near, far):
        parts = partitions.build("natural", dataset, np.random.default_rng(0))
        assert len(parts) == 12 and min(map(len, parts)) >= 45  # 90 % of at least 50
        assert dataset.train.inputs.shape[1:] == (60,)

    def spread(dataset) -> float:
        means = [dataset.train.inputs[dataset.client_ids == client].mean() for client in range(12)]
        return float(np.std(means))

    assert spread(near) < 0.5 < 2 < spread(far)
    of_clients = [near.train.inputs[near.client_ids == client] for client in range(12)]
    variances = np.concatenate([rows - rows.mean(0) for rows in of_clients]).var(0)
    np.testing.assert_allclose(variances, np.arange(1, 61) ** -1.2, rtol=0.2)
    assert trained(fq.synthetic(clients=5), partition=fq.natural())["test_top5_accuracy"] > 0.9


def test_a_table_becomes_numbers(tmp_path):
    frame = datasets.load_wine(as_frame=True).frame
    frame["grower"] = frame.pop("target").map({0: "Anna", 1: "Bea", 2: "Carl"})
    frame["year"] = np.where(np.arange(len(frame)) % 2, "old", "young")
    frame["client"] = np.arange(len(frame)) % 7 + 100
    for name, options in (("csv", {}), ("parquet", {})):
        file = tmp_path / f"wine.{name}"
        frame.to_csv(file, index=False) if name == "csv" else frame.to_parquet(file)
        dataset = sources.build(name, path=str(file), label="grower", client="client", **options)
        assert dataset.class_names == ("Anna", "Bea", "Carl") and dataset.target == "classes"
        assert dataset.train.inputs.shape[1] == 13 + 2  # a column each for old and young
        assert len(dataset.train.labels) + len(dataset.test.labels) == 178
        counts = np.bincount(dataset.test.labels)
        assert abs(counts - 0.2 * np.array([59, 71, 48])).max() <= 0.5
        assert len(partitions.build("natural", dataset, np.random.default_rng(0))) == 7


def test_a_table_that_cannot_be_used_is_named(tmp_path):
    file = tmp_path / "a.csv"
    pd.DataFrame({"x": [1.0, None, 3.0], "y": [0, 1, 1]}).to_csv(file, index=False)
    for options, message in (
        ({"label": "z"}, "unknown column of .*a.csv 'z'.*Valid: x, y"),
        ({"label": "y", "test_share": 0.4}, r"a.csv has empty cells in x \(1\): fill them"),
        ({"label": ["x", "y"]}, "NaN|has empty cells|no columns"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            sources.build("csv", path=str(file), **options)
    with pytest.raises(ConfigurationError, match="none.csv cannot be read as a table"):
        sources.build("csv", path=str(tmp_path / "none.csv"), label="y")


def test_statistics_are_those_of_the_training_rows_alone():
    from fedjax_qp.tasks.rows import standardise

    rows = np.random.default_rng(0).normal(3, 2, (50, 2, 3))
    scale = standardise(rows)
    np.testing.assert_allclose(np.asarray(scale(np.asarray(rows, np.float32))).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(scale(np.asarray(rows, np.float32))).std(0), 1, atol=1e-5)
    assert not np.asarray(standardise(np.ones((5, 2)))(np.ones((1, 2), np.float32))).any()


def test_strata_let_partitions_deal_numbers_and_labels_out():
    rows = np.zeros((100, 2))
    numbers = in_strata(build_rows((rows, np.arange(100.0)), (rows, np.arange(100.0))))
    assert np.bincount(numbers.train.labels).tolist() == [10] * 10 and numbers.classes == 10
    labels = np.eye(3, dtype=int)[np.arange(100) % 3]
    labels[0] = 0
    found = in_strata(build_rows((rows, labels), (rows, labels)))
    assert found.classes == 4 and found.train.labels[:4].tolist() == [3, 1, 2, 0]
    train, test = split(np.arange(100) % 4, 0.2)
    assert np.bincount(test % 4).tolist() == [5] * 4 and len(np.union1d(train, test)) == 100


def test_settings_of_accuracies_are_refused_where_there_are_none():
    with pytest.raises(ConfigurationError, match="partition.test = 'own' deals test rows out by their classes"):
        trained(fq.diabetes(), partition=fq.iid(clients=5, test="own"))
    with pytest.raises(
        ConfigurationError, match="model = 'lenet' does not fit data = 'wine': it takes images, not rows"
    ):
        trained(fq.wine(), model=fq.lenet())
