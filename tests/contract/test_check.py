"""`fedjax-qp check`: what keeps the laws passes, and each law finds what breaks it."""

from pathlib import Path

import pytest

from fedjax_qp import cli
from fedjax_qp.contract.check import check
from fedjax_qp.registry import ConfigurationError

pytestmark = pytest.mark.usefixtures("own_registries")

METHOD = """
import jax, jax.numpy as jnp, optax
from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import averaging


@algorithms.register
def mine(model, optimizer, *, step_size: float = 0.5):
    "FedAvg with something of my own."
    average = averaging(model, optimizer, optax.sgd(step_size), weighting="uniform")
    {change}
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_QP_CACHE", str(tmp_path / "cache"))


def found(folder: Path, text: str, **options) -> dict[str, str | None]:
    """The reason of each law, None where it holds."""
    file = folder / "mine.py"
    file.write_text(text)
    return {one.law: one.reason for one in check([str(file)], list(options.items()))}


def test_a_sound_method_keeps_every_law(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(METHOD.format(change="return average"))
    with pytest.raises(SystemExit) as left:
        cli.main(["check", str(tmp_path / "mine.py")])
    said = capsys.readouterr().out
    assert left.value.code == 0
    assert said.count("passed") == 11 and "failed" not in said and "algorithm mine" in said


BREAKS = {
    "order": """
    def finish(shared, carry, client):
        upload, memory, metrics = average.finish(shared, carry, client)
        return upload._replace(update=jax.tree.map(lambda leaf: leaf * client.own, upload.update)), memory, metrics
    def dispatch(server, cohort, key):
        shared, own, metrics = average.dispatch(server, cohort, key)
        return shared, jnp.arange(len(cohort.clients), dtype=jnp.float32), metrics
    return average._replace(finish=finish, dispatch=dispatch)""",
    "padding": """
    def step(frozen, shared, carry, batch, key):
        carry = average.step(frozen, shared, carry, batch, key)
        wider = len(batch.mask) / 8
        return jax.tree.map(lambda leaf: leaf * wider if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, carry)
    return average._replace(step=step)""",
    "structure": """
    def combine(server, total, key):
        server, metrics = average.combine(server, total, key)
        return (server, total.weight), metrics
    return average._replace(combine=combine)""",
}


@pytest.mark.parametrize("law", BREAKS)
def test_a_method_that_breaks_a_law_is_told_which(tmp_path, law):
    reasons = found(tmp_path, METHOD.format(change=BREAKS[law].strip()))
    assert reasons[law] is not None and "\n" not in reasons[law]
    if law != "structure":  # without which nothing runs
        assert reasons["same key"] is None


PARTS = """
import numpy as np
from flax import nnx
from fedjax_qp.data import partitions, sources
from fedjax_qp.data.rows.dataset import build_rows
from fedjax_qp.models import models
from fedjax_qp.models.mlp import mlp

DRAW = np.random.default_rng()


@sources.register("rows")
def table(*, rows: int = 40):
    "Rows."
    draw = {rows}
    x = draw.normal(size=(rows, 3))
    return build_rows((x, np.arange(rows) % 2), (x, np.arange(rows) % 2))


@partitions.register
def halves(dataset, rng):
    "Two clients."
    order = {order}.permutation(len(dataset.train.labels))
    return [np.sort(part) for part in np.array_split(order, 2)]


class Mean(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, inputs, mask=None, *, train):
        return self.inner(inputs{shift}, mask, train=train)


@models.register("rows")
def network(input_shape, classes):
    "An MLP."
    return lambda rngs: Mean(mlp(input_shape, classes, hidden=(8,))(rngs))
"""


def test_sound_parts_keep_their_laws(tmp_path):
    text = PARTS.replace("{rows}", "np.random.default_rng(0)").replace("{order}", "rng").replace("{shift}", "")
    reasons = found(tmp_path, text)
    assert set(reasons) == {"form", "same again", "same key", "gradients (rows)", "padding (rows)", "sums (rows)"}
    assert set(reasons.values()) == {None}


def test_parts_that_break_theirs_are_told_which(tmp_path):
    text = PARTS.replace("{rows}", "DRAW").replace("{order}", "DRAW").replace("{shift}", " - inputs.mean(0)")
    reasons = found(tmp_path, text)
    assert "differ when it is read again" in reasons["same again"]
    assert "draw from rng alone" in reasons["same key"]
    assert "honour the mask" in reasons["padding (rows)"]


def test_options_and_mistakes(tmp_path):
    with pytest.raises(ConfigurationError, match="registers nothing: decorate a function"):
        found(tmp_path, "x = 1\n")
    text = METHOD.format(change="return average")
    with pytest.raises(ConfigurationError, match="'mine': step_size = 'x' must be a number"):
        found(tmp_path, text, **{"mine.step_size": "x"})
    with pytest.raises(ConfigurationError, match="unknown option 'step_size'"):
        found(tmp_path, text, step_size=1)
