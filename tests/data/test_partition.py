"""Laws of partitions, and FedMut's Dirichlet rule against a plain implementation of it."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.labelled import balanced, labelled

from fedjax_qp.data import (
    Instructions,
    Record,
    Records,
    check_partition,
    label_counts,
    partitions,
)
from fedjax_qp.data.partition import _draw_counts
from fedjax_qp.registry import ConfigurationError

OPTIONS = {
    "iid": {"clients": 30},
    "dirichlet": {"clients": 30, "beta": 0.3, "minimum": 5},
    "shards": {"clients": 30, "shards_per_client": 2},
    "categories": {"clients": 30, "categories_per_client": 3},
    "natural": {},
    "json_file": {},
}


@pytest.fixture
def any_case(request, tmp_path):
    """A data set that every partition can work on, and the options of the one asked for."""
    labels = balanced().train.labels
    dataset = labelled(labels, client_ids=np.random.default_rng(1).integers(100, 130, len(labels)))
    options = dict(OPTIONS[request.param])
    if request.param == "json_file":
        parts = np.array_split(np.random.default_rng(2).permutation(len(labels)), 30)
        path = tmp_path / "split.json"
        path.write_text(json.dumps({"train_data": {str(k): part.tolist() for k, part in enumerate(parts)}}))
        options["path"] = str(path)
    return dataset, request.param, options


def test_every_partition_is_under_test():
    assert sorted(OPTIONS) == partitions.names()


@pytest.mark.parametrize("any_case", OPTIONS, indirect=True)
def test_disjoint_complete_sorted_and_deterministic(any_case):
    dataset, name, options = any_case
    first, again, other = (partitions.build(name, dataset, np.random.default_rng(s), **options) for s in (7, 7, 8))
    assert len(first) == 30
    np.testing.assert_array_equal(np.sort(np.concatenate(first)), np.arange(4000))
    for part, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(part, same)
        assert part.dtype == np.int64 and (np.diff(part) > 0).all()
    drawn = any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))
    assert drawn == (name not in ("natural", "json_file"))


def test_iid_sizes_differ_by_one_and_labels_are_mixed():
    parts = partitions.build("iid", balanced(4003), np.random.default_rng(0), clients=20)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) == 1
    # 200 examples drawn without replacement: about 20 ± 4.2 of each of 10 classes.
    assert (label_counts(parts, balanced(4003).train.labels, 10) > 2).all()


# ---- Dirichlet ------------------------------------------------------------------------------------------------------


def plain_dirichlet(labels, classes, rng, clients, beta, minimum):
    """FedMut's rule example by example, consuming the same draws."""
    total = len(labels)
    while True:
        shares = [rng.dirichlet([beta] * clients) for _ in range(classes)]
        amounts = [[0] * clients for _ in range(classes)]
        void = False
        for label in range(classes):
            held = [sum(amounts[c][k] for c in range(label)) for k in range(clients)]
            share = [0.0 if held[k] >= total / clients else shares[label][k] for k in range(clients)]
            whole = 0.0
            for item in share:  # not sum(), which compensates rounding from Python 3.12 on
                whole += item
            if whole == 0:
                void = True
                break
            size = sum(1 for item in labels if item == label)
            reached, begin = 0.0, 0
            for k in range(clients):
                reached += share[k]
                end = int(reached / whole * size)
                amounts[label][k] = end - begin
                begin = end
        if not void and min(sum(amounts[c][k] for c in range(classes)) for k in range(clients)) >= minimum:
            break
    parts = [[] for _ in range(clients)]
    for label in range(classes):
        waiting = list(rng.permutation([i for i in range(total) if labels[i] == label]))
        for k in range(clients):
            parts[k] += waiting[: amounts[label][k]]
            waiting = waiting[amounts[label][k] :]
    return [sorted(part) for part in parts]


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_dirichlet_equals_the_plain_implementation(beta, seed):
    dataset = labelled(np.random.default_rng(seed).choice(6, 900, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]), 6)
    options = {"clients": 12, "beta": beta, "minimum": 4}
    ours = partitions.build("dirichlet", dataset, np.random.default_rng(seed), **options)
    plain = plain_dirichlet(dataset.train.labels.tolist(), 6, np.random.default_rng(seed), 12, beta, 4)
    assert [part.tolist() for part in ours] == plain


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    clients=st.integers(1, 20),
    classes=st.integers(1, 8),
    beta=st.floats(0.2, 50),
    minimum=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_dirichlet_laws(clients, classes, beta, minimum, seed):
    dataset = balanced(1000, classes, seed)
    options = {"clients": clients, "beta": beta, "minimum": minimum}
    parts = partitions.build("dirichlet", dataset, np.random.default_rng(seed), **options)
    assert min(len(part) for part in parts) >= minimum
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    # A client is full once it holds N / K, so before its last class it held less than that.
    counts = label_counts(parts, dataset.train.labels, classes)
    for row in counts:
        assert row[: np.flatnonzero(row)[-1]].sum() < 1000 / clients


