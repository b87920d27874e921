"""What parsers pass over in silence, or leave by exceptions of their own, is one sentence."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.strict import load_json, load_yaml, read_text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' stands twice, in lines 1 and 3"),
        ("a: {b: 1, b: 2}", "'b' stands twice, in lines 1 and 1"),
        ("1: x\n1: y", "1 stands twice"),
        ("1: x\n0x1: y", "1 stands twice"),
        ("a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b", "<< stands twice, in lines 4 and 5: write <<: [*one"),
        ("a: [1", "line 1 is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: !!timestamp 2026-11-27", "could not determine a constructor"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: \x00", "not valid YAML"),
        ("? [1, 2]\n: x", "not valid YAML"),
    ],
)
def test_yaml_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_yaml(text, "settings.yaml")
    message = str(caught.value)
    assert message.startswith("settings.yaml") and words in message and "\n" not in message


def test_yaml_values_and_merges_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}\nlist: [1.5, yes, null, word]"
    found = load_yaml(text, "here")
    assert found == {"base": {"a": 1, "b": 2}, "own": {"a": 1, "b": 3}, "list": [1.5, True, None, "word"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1}\nb: {c: &b {<<: *a, x: 2}}\nd: {<<: *b}", {"a": {"x": 1}, "b": {"c": {"x": 2}}, "d": {"x": 2}}),
        ("a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: [*a, *b], y: 3}", {"a": {"x": 1}, "b": {"y": 2}, "c": {"x": 1, "y": 3}}),
        (
            "a: &a {rate: 1}\nb: &b {rate: 2}\nc: &c {<<: [*a, *b]}\nd: {<<: *c}",
            {"a": {"rate": 1}, "b": {"rate": 2}, "c": {"rate": 1}, "d": {"rate": 1}},
        ),
        (
            "a: &a {rate: 1, steps: 5}\nb: &b {<<: *a, rate: 2}\nc: {<<: [*b, *a], steps: 6}",
            {"a": {"rate": 1, "steps": 5}, "b": {"rate": 2, "steps": 5}, "c": {"rate": 2, "steps": 6}},
        ),
        ("a: &a {<<: *a, x: 1}", {"a": {"x": 1}}),
        ("'<<': 1\na: &a {x: 1}\n<<: *a", {"<<": 1, "a": {"x": 1}, "x": 1}),
    ],
)
def test_what_is_merged_in_is_no_repeated_key(text: str, value: object) -> None:
    """In the first, the inner mapping is shared and merged before it is made itself."""
    assert load_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        ("{", "line 1 is not valid JSON"),
        (b'\n{"a": \xff}', "not UTF-8"),
        ("[NaN]", "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("[" + "1" * 5000 + "]", "not valid JSON"),
    ],
)
def test_json_is_refused_in_one_line(text: str | bytes, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_json(text, "records.json")
    message = str(caught.value)
    assert message.startswith("records.json") and words in message and "\n" not in message


def test_json_values_are_read_with_and_without_a_mark() -> None:
    for text in ('{"a": [1, null, "ä"]}', '\ufeff{"a": [1, null, "ä"]}', '{"a": [1, null, "ä"]}'.encode("utf-8-sig")):
        assert load_json(text, "here") == {"a": [1, None, "ä"]}


def test_text_is_utf8_and_every_failure_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "mark").write_bytes("ä".encode("utf-8-sig"))
    assert read_text(tmp_path / "mark") == "ä"
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    for path, words in (
        (tmp_path / "latin", "not a UTF-8 text file"),
        (tmp_path / "missing", "cannot be read"),
        (tmp_path, "cannot be read"),
        (tmp_path / ("x" * 5000), "cannot be read"),
        (Path("a\0b"), "NUL"),
    ):
        with pytest.raises(ConfigurationError, match=words) as caught:
            read_text(path)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", "010"), ("1:30", "1:30"), ("-1:30.5", "-1:30.5"), ("08", "08"), ("2026-11-27", "2026-11-27")),
        *(("0", 0), ("-7", -7), ("1_000", 1000), ("0x10", 16), ("1.5", 1.5), (".5", 0.5), ("1.0e-5", 1e-5)),
        *(("true", True), ("no", False), ("~", None), ("1e-3", "1e-3")),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    """YAML 1.1 takes 010 for 8 and 1:30 for 90; types settle what a text is."""
    found = load_yaml(text, "here")
    assert found == value and type(found) is type(value)


@given(st.text(st.sampled_from("0123456789.:+-_xbeE~n"), max_size=8))
def test_texts_that_look_like_numbers_come_back_as_they_were(text: str) -> None:
    assert load_yaml(yaml.safe_dump({"name": text}), "here") == {"name": text}
