"""The report of made runs: nothing from a run becomes markup, nothing is fetched, and the numbers are the comparison's."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from support.comparisons import made_run

from fedjax_qp.cli import main
from fedjax_qp.experiment import defaults
from fedjax_qp.reports import compare, rendering
from fedjax_qp.reports.html import run_page, run_warnings, write_report
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.watch import Watch

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> --> $\\frac{'


class Parsed(HTMLParser):
    """What a browser would see: elements, their ids, what they refer to, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.ids, self.addresses, self.attributes, self.text = [], [], [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.addresses.append(value)
            if value and "url(" in value:
                self.addresses.append(value.split("url(")[1].split(")")[0])

    def handle_data(self, data):
        self.text += data


def written(folders: list[Path], output: Path, **options) -> Parsed:
    write_report(folders, output, **options)
    return Parsed(output.read_text(encoding="utf-8"))


def change(folder: Path, **settings) -> Path:
    file = RunFolder(folder).config_file
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **settings}))
    return folder


@pytest.fixture
def hostile(tmp_path) -> list[Path]:
    """Two methods of two seeds whose names and settings are markup, one of them diverged."""
    folders = [
        change(made_run(tmp_path, name, seed, [0.2, 0.4, 0.5, level]), name=f"{HOSTILE}{name}", note=HOSTILE)
        for name, level in (("a", 0.55), ("b", 0.6))
        for seed in (0, 1)
    ]
    RunFolder(folders[0]).failure.path.write_text(json.dumps({"message": HOSTILE}))
    RunFolder(folders[0]).environment.path.write_text(json.dumps({"packages": {HOSTILE: HOSTILE}, "commit": HOSTILE}))
    RunFolder(folders[0]).partition_figure.write_bytes(b"made")
    return folders


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_from_a_run_becomes_markup_and_nothing_is_fetched(tmp_path, hostile, count):
    page = written(hostile[:count], tmp_path / "page.html")
    assert page.elements.count("script") == 1 and not {"iframe", "link", "object", "embed", "base"} & set(page.elements)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert page.elements.count("img") == (1 if count == 1 else 0)  # the partition
    assert HOSTILE in page.text
    inside = {address for address in page.addresses if address.startswith("#")}
    assert inside and {address[1:] for address in inside} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for address in set(page.addresses) - inside:
        data = f"data:image/png;base64,{base64.b64encode(b'made').decode()}"
        assert address == data or (tmp_path / unquote(address)).exists(), address


def test_settings_that_differ_from_their_defaults_are_marked(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.5], algorithm={"name": "fedmut", "alpha": 3.5, "mutation_rounds": 50})
    (run,) = compare.load_runs([folder])
    groups = run_page(run, tmp_path / "page.html").settings
    found = {(group, row.name): (row.value, row.default, row.changed) for group, rows in groups.items() for row in rows}
    assert found["algorithm", "alpha"] == ("3.5", "4.0", True)
    assert found["algorithm", "mutation_rounds"] == ("50", "50", False)
    assert found["algorithm", "name"] == ("fedmut", None, False)
    assert found["", "rounds"] == ("4", "100", True)
    assert found["engine", "lanes"] == ("1", "auto", True)
    assert defaults({"algorithm": {"name": "long gone"}})["algorithm"] == {}


def test_the_comparison_holds_the_table_with_paired_differences(tmp_path):
    folders = [
        made_run(tmp_path, name, seed, [0.1, level + 0.1 * seed])
        for name, level in (("plain", 0.5), ("better", 0.53))
        for seed in (0, 1)
    ]
    page = written(folders, tmp_path / "elsewhere" / "page.html", last=1, baseline="plain", target=0.6)
    rows = compare.summary(compare.load_runs(folders), last=1, baseline="plain", target=0.6)
    headings, cells = rendering.grid(rows)
    for text in [*headings, *cells[1]]:
        assert text in page.text
    assert "+3.00 ± 0.00" in page.text and "minus plain (points)" in page.text
    assert "One seed" not in page.text
    links = [address for address in page.addresses if not address.startswith("#")]
    assert len(links) == 2 * len(folders)  # config.yaml and records.jsonl
    assert all((tmp_path / "elsewhere" / address).resolve().is_file() for address in links)


WARNINGS = {
    "^It is 1.25 in round 3, and large in 2 rounds.$": [0.2, 0.9, 1.25],
    "No training loss in 1 rounds .the first is 2.": {"train_loss": None},
    "last accuracy is 20.0 points below the best .round 2.": {"test_accuracy": 0.7},
}