def test_dirichlet_share_statistics():
    """With one class and no redraw, shares are Dirichlet: mean 1/K and variance (1/K)(1 − 1/K)/(Kβ + 1)."""
    clients, beta, repeats = 5, 0.7, 4000
    rng = np.random.default_rng(0)
    dataset = labelled(np.zeros(100_000), 1)
    shares = np.stack([_draw_counts(np.array([100_000]), rng, clients, beta)[0] for _ in range(repeats)]) / 100_000
    np.testing.assert_allclose(shares.mean(axis=0), 1 / clients, atol=0.02)
    np.testing.assert_allclose(shares.var(axis=0), 0.2 * 0.8 / (clients * beta + 1), rtol=0.1)
    assert len(partitions.build("dirichlet", dataset, rng, clients=clients, beta=beta)) == clients


def test_dirichlet_is_fast_at_the_paper_scale():
    """50,000 examples, 100 clients, beta 0.1, which needs redraws."""
    dataset = balanced(50_000)
    begin = time.perf_counter()
    parts = partitions.build("dirichlet", dataset, np.random.default_rng(0), clients=100, beta=0.1)
    assert time.perf_counter() - begin < 3
    assert min(len(part) for part in parts) >= 10


def test_dirichlet_gives_up_with_what_it_tried():
    begin = time.perf_counter()
    with pytest.raises(ConfigurationError, match=r"1000 draws of beta = 0.01 over 100 .*minimum = 10.*Lower"):
        partitions.build("dirichlet", balanced(2000), np.random.default_rng(0), beta=0.01)
    assert time.perf_counter() - begin < 10


def test_dirichlet_gives_up_at_once_where_no_draw_can_succeed():
    """However many draws are asked for: of 1000 clients, far more than 30 are without examples each time."""
    begin = time.perf_counter()
    options = {"clients": 1000, "beta": 0.01, "minimum": 1, "attempts": 10**4}
    with pytest.raises(ConfigurationError, match=r"in each of the 20 that were made, at least [67]\d\d of the clients"):
        partitions.build("dirichlet", balanced(2000), np.random.default_rng(0), **options)
    assert time.perf_counter() - begin < 3


def test_dirichlet_draws_no_longer_than_its_patience(monkeypatch):
    """One class falls on few of 20 clients, but those without are not many enough to give up at once."""
    monkeypatch.setattr("fedjax_qp.data.partition.PATIENCE", 0.2)
    begin = time.perf_counter()
    options = {"clients": 20, "beta": 1e-3, "minimum": 1, "attempts": 10**4}
    with pytest.raises(ConfigurationError, match=r"10000 draws .* in each of the \d+ that were made, at least 1\d of"):
        partitions.build("dirichlet", balanced(2000, 1), np.random.default_rng(0), **options)
    assert time.perf_counter() - begin < 3


@pytest.mark.parametrize("beta", [1.2e-38, 1e-4, 1e6, 3.4e38])
def test_dirichlet_extremes_stay_finite(beta):
    dataset = balanced(2000)
    parts = partitions.build("dirichlet", dataset, np.random.default_rng(0), clients=2, beta=beta, minimum=1)
    assert sum(len(part) for part in parts) == 2000


