"""Sources of instruction data: records of one's own in both formats, and the demo records that pip fetches."""

import hashlib
import importlib
import json
import subprocess
import tarfile

import numpy as np
import pytest

from fedjax_qp.data import partitions, sources
from fedjax_qp.data.text import package as packages
from fedjax_qp.registry import ConfigurationError

module = importlib.import_module("fedjax_qp.data.text.instructions")

ALPACA = {"instruction": "Write a poem.", "input": "", "output": "Roses are red."}
DOLLY = {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "closed_qa"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def lines(records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


def load(*files, **options):
    return sources.build("records", files=[str(file) for file in files], **options)


def test_names():
    assert sources.names(["instructions"]) == ["alpaca_demo", "records"]


@pytest.mark.parametrize("form", [json.dumps, lines, lambda records: json.dumps(records, indent=2)])
def test_both_formats_mixed_in_a_list_or_in_lines(tmp_path, form):
    mixed = {"instruction": "Sum up.", "input": "A text.", "response": "Text."}
    dataset = load(write(tmp_path / "a.json", form([ALPACA, DOLLY, mixed])))
    assert [record[:4] for record in dataset.train.records] == [
        ("Write a poem.", "", "Roses are red.", "write"),
        ("Who?", "Ann did.", "Ann", "closed_qa"),
        ("Sum up.", "A text.", "Text.", "sum"),
    ]
    assert dataset.class_names == ("closed_qa", "sum", "write") and dataset.classes == 3
    assert dataset.train.labels.dtype == np.int32 and dataset.train.labels.tolist() == [2, 0, 1]
    assert dataset.client_ids is not None and dataset.client_ids.tolist() == [0, 0, 0]
    assert dataset.test.records == () and len(dataset.test.labels) == 0


def test_a_file_is_a_client_and_numbers_in_names_are_numbers(tmp_path):
    for number in (10, 2, 1):
        items = [{**ALPACA, "output": f"{number}-{k}"} for k in range(number)]
        write(
            tmp_path / f"local_{number}.{'jsonl' if number == 2 else 'json'}", (json.dumps, lines)[number == 2](items)
        )
    test_file = write(tmp_path / "global_test.json", [DOLLY])
    write(tmp_path / "notes.txt", "no records")
    options = {"test_file": test_file}
    folder = load(tmp_path, **options)
    assert [len(part) for part in partitions.build("natural", folder, np.random.default_rng(0))] == [1, 2, 10]
    assert [record.response for record in folder.train.records][:4] == ["1-0", "2-0", "2-1", "10-0"]
    assert [record.response for record in folder.test.records] == ["Ann"]
    assert folder.class_names[folder.test.labels[0]] == "closed_qa"
    pattern = sources.build("records", files=f"{tmp_path}/local_*.json*", **options)
    assert pattern.train.records == folder.train.records
    # Files that are named one by one stay in the order given.
    named = load(tmp_path / "local_10.json", tmp_path / "local_1.json")
    assert named.client_ids is not None and np.bincount(named.client_ids).tolist() == [10, 1]
    limited = load(tmp_path, **options, limit=2)
    assert np.bincount(limited.client_ids).tolist() == [1, 2, 2]


def test_rare_first_words_are_other(tmp_path):
    words = ["write"] * 150 + ["Explain"] * 47 + ["solve", "solve", "rare", "…"]
    items = [{**ALPACA, "instruction": f"{word}: this"} for word in words]
    test_file = write(tmp_path / "test.json", [ALPACA, {**ALPACA, "instruction": "Unseen word"}])
    # 201 records: a word needs 2.01 of them, so that two are too few. Records with a category do not count.
    dataset = load(write(tmp_path / "a.json", items + [DOLLY] * 300), test_file=test_file)
    counts = dict(zip(dataset.class_names, np.bincount(dataset.train.labels), strict=True))
    assert counts == {"write": 150, "explain": 47, "other": 4, "closed_qa": 300}
    assert [record.category for record in dataset.test.records] == ["write", "other"]


# ---- What is wrong with a file, and where ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lines([ALPACA, {"instruction": "x", "input": ""}]),
            r"line 2, record 2: response or output is missing; it has the",
        ),
        (
            json.dumps([DOLLY, {"text": "x"}], indent=1),
            r"line 8, record 2: response or output is missing.*'text'.*needed",
        ),
        ([{"output": "x"}], r"line 1, record 1: instruction is missing.*keys 'output'"),
        (lines([{**DOLLY, "response": " \n"}]), "line 1, record 1: the response is empty"),
        (lines([{**DOLLY, "response": None}]), "response = None must be a string"),
        (lines([{**DOLLY, "context": 3}]), "context = 3 must be a string"),
        (lines([{**DOLLY, "category": ["a"]}]), "must be a string"),
        (lines([{**DOLLY, "input": "x"}]), "context and input mean the same"),
        (lines([{**ALPACA, "response": "x"}]), "response and output mean the same"),
        ("[1]", "record 1: this is int, not an object"),
        ("", "holds no records"),
        (" [ ] ", "holds no records"),
        ("{", "line 1: not valid JSON"),
        (lines([ALPACA]) + "\nnonsense", "line 3: not valid JSON"),
        (json.dumps([ALPACA])[:-1], "the list ends amiss"),
        (json.dumps([ALPACA]) + "{}", "the list ends amiss"),
        (f"[{json.dumps(ALPACA)},,{json.dumps(DOLLY)}]", "line 1: not valid JSON"),
        (f"[{json.dumps(ALPACA)}\n{json.dumps(DOLLY)}]", "one comma stands between two records.* begins on line 1"),
        (f"[\n{json.dumps(ALPACA)},\n]", "one comma stands between two records.* begins on line 2"),
        (f"[,{json.dumps(ALPACA)}]", "line 1: not valid JSON"),
        (json.dumps([ALPACA])[:-9], "line 1: not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_files_are_explained(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ConfigurationError, match=message) as error:
        load(path)
    assert path in str(error.value)


def test_bad_options_are_explained(tmp_path):
    path = write(tmp_path / "a.json", [ALPACA])
    with pytest.raises(ConfigurationError, match="nowhere.* is no file, no folder"):
        load("nowhere/*.json")
    with pytest.raises(ConfigurationError, match="files is empty"):
        load()
    with pytest.raises(ConfigurationError, match="given 2 times"):
        load(path, tmp_path)
    with pytest.raises(ConfigurationError, match="given 2 times"):
        load(path, test_file=path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(path, test_file=str(tmp_path / "none.json"))
    with pytest.raises(ConfigurationError, match="limit = 0"):
        load(path, limit=0)
    with pytest.raises(ConfigurationError, match="did you mean files"):
        sources.build("records", file=path)
    (tmp_path / "latin.json").write_bytes(b'[{"instruction": "\xe9"}]')
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load(tmp_path / "latin.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ALPACA]), encoding="utf-8-sig")
    assert load(tmp_path / "a.json").train.records[0].response == "Roses are red."


# ---- The demo records -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch, cache_folder):
    """A source distribution of the demo package's layout, in a folder that pip takes packages from, without an index.

    Its build back end is a module of its own, so that pip needs nothing else.
    """
    content = json.dumps([{**ALPACA, "instruction": f"Word{k % 2} x"} for k in range(6)]).encode()
    root = tmp_path / "source" / "llamafactory-0.9.5"
    (root / "data").mkdir(parents=True)
    (root / "data" / "alpaca_en_demo.json").write_bytes(content)
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    metadata = "Metadata-Version: 2.1\nName: llamafactory\nVersion: 0.9.5\n"
    (root / "PKG-INFO").write_text(metadata)
    (root / "backend.py").write_text(
        "import pathlib\n"
        "def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "    info = pathlib.Path(folder) / 'llamafactory-0.9.5.dist-info'\n"
        "    info.mkdir()\n"
        f"    (info / 'METADATA').write_text({metadata!r})\n"
        "    (info / 'WHEEL').write_text('Wheel-Version: 1.0')\n"
        "    return info.name\n"
        "def build_wheel(folder, settings=None, metadata=None):\n"
        "    raise NotImplementedError\n"
    )
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with tarfile.open(wheels / "llamafactory-0.9.5.tar.gz", "w:gz") as archive:
        archive.add(root, arcname=root.name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(module, "DEMO_SHA256", hashlib.sha256(content).hexdigest())
    return wheels


def test_demo_is_fetched_once_with_the_users_pip_settings(package, cache_folder):
    first = sources.build("alpaca_demo")
    assert [record.response for record in first.train.records] == ["Roses are red."] * 6
    assert first.class_names == ("word0", "word1") and first.client_ids is None and first.test.records == ()
    assert len(list(cache_folder.iterdir())) == 1
    (package / "llamafactory-0.9.5.tar.gz").unlink()
    assert sources.build("alpaca_demo").train.records == first.train.records


def test_demo_of_other_content_is_refused(package, monkeypatch, cache_folder):
    monkeypatch.setattr(module, "DEMO_SHA256", "0" * 64)
    with pytest.raises(ConfigurationError, match="not the file that was checked"):
        sources.build("alpaca_demo")
    assert not cache_folder.exists()


def test_demo_without_the_package_says_what_pip_said(package):
    (package / "llamafactory-0.9.5.tar.gz").unlink()
    with pytest.raises(ConfigurationError, match=r"option `folder`.*'records'.*\n(.*\n)*.*No matching distribution"):
        sources.build("alpaca_demo")


def test_demo_when_pip_hangs(monkeypatch, cache_folder):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(packages.subprocess, "run", hangs)
    with pytest.raises(ConfigurationError, match="pip did not finish"):
        sources.build("alpaca_demo")


def test_demo_out_of_a_folder(tmp_path):
    write(tmp_path / "alpaca_en_demo.json", [ALPACA])
    assert sources.build("alpaca_demo", folder=str(tmp_path)).train.records[0].category == "write"
    with pytest.raises(ConfigurationError, match=r"alpaca_en_demo.json cannot be read"):
        sources.build("alpaca_demo", folder=str(tmp_path / "none"))


def test_archives_that_do_not_fit(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigurationError, match="cannot be read as an archive"):
        packages.read_members(tmp_path / "a.tar.gz", ["data/x"])
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    with pytest.raises(ConfigurationError, match="holds no file data/x"):
        packages.read_members(tmp_path / "b.tar.gz", ["data/x"])


# ---- Dolly, and the partitions on it --------------------------------------------------------------------------------


def test_dolly(shared_folder):
    folder = shared_folder / "dolly"
    dataset = load(folder, test_file=str(folder / "global_test.json"))
    assert len(dataset.train.records) == 14_931 and len(dataset.test.records) == 80
    assert dataset.classes == 8 and np.bincount(dataset.test.labels).tolist() == [10] * 8
    rng = np.random.default_rng(0)
    natural = partitions.build("natural", dataset, rng)
    assert len(natural) == 10
    kinds = [len(np.unique(dataset.train.labels[part])) for part in natural]
    assert set(kinds) == {2, 3}
    options = {"iid": {"clients": 10}, "dirichlet": {"clients": 10}, "shards": {"clients": 10}, "categories": {}}
    for name, chosen in options.items():
        assert sum(len(part) for part in partitions.build(name, dataset, rng, **chosen)) == 14_931
