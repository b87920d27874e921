"""Partitions from split files, FedMut's published ones among them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.labelled import balanced, labelled

from fedjax_qp.data import label_counts, partitions, sources, summary
from fedjax_qp.registry import ConfigurationError

SHARED = Path(__file__).resolve().parents[3] / "shared"
SPLITS = SHARED / "splits" / "fedmut"


def from_json(tmp_path, content, examples=6, **options):
    path = tmp_path / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    dataset = labelled(np.arange(examples) % 2, 2)
    return partitions.build("json_file", dataset, np.random.default_rng(0), path=str(path), **options)


def test_json_file_orders_clients_by_number(tmp_path):
    lists = {str(k): [k] for k in reversed(range(11))} | {"2": [11, 2]}
    parts = from_json(tmp_path, {"num_users": 11, "train_data": lists}, 12)
    assert [part.tolist() for part in parts] == [[0], [1], [2, 11], *([k] for k in range(3, 11))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "line 1 is not valid JSON"),
        ([1, 2], "needs an entry `train_data`"),
        ({"train_data": {"a": [0]}}, "needs an entry `train_data`"),
        ({"train_data": {}}, "needs an entry `train_data`"),
        ({"train_data": {"0": [0, 1, 2], "1": [3, 4, 6]}}, r"does not fit the data.*client 1 has the index 6.*size 6"),
        ({"train_data": {"0": [0, 1, -1], "1": [3, 4, 5]}}, r"does not fit the data.*client 0 has the index -1"),
        ({"train_data": {"0": [0, 1, 2], "1": [2, 3, 4, 5]}}, "example 2 is used 2 times"),
        ({"train_data": {"0": [0, 1], "1": [3, 4, 5]}}, "1 of 6 training examples belong to no client, the first is 2"),
        ({"train_data": {"0": [0, 1, 2, 3, 4, 5], "1": []}}, "client 1 has no examples"),
        ({"train_data": {"0": [0, 1.5]}}, "client 0 .* whole numbers"),
        ({"train_data": {"0": [0, True]}}, "client 0 .* whole numbers"),
        ({"train_data": {"0": [0, 1, 2, 3, 4, 10**30]}}, "client 0 has the index 1000000000000000000000000000000, but"),
        ({"train_data": {"0": [0, 1, 2, 3, 4, -(2**63) - 1]}}, "client 0 has the index -9223372036854775809"),
        ({"train_data": {"0": [0, 1, 2, 3, 4, 2**32]}}, "client 0 has the index 4294967296"),
        ({"train_data": {"0": [0, 1, 2, 3, 4, 5, 5]}}, "example 5 is used 2 times"),
        ({"train_data": {"0": [0, "1"]}}, "client 0 .* whole numbers"),
        ({"train_data": {"0": [[0], [1]]}}, "client 0 .* whole numbers"),
        ({"train_data": {"0": None}}, "client 0 .* whole numbers"),
        ({"train_data": [[0, 1, 2], [3, 4, 5]]}, "needs an entry `train_data`"),
        ({"train_data": {"00": [0, 1, 2, 3, 4, 5]}}, "without a gap"),
        ({"train_data": {"9" * 5000: [0, 1, 2, 3, 4, 5]}}, "without a gap"),
        ({"num_users": True, "train_data": {"0": [0, 1, 2, 3, 4, 5]}}, "states True clients but lists 1"),
        (
            {"num_users": [1] * 10**4, "train_data": {"0": [0, 1, 2, 3, 4, 5]}},
            r"states \[1, 1, 1.* clients but lists 1",
        ),
        ('{"train_data": {"0": [0, 1, 2], "1": [3, 4, 5], "1": [3]}}', "has the key '1' twice"),
        ('{"train_data": {"0": [0, 1, 2, 3, 4, NaN]}}', "not valid JSON"),
        ('{"train_data": ' + "[" * 100_000, "nested too deeply"),
        ({"train_data": {"0": [0, 1], "2": [2, 3, 4, 5]}}, "without a gap"),
        ({"num_users": 3, "train_data": {"0": [0, 1], "1": [2, 3, 4, 5]}}, "states 3 clients but lists 2"),
    ],
)
def test_json_file_that_does_not_fit(tmp_path, content, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        from_json(tmp_path, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_json_file_with_a_byte_order_mark(tmp_path):
    parts = from_json(tmp_path, '\ufeff{"train_data": {"1": [3, 4, 5], "0": [0, 2, 1]}}')
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]


def test_json_file_may_leave_examples_out_on_purpose(tmp_path):
    content = {"train_data": {"0": [0, 1], "1": [3]}}
    assert [part.tolist() for part in from_json(tmp_path, content, complete=False)] == [[0, 1], [3]]
    with pytest.raises(ConfigurationError, match="complete = false"):
        from_json(tmp_path, content)


def test_missing_json_file():
    with pytest.raises(ConfigurationError, match="cannot be read"):
        partitions.build("json_file", balanced(), np.random.default_rng(0), path="nowhere.json")


# Mean number of classes a client, measured once in the published files against CIFAR-10's training labels in original
# order. Against any other order every client of several hundred examples would have nearly all 10 classes.
@pytest.mark.parametrize(
    ("name", "classes_per_client"),
    [("noniidCase5_beta0.1", 4.17), ("noniidCase5_beta0.5", 8.21), ("noniidCase5_beta1.0", 9.0), ("iid", 10.0)],
)
def test_published_splits_of_fedmut(name, classes_per_client):
    folder = os.environ.get("TFDS_DATA_DIR") or str(SHARED / "tfds")
    if not (Path(folder) / "cifar10").is_dir() or not SPLITS.is_dir():
        pytest.skip("needs CIFAR-10, prepared by tensorflow-datasets, and FedMut's published splits")
    dataset = sources.build("cifar10", folder=folder)
    labels = np.asarray(dataset.train.labels)
    path = str(SPLITS / f"cifar10_100_{name}.json")
    parts = partitions.build("json_file", dataset, np.random.default_rng(0), path=path)
    assert len(parts) == 100 and sum(len(part) for part in parts) == 50_000
    counts = label_counts(parts, labels, 10)
    assert (counts > 0).sum(axis=1).mean() == pytest.approx(classes_per_client, abs=0.005)
    if name == "iid":
        return
    # The published files follow the rule that `dirichlet` implements: same evenness, up to the luck of the draw.
    beta = float(name.rpartition("beta")[2])
    drawn = partitions.build("dirichlet", dataset, np.random.default_rng(0), beta=beta)
    theirs, ours = summary(counts), summary(label_counts(drawn, labels, 10))
    assert ours.total_variation == pytest.approx(theirs.total_variation, abs=0.05)
    assert ours.effective_classes == pytest.approx(theirs.effective_classes, rel=0.12)
    if beta == 0.1:
        shuffled = label_counts(parts, np.random.default_rng(0).permutation(labels), 10)
        assert (shuffled > 0).sum(axis=1).mean() > 9