@pytest.mark.parametrize("expected", WARNINGS)
def test_what_a_reader_must_know_is_said(tmp_path, expected):
    import re

    given, advice = WARNINGS[expected], "it is {value} in round {round}, and large in {rounds} rounds."
    watches = (
        Watch("qp/size", limit=0.9, advice=advice),
        Watch("train_loss", "loss", 0.0),
        Watch("qp/none", limit=0.0),
    )
    folder = made_run(tmp_path, "a", 0, [0.5, 0.5, 0.5], watches, rounds=3)
    lines = [json.loads(line) for line in RunFolder(folder).records_file.read_text().splitlines()]
    (run,) = compare.load_runs([folder])
    assert run_warnings(run) == []
    for line, size in zip(lines, given, strict=False) if isinstance(given, list) else ():
        line["qp/size"] = size
    if isinstance(given, dict):
        lines[1] |= given
    (found,) = run_warnings(run._replace(records=lines))
    assert re.search(expected, found)


def test_unfinished_diverged_and_unclean_runs_are_named(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.5], rounds=9)
    (run,) = compare.load_runs([folder])
    assert run_warnings(run) == ["Unfinished: 1 of 9 rounds."]
    RunFolder(folder).end.path.write_text('{"reason": "no progress", "round": 1}')
    assert run_warnings(run) == []
    RunFolder(folder).failure.path.write_text('{"message": "loss is inf in round 2"}')
    assert run_warnings(run) == ["The run diverged. loss is inf in round 2"]
    assert "local changes" in run_warnings(run, {"commit": "0123-dirty"})[1]


def test_times_leave_the_start_out_of_a_round(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.5])
    chunks = [(10, True), (2, False), (4, False), (2, False)]
    lines = [{"round": 2, "rounds": 2, "seconds": seconds, "first": first} for seconds, first in chunks]
    RunFolder(folder).times.path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"round"')
    (run,) = compare.load_runs([folder])
    timing = dict(run_page(run, tmp_path / "page.html").timing)
    assert timing == {
        "in all": "18.0 s",
        "a round, median of chunks": "1 s",
        "start and compilation, about": "8.0 s",
        "processes": "1",
    }


def test_the_command_chooses_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [str(made_run(tmp_path, "a", seed, [0.5, 0.5])) for seed in (0, 1)]
    for arguments, file in (([folders[0]], Path(folders[0]) / "report.html"), (folders, Path("comparison.html"))):
        with pytest.raises(SystemExit) as ended:
            main(["report", *arguments])
        assert ended.value.code == 0
        assert file.read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "nothing")])
    assert ended.value.code == 2 and "not a run folder" in capsys.readouterr().err


DAMAGE = {
    "environment.json": [
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"packages": 3}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a": NaN}',
    ],
    "times.jsonl": [
        b'{"a": 1}\n',
        b"\xff\n",
        b'{"round": 1, "rounds": 0, "seconds": 1, "first": true}\n',
        b"[" * 9999 + b"\n",
    ],
    "failure.json": [b"{", b"3"],
    "ended.json": [b"{", b"[]"],
    "layout.json": [b"{", b'{"program": {"runs": "two"}}'],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_left_out_with_a_sentence(tmp_path, name):
    folder = made_run(tmp_path, "a", 0, [0.5, 0.5, 0.5, 0.5])
    for content in DAMAGE[name]:
        (folder / name).write_bytes(content)
        page = run_page(compare.load_runs([folder])[0], tmp_path / "page.html")
        said = [warning for warning in page.warnings if name in warning]
        silent = name in ("ended.json", "layout.json") or content == b'{"packages": 3}'
        assert silent or (len(said) == 1 and "\n" not in said[0])


def test_the_short_form_of_a_part_is_reported(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.5], algorithm="fedqp")
    settings = run_page(compare.load_runs([folder])[0], tmp_path / "page.html").settings
    assert [row.value for row in settings["algorithm"] if row.name == "name"] == ["fedqp"]


def test_perplexity_is_the_headline_of_a_language_run(tmp_path):
    folder = made_run(tmp_path, "a", 0, [0.25])
    spread = {"mean": 7.25, "max": 9.0, "clients": [5.5, 9.0]}
    line = {
        "round": 1,
        "test_loss": None,
        "test_accuracy": 0.25,
        "personal": {"perplexity": spread, "accuracy": spread},
    }
    RunFolder(folder).records_file.write_text(json.dumps(line) + "\n")
    (run,) = compare.load_runs([folder])
    facts = run_page(run, tmp_path / "page.html").facts
    assert (facts[0].label, facts[0].value) == ("Perplexity, aggregated", "7.25")
    assert not [fact for fact in facts if fact.label.startswith("Personal accuracy")]
    assert any("the common test set (round 1)" in warning for warning in run_warnings(run))
