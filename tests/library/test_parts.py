"""Registered parts as functions: what they return, what they refuse, and that naming them loads nothing."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

import fedjax_qp as fq
from fedjax_qp import config
from fedjax_qp.data import partitions
from fedjax_qp.data.images.sources import arrays, digits
from fedjax_qp.experiment import REGISTRIES, resolve
from fedjax_qp.models import models
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.catalogue import KINDS, entries

# Options that parts cannot do without.
NEEDED = {
    "arrays": {"path": "mine.npz"},
    "categories": {"clients": 4},
    "femnist": {"folder": "leaf"},
    "csv": {"path": "mine.csv", "label": "kind"},
    "json_file": {"path": "split.json"},
    "parquet": {"path": "mine.parquet", "label": "kind"},
    "pretrained": {"path": "llama"},
    "records": {"files": "mine.jsonl"},
    "shakespeare_leaf": {"folder": "leaf"},
    "tfds_images": {"dataset": "mnist"},
}
OTHERS = {"data": "digits", "partition": "iid", "model": "mlp", "algorithm": "fedavg"}


def needed(entry) -> dict:
    return {name: NEEDED[entry.name][name] for name, default in entry.options.items() if default is None}


def from_yaml(entry, options: dict) -> fq.Part:
    part = KINDS[entry.registry].part
    read = config.from_dict({"name": "any", **OTHERS, part: {"name": entry.name, **options}})
    return getattr(read, part)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_every_registered_part_is_what_a_configuration_gives(entry):
    make, options = getattr(fq, entry.name), needed(entry)
    assert make(**options) == from_yaml(entry, options)
    assert make.__name__ == entry.name
    assert make.__doc__.startswith(entry.idea)
    with pytest.raises(ConfigurationError, match=f"unknown option of .* {entry.name!r} 'no_such_option'"):
        make(**options, no_such_option=1)
    for name, default in entry.options.items():
        if default is not None and default[0].isdigit():  # a number
            with pytest.raises(ConfigurationError, match=f"{name} = 'many' must be"):
                make(**options, **{name: "many"})


def test_names_of_parts_are_unique_and_none_of_the_face():
    """`fq.name` must mean one thing."""
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names) == sum(len(registry.names()) for registry in REGISTRIES.values())
    assert not set(names) & {*fq.__all__, "sweeps", "runs", "config"}
    assert set(names) | set(fq.__all__) <= set(dir(fq))
    assert all(getattr(fq, name) is not None for name in fq.__all__)


def test_values_are_those_of_yaml():
    assert fq.mlp(hidden=(np.int64(16), 8)) == fq.Part("mlp", {"hidden": [16, 8]})
    assert fq.fedqp(form="joint", alpha=1) == fq.Part("fedqp", {"form": "joint", "alpha": 1})


def test_signatures_name_options_with_their_defaults():
    parameters = inspect.signature(fq.fedqp).parameters
    assert parameters["alpha"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["alpha"].default == 2.0
    assert inspect.signature(fq.records).parameters["files"].default is inspect.Parameter.empty


def test_what_is_missing_or_misspelt_is_said():
    with pytest.raises(ConfigurationError, match="'arrays' needs the option 'path'"):
        fq.arrays()
    with pytest.raises(AttributeError, match="did you mean fedqp"):
        _ = fq.fedpq
    assert not hasattr(fq, "_repr_html_")


def test_naming_parts_loads_nothing_heavy():
    """The command line's start rests on it, and a notebook's completion."""
    code = (
        "import json, sys; import fedjax_qp as fq; light = 'pydantic' in sys.modules; dir(fq); fq.fedqp; fq.Local; fq.run;"
        "print(json.dumps([light, *(name in sys.modules for name in ('jax', 'pandas', 'matplotlib', 'optax'))]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [False] * 5


def test_arrays_are_the_data_of_their_file(tmp_path):
    given = digits()
    train, test = ((np.asarray(part.inputs), np.asarray(part.labels)) for part in (given.train, given.test))
    part = fq.Arrays(train, test).write(tmp_path)
    assert part == fq.Arrays(train, test).write(tmp_path)
    assert fq.Arrays(train, test, client_ids=np.arange(len(train[1])) % 4).write(tmp_path) != part
    read = arrays(**part.options)
    np.testing.assert_array_equal(read.train.inputs, train[0])
    np.testing.assert_array_equal(read.test.labels, test[1])
    resolve(config.from_dict({"name": "any", **OTHERS, "data": {"name": part.name, **part.options}}))


def test_a_part_of_ones_own_is_there_once_it_is_registered(monkeypatch):
    def halves(dataset, generator, *, share: float = 0.5):
        """Two clients."""

    monkeypatch.setitem(partitions._functions, "halves", halves)
    assert fq.halves(share=0.3) == fq.Part("halves", {"share": 0.3})
    assert "halves" in dir(fq)
    monkeypatch.setitem(models._functions, "halves", halves)
    with pytest.raises(AttributeError, match=r"several parts \(partition and model\): write fq.Part\('halves', {…}\)"):
        _ = fq.halves
