"""The example in the vocabulary's docstring is a method that runs, and does what it says."""

import textwrap

import jax
import optax
import pytest
from support.federations import small_algorithm

from fedjax_qp import federated
from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import images, play, run_rounds, small_engine, small_model, worst_difference


@pytest.fixture
def clipped(monkeypatch):
    """The example's function; what it registers is forgotten."""
    monkeypatch.setattr(algorithms, "_functions", dict(algorithms._functions))
    text, names = federated.__doc__.split("method's options:\n\n")[1].split("\n\nMetrics named")[0], {}
    assert len(textwrap.dedent(text).split("@algorithms.register\n")[1].splitlines()) <= 12
    exec(textwrap.dedent(text), names)
    return names["clipped_average"]


def test_the_docstrings_method_clips_what_fedavg_uploads(clipped):
    radius = 0.05
    method = clipped(small_model(), optax.sgd(0.05, 0.9), radius=radius)
    ours, plain = (play(one, images(), rounds=1) for one in (method, small_algorithm("fedavg-uniform")))
    for client, upload in ours.uploads[0].items():
        expected = plain.uploads[0][client].update.trainable
        norm = float(optax.tree.norm(expected))
        assert norm > radius
        clipped_update = jax.tree.map(lambda leaf, share=radius / norm: share * leaf, expected)
        assert worst_difference(clipped_update, upload.update.trainable) <= 1e-5
    state, _ = run_rounds(method, small_engine(method), lanes=3, rounds=1)
    assert worst_difference(ours.server.params, state.server.params) <= 1e-5
