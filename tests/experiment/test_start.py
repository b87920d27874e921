"""From experiments to one engine: what stands in the place of the configured method counts for any number of runs."""

import numpy as np
import pytest
from support.federations import counting
from support.runs import assert_bitwise, write

from fedjax_qp import config
from fedjax_qp.engine import Layout
from fedjax_qp.experiment import build, start_engine
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.loop import simulate


def experiments(folder, *changes, values=("seed=0", "seed=1")):
    return [build(config.load(write(folder), ["rounds=4", "engine.lanes=2", *changes, value])) for value in values]


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_replaced_algorithm_counts_for_any_number_of_runs(tmp_path, store):
    """Each run's clients count their own rounds, wherever their memories are kept between chunks."""
    algorithm = counting()
    found = experiments(tmp_path, f"engine.client_store={store}")
    last = list(simulate([one._replace(algorithm=algorithm) for one in found]))[-1]
    for one, chunk in zip(found, last, strict=True):
        (alone,) = list(simulate([one._replace(algorithm=algorithm)]))[-1]
        assert_bitwise(alone.state, chunk.state)
        assert chunk.state.clients["rounds"].sum() == 4 * 4
    assert not np.array_equal(*(chunk.state.clients["rounds"] for chunk in last))


def test_replaced_algorithms_of_runs_that_differ_in_settings_are_refused(tmp_path):
    """One algorithm has one learning rate; a replaced method has that of each run."""
    rates = ["local.learning_rate=0.1", "local.learning_rate=0.2"]
    found = experiments(tmp_path, values=rates)
    algorithm = counting()
    with pytest.raises(ConfigurationError, match="differ in local.learning_rate: replace `method`"):
        start_engine([one._replace(algorithm=algorithm) for one in found], Layout(2))
    with pytest.raises(ConfigurationError, match="differ in their algorithms: replace `method`"):
        start_engine([one._replace(algorithm=counting()) for one in experiments(tmp_path)], Layout(2))
    start_engine([one._replace(algorithm=algorithm, method=lambda settings: algorithm) for one in found], Layout(2))
