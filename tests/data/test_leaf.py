"""LEAF's JSON files, written here as its preprocessing writes them."""

import json

import numpy as np
import pytest

from fedjax_qp.data import partitions, sources
from fedjax_qp.data.text.characters import CHARACTERS, UNKNOWN
from fedjax_qp.registry import ConfigurationError

TEXT = "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder, part, number, data):
    """One file of LEAF: data maps a user to (x, y)."""
    (folder / part).mkdir(exist_ok=True)
    content = {
        "users": list(data),
        "num_samples": [len(y) for _, y in data.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in data.items()},
    }
    file = folder / part / f"all_data_{number}_niid_0_keep_0_{part}_9.json"
    file.write_text(json.dumps(content))
    return file


def images(seed, labels):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 28, 28))
    return pixels, ((pixels / 255).reshape(-1, 784).tolist(), list(labels))


def windows(starts):
    return [TEXT[k : k + 80] for k in starts], [TEXT[k + 80] for k in starts]


def test_femnist_by_writer(tmp_path, cache_folder):
    (first, of_first), (second, of_second), (third, of_third) = (
        images(seed, labels) for seed, labels in enumerate(([3, 61, 0], [35], [9, 10]))
    )
    write(tmp_path, "train", 0, {"f0003_42": of_first, "f0000_14": of_second})
    write(tmp_path, "train", 1, {"f0001_41": of_third, "empty": ([], [])})
    write(tmp_path, "test", 0, {"f0000_14": of_second})
    dataset = sources.build("femnist", folder=str(tmp_path))
    np.testing.assert_array_equal(dataset.train.inputs[..., 0], np.concatenate([first, second, third]))
    assert dataset.train.labels.tolist() == [3, 61, 0, 35, 9, 10] and dataset.train.inputs.dtype == np.uint8
    np.testing.assert_array_equal(dataset.test.inputs[..., 0], second)
    assert dataset.classes == 62 and [dataset.class_names[k] for k in (9, 10, 35, 36, 61)] == ["9", "A", "Z", "a", "z"]
    parts = partitions.build("natural", dataset, np.random.default_rng(0))
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3], [4, 5]]
    assert dataset.notes[0] == "3 writers with 6 images to train on, 1 to test on"
    assert dataset.notes[1].startswith("56 of 62 classes have no training examples: 1, 2, 4, 5, 6, …")
    again = sources.build("femnist", folder=str(tmp_path))  # out of the cache
    assert len(list(cache_folder.iterdir())) == 1
    for one, other in zip((*dataset.train, *dataset.test), (*again.train, *again.test), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def test_shakespeare_by_role(tmp_path):
    write(tmp_path, "train", 0, {"HAMLET_HAMLET": windows([0, 1, 2]), "LEAR_FOOL": windows([5])})
    x, y = windows([9])
    write(tmp_path, "test", 0, {"LEAR_FOOL": ([x[0][:-1] + "é"], y)})
    dataset = sources.build("shakespeare_leaf", folder=str(tmp_path))
    read = ["".join(CHARACTERS[code] for code in row) for row in dataset.train.inputs]
    assert read == [TEXT[k : k + 80] for k in (0, 1, 2, 5)] and dataset.train.inputs.dtype == np.uint8
    assert "".join(CHARACTERS[label] for label in dataset.train.labels) == TEXT[80:83] + TEXT[85]
    assert dataset.client_ids.tolist() == [0, 0, 0, 1] and dataset.test.inputs[0, -1] == UNKNOWN
    assert (
        dataset.notes[0] == "2 roles with 4 windows to train on, 1 to test on" and "1 of 405 char" in dataset.notes[1]
    )


def test_changed_files_are_read_again(tmp_path):
    write(tmp_path, "test", 0, {"a": windows([0])})
    for starts in ([0], [3, 4]):
        write(tmp_path, "train", 0, {"a": windows(starts)})
        assert len(sources.build("shakespeare_leaf", folder=str(tmp_path)).train.labels) == len(starts)


X, Y = windows([0, 1])
PIXELS = [[0.5] * 784] * 2


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        ("shakespeare_leaf", {"ANN": ([X[0], X[1][:-1]], Y)}, r"user 'ANN': x\[1\] = .* a string of 80 characters"),
        ("shakespeare_leaf", {"ANN": (X, ["a", "bc"])}, r"user 'ANN': y\[1\] = 'bc' must be a string of 1 character\."),
        ("shakespeare_leaf", {"ANN": (X, Y[:1])}, "user 'ANN': num_samples is 1, but x has 2 entries and y 1"),
        ("shakespeare_leaf", {"ANN": ([], [])}, "train hold no examples"),
        ("femnist", {"w1": ([PIXELS[0], PIXELS[1][:-1]], [0, 1])}, r"'w1': x\[1\] has 783 values; .*28×28 = 784"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], 2]], [0])}, r"'w1': x holds \[2\.\]; values must be between 0 and 1"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], "a"]], [0])}, "'w1': x must hold numbers"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], 10**400]], [0])}, "'w1': x must hold numbers, nothing else"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], 10**39]], [0])}, "'w1': x "),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], 1e39]], [0])}, r"'w1': x holds \[1.e\+39\]"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], "0.5"]], [0])}, "'w1': x must hold numbers"),
        ("femnist", {"w1": ([["0.5"] * 784], [0])}, "'w1': x must hold numbers"),
        ("femnist", {"w1": ([[True] * 784], [0])}, "'w1': x must hold numbers"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], None]], [0])}, "'w1': x must hold numbers"),
        ("femnist", {"w1": ([[*PIXELS[0][:-1], [0.5]]], [0])}, "'w1': x must hold numbers"),
        (
            "femnist",
            {"w1": ([[[0.5, 0.5]] * 784], [0])},
            "'w1': x must hold numbers",
        ),  # two images of one label, flattened
        ("femnist", {"w1": (PIXELS, [0, 10**30])}, r"'w1': y\[1\] = 1000000000000000000000000000000; labels"),
        ("femnist", {"w1": (PIXELS, [0, -1])}, r"'w1': y\[1\] = -1; labels"),
        ("femnist", {"w1": (PIXELS, [0, True])}, r"'w1': y\[1\] = True; labels"),
        ("femnist", {"w1": (PIXELS, [0, "x" * 10**4])}, r"'w1': y\[1\] = 'xxxx.*\.\.\..*'; labels"),
        ("femnist", {"w1": (PIXELS, [0, 62])}, r"'w1': y\[1\] = 62; labels are whole numbers from 0 to 61"),
        ("femnist", {"w1": (PIXELS, [0, 1.0])}, r"'w1': y\[1\] = 1.0"),
    ],
)
def test_bad_examples_are_named_by_file_and_user(tmp_path, source, data, message):
    file = write(tmp_path, "train", 3, data)
    write(tmp_path, "test", 0, {})
    with pytest.raises(ConfigurationError, match=message) as error:
        sources.build(source, folder=str(tmp_path))
    assert file.name in str(error.value) or "hold no examples" in message
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_bad_files(tmp_path):
    def refused(message):
        with pytest.raises(ConfigurationError, match=message):
            sources.build("shakespeare_leaf", folder=str(tmp_path))

    refused(r"no JSON files in .*train; folder = .* LEAF's folders train and test")
    file = write(tmp_path, "train", 0, {"ANN": windows([0])})
    refused("no JSON files in .*test")
    write(tmp_path, "test", 0, {"ANN": windows([0])})
    write(tmp_path, "train", 1, {"ANN": windows([4])})
    refused("the user 'ANN' is listed twice")
    (tmp_path / "train" / file.name.replace("_0_", "_1_", 1)).unlink()
    content = json.loads(file.read_text())
    for broken, message in (
        ('{"users": [', "line 1 is not valid JSON"),
        (json.dumps(content).replace("{", '{"users": [], ', 1), "has the key 'users' twice"),
        (json.dumps(content)[:-2] + ', "ANN": {"x": [], "y": []}}}', "has the key 'ANN' twice"),
        ('{"users": ' + "[" * 100_000, "nested too deeply"),
        (json.dumps(content).replace("[1]", "[NaN]"), "not valid JSON"),
        ("\udcff", "not a UTF-8 text file"),
        (json.dumps({**content, "num_samples": [2]}), "user 'ANN': num_samples is 2, but x has 1 entries and y 1"),
        (json.dumps({**content, "users": []}), "must be lists of one length"),
        (json.dumps({**content, "users": [], "num_samples": []}), "1 users whom the list users lacks, such as 'ANN'"),
        (json.dumps({**content, "hierarchies": ["a", "b"]}), "hierarchies, where it is given, .* as long as users .1."),
        (json.dumps({**content, "hierarchies": 5}), "hierarchies, where it is given"),
        ("[]", "holds list; LEAF's files have the keys users"),
        (json.dumps({**content, "user_data": {}}), "user 'ANN': user_data holds NoneType; it needs the lists x and y"),
        (json.dumps({**content, "user_data": {"ANN": {"x": []}}}), r"user 'ANN': user_data holds \['x'\]"),
        (json.dumps({**content, "num_samples": []}), "users .* and num_samples must be lists of one length"),
        (json.dumps({**content, "users": [["ANN"]]}), r"users \(strings\)"),
        (json.dumps({"users": [], "user_data": {}}), r"holds \['users', 'user_data'\]; LEAF's"),
    ):
        file.write_text(broken, errors="surrogateescape")
        refused(message)
    for accepted in ({"hierarchies": ["PLAY"]}, {"hierarchies": []}, {"hierarchies": None}, {"other": 1}):
        file.write_text("\ufeff" + json.dumps({**content, **accepted}))
        assert len(sources.build("shakespeare_leaf", folder=str(tmp_path)).train.labels) == 1
    (tmp_path / "train" / "gone.json").symlink_to("nowhere")
    refused("gone.json cannot be read")
    for folder in ("~nosuchuser/x", "a" * 300):
        with pytest.raises(ConfigurationError, match="no JSON files"):
            sources.build("shakespeare_leaf", folder=folder)
