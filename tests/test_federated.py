"""The example in the vocabulary's docstring is a method that runs, and it is federated averaging."""

import textwrap

import jax
import optax
from support.federations import run_rounds, small_algorithm, small_engine, small_model, worst_difference

from fedjax_qp import federated
from fedjax_qp.federated import Algorithm, Params


def test_the_docstrings_method_is_uniform_fedavg():
    text = federated.__doc__.split("@algorithms.register\n")[1].split("\n\nMetrics named")[0]
    names = {"jax": jax, "optax": optax, "Params": Params, "Algorithm": Algorithm}
    exec(textwrap.dedent(text), names)
    plain = names["damped_average"](small_model(), optax.sgd(0.05, 0.9))
    state, _ = run_rounds(plain, small_engine(plain), lanes=3)
    expected_algorithm = small_algorithm("fedavg-uniform")
    expected, _ = run_rounds(expected_algorithm, small_engine(expected_algorithm), lanes=3)
    assert worst_difference(expected.server.params, state.server) <= 1e-5