@pytest.mark.parametrize("labels", [[3], [0] * 50, [9] * 49 + [0], list(range(10))])
@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "categories"])
@pytest.mark.parametrize("clients", [1, 2, 7, 50])
def test_degenerate_data_is_dealt_out_whole_or_refused(labels, name, clients):
    options = {
        "dirichlet": {"minimum": 1},
        "shards": {"shards_per_client": 1},
        "categories": {"categories_per_client": 1},
    }
    try:
        given = {"clients": clients, **options.get(name, {})}
        parts = partitions.build(name, labelled(labels), np.random.default_rng(0), **given)
    except ConfigurationError as error:
        assert clients > 1 and "\n" not in str(error)
        return
    assert len(parts) == clients and all(len(part) for part in parts)
    uses = np.bincount(np.concatenate(parts), minlength=len(labels))
    # With fewer clients than categories some categories have no owner, as the docstring says.
    assert uses.max() == 1 and (uses.min() == 1 or (name == "categories" and clients < len(set(labels))))


def test_many_clients_are_dealt_out_quickly():
    begin = time.perf_counter()
    dataset = balanced(20_000)
    for name, options in (
        ("iid", {}),
        ("shards", {"shards_per_client": 1}),
        ("categories", {"categories_per_client": 1}),
    ):
        assert len(partitions.build(name, dataset, np.random.default_rng(0), clients=20_000, **options)) == 20_000
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iid", {"clients": 0}, "clients = 0 must be between 1 and 4000"),
        ("iid", {"clients": 4001}, "clients = 4001"),
        ("dirichlet", {"beta": 0.0}, "beta = 0.0 must be above 0"),
        ("dirichlet", {"beta": -1}, "beta = -1"),
        ("dirichlet", {"beta": float("nan")}, "beta = nan"),
        ("dirichlet", {"beta": float("inf")}, "beta = inf"),
        ("dirichlet", {"beta": 1.7e308}, "beta = 1.7e\\+308 must be .* as far as float32 reaches"),
        ("dirichlet", {"minimum": 10**30}, "minimum = 10+ must be less than"),
        ("iid", {"clients": 10**30}, "clients = 10+ must be less than"),
        ("dirichlet", {"minimum": 41}, "minimum = 41 must be between 1 and 40"),
        ("dirichlet", {"minimum": 0}, "minimum = 0"),
        ("dirichlet", {"attempts": 0}, "attempts = 0"),
        ("dirichlet", {"clients": -3}, "clients = -3"),
        ("shards", {"shards_per_client": 0}, "shards_per_client = 0"),
        ("shards", {"shards_per_client": 41}, "between 1 and 40"),
        ("categories", {"clients": 0}, "clients = 0 must be between 1 and 4000"),
        ("categories", {"categories_per_client": 0}, "categories_per_client = 0 must be between 1 and 10"),
        ("categories", {"categories_per_client": 11}, "categories_per_client = 11 must be between 1 and 10"),
        ("categories", {"clients": 4000}, r"category \d has 400 examples for 800 clients. Take fewer"),
        ("natural", {}, "needs a data source that knows its clients"),
        ("dirichlett", {}, "did you mean dirichlet"),
        ("dirichlet", {"betta": 1}, "did you mean beta"),
    ],
)
def test_impossible_options_are_explained(name, options, message):
    with pytest.raises(ConfigurationError, match=message):
        partitions.build(name, balanced(), np.random.default_rng(0), **options)


# ---- shards and natural clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards_per_client", [1, 2, 3])
def test_shards_limit_the_classes(shards_per_client):
    dataset = balanced(6000)
    options = {"clients": 100, "shards_per_client": shards_per_client}
    parts = partitions.build("shards", dataset, np.random.default_rng(0), **options)
    # 6000 / (100 s) divides the 600 examples of a class: no shard spans two.
    counts = label_counts(parts, dataset.train.labels, 10)
    assert ((counts > 0).sum(axis=1) <= shards_per_client).all()
    assert (counts.sum(axis=1) == 60).all()


