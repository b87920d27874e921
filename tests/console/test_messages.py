"""What a damaged file holds is shown in one short line, whoever reads it."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedjax_qp.data import sources
from fedjax_qp.data.partition import _check_index
from fedjax_qp.data.text.instructions import _read
from fedjax_qp.models import models
from fedjax_qp.models.language import gguf, pretrained_config, rotary
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.reports.compare import load_runs
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.settings.strict import read_text

LONG, HUGE = "a\nb" * 10_000, 10**5000  # a text of many lines, a number that Python does not write out


def of_perceptron(folder: Path) -> None:
    models["mlp"]((8, 8, 1), 10, hidden=(HUGE,))


def of_partition(folder: Path) -> None:
    _check_index("0", HUGE, 10)


def of_rotary_scaling(folder: Path) -> None:
    rotary.scaling_type({"rope_type": "llama3", "factor": LONG})


def of_rotary_type(folder: Path) -> None:
    rotary.scaling_type({"rope_type": [HUGE]})


def of_model(folder: Path) -> None:
    pretrained_config.size(folder / "config.json", {"hidden_size": HUGE}, "hidden_size")


def of_gguf(folder: Path) -> None:
    gguf._tokenizer(folder / "model.gguf", {"tokenizer.ggml.model": LONG, "tokenizer.ggml.pre": LONG}, None)


def of_instructions(folder: Path) -> None:
    record = {"instruction": [LONG] * 100, **{LONG + str(number): number for number in range(50)}, "output": "a"}
    (folder / "records.json").write_text(json.dumps([record]))
    _read(folder / "records.json", None)


def of_repeated_key(folder: Path) -> None:
    (folder / "records.json").write_text(f'[{{"{"ab" * 2000}": 1, "{"ab" * 2000}": 2}}]')
    _read(folder / "records.json", None)


def of_class_names(folder: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    parts = {
        f"{part}_{kind}": of for part in ("train", "test") for kind, of in (("inputs", images), ("labels", labels))
    }
    np.savez(folder / "data.npz", **parts, class_names=np.array([LONG, LONG]))
    sources["arrays"](path=str(folder / "data.npz"))


def of_round(folder: Path) -> None:
    RunFolder(folder).records_file.write_text(json.dumps({"round": LONG}) + "\n")
    RunFolder(folder).records()


def of_number(folder: Path) -> None:
    RunFolder(folder).records_file.write_text(json.dumps({"round": 1, LONG: "x"}) + "\n")
    RunFolder(folder).records()


def of_settings(folder: Path) -> None:
    RunFolder(folder).records_file.write_text("")
    RunFolder(folder).config_file.write_text(f"name: a\nseed: 0x1{'0' * 5000}\nrounds: {json.dumps(LONG)}\n")
    load_runs([folder])


READERS = [one for name, one in globals().items() if name.startswith("of_")]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_message_is_one_line_however_large_the_value(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        reader(Path())
    message = str(error.value)
    assert len(message) <= 500 and len(message.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_records_are_read_as_all_other_text_is(tmp_path, content):
    file = tmp_path / "records.json"
    if content is not None:
        file.write_bytes(content)
    for path in (file, Path("a\0b")):
        with pytest.raises(ConfigurationError) as expected:
            read_text(path)
        with pytest.raises(ConfigurationError) as found:
            _read(path, None)
        assert str(found.value) == str(expected.value)