def test_shards_across_class_boundaries():
    dataset = balanced(1000)
    parts = partitions.build("shards", dataset, np.random.default_rng(0), clients=7, shards_per_client=2)
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 2
    assert ((label_counts(parts, dataset.train.labels, 10) > 0).sum(axis=1) <= 4).all()


def test_natural_groups_by_id_and_leaves_out_small_clients():
    dataset = labelled([0, 1, 0, 1, 2, 2], 3, client_ids=np.array([30, 10, 30, 10, 20, 30]))
    rng = np.random.default_rng(0)
    assert [part.tolist() for part in partitions.build("natural", dataset, rng)] == [[1, 3], [4], [0, 2, 5]]
    assert [part.tolist() for part in partitions.build("natural", dataset, rng, minimum=2)] == [[1, 3], [0, 2, 5]]
    with pytest.raises(ConfigurationError, match="minimum = 4 leaves out all 3 clients; the largest has 3"):
        partitions.build("natural", dataset, rng, minimum=4)


# ---- whole categories -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), classes=st.integers(1, 8), clients=st.integers(1, 15), seed=st.integers(0, 2**32 - 1))
def test_categories_laws(data, classes, clients, seed):
    each = data.draw(st.integers(1, classes))
    sizes = data.draw(st.lists(st.integers(clients, 60), min_size=classes, max_size=classes))
    # Labels 2 c: the odd classes have no examples, and nobody can be given one of them.
    labels = np.random.default_rng(seed).permutation(np.repeat(2 * np.arange(classes), sizes))
    dataset = labelled(labels, 2 * classes)
    options = {"clients": clients, "categories_per_client": each}
    parts = partitions.build("categories", dataset, np.random.default_rng(seed), **options)
    counts = label_counts(parts, labels, 2 * classes)[:, ::2]
    held = counts > 0
    assert held.shape == (clients, classes) and (held.sum(axis=1) == each).all()
    owners = held.sum(axis=0)
    assert owners.max() - owners.min() <= 1
    for size, count, column in zip(sizes, owners, counts.T, strict=True):
        shares = column[column > 0]
        # Every owner has an even share, and without an owner the examples are left out.
        assert count == 0 or (shares.sum() == size and shares.max() - shares.min() <= 1)
    if clients * each >= classes:
        assert owners.min() >= 1 and sum(map(len, parts)) == len(labels)


def test_categories_are_drawn_at_random():
    dataset = balanced(800, 8)

    def groups(seed):
        options = {"clients": 8, "categories_per_client": 2}
        parts = partitions.build("categories", dataset, np.random.default_rng(seed), **options)
        return tuple(tuple(np.unique(dataset.train.labels[part])) for part in parts)

    drawn = [groups(seed) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert len({group for draw in drawn for group in draw}) > 20  # of 28 pairs


def test_partitions_of_instructions():
    records = Records(tuple(Record("x", "", "y", "abc"[k % 3]) for k in range(60)), np.arange(60, dtype=np.int32) % 3)
    dataset = Instructions(records, records, 3, ("a", "b", "c"), np.arange(60) // 12)
    options = {"iid": {}, "dirichlet": {"minimum": 2}, "shards": {}, "categories": {}}
    for name, chosen in options.items():
        parts = partitions.build(name, dataset, np.random.default_rng(0), clients=5, **chosen)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(60))
    natural = partitions.build("natural", dataset, np.random.default_rng(0))
    assert [part.tolist() for part in natural] == np.arange(60).reshape(5, 12).tolist()


def test_check_partition_accepts_what_fits():
    dataset = balanced(10)
    parts = [np.array([0, 3]), np.array([9])]
    assert check_partition(parts, dataset) is parts
    assert check_partition([np.array([3, 0]), np.array([9, 1], np.uint8)], dataset)  # not sorted is no fault
    unusable = ([3, -1, 2], [3, 10, 2], np.arange(10) == 3, [0.5, 1.0], [0, np.nan], list("ab"), [[1, 2]], 3)
    for bad in (
        [],
        [[0]],
        [np.array([], np.int64)],
        [np.array([1]), np.array([1])],
        *([np.array(b)] for b in unusable),
    ):
        with pytest.raises(ConfigurationError):
            check_partition(bad, dataset)
