"""Training losses are means over examples, however these were cut into batches and dealt to clients."""

import jax
import numpy as np
import optax
import pytest
from support.federations import CASES, federation_of

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.contract.federations import digits, play
from fedjax_qp.experiment import build
from fedjax_qp.federated import Batch
from fedjax_qp.runs.loop import simulate

# In their first round all of these train the first model on the plain loss, on all of a client's examples.
PLAIN = ["fedavg", "ditto", "scaffold", "fedgen", "fedsam", "fedit", "flora"]


@pytest.mark.parametrize("case", PLAIN)
def test_client_loss_is_the_mean_over_its_examples_or_tokens(case):
    """With no step to speak of it is what a test on the client's training examples gives: sum over count."""
    federation, kind = federation_of(case), CASES[case]
    algorithm = algorithms.build(kind.name, federation.model, optax.sgd(1e-12), **kind.options)
    played = play(algorithm, federation, rounds=1)
    unequal = 0
    for client, metrics in played.metrics[0].items():
        examples = jax.tree.map(lambda leaf, part=federation.parts[client]: leaf[part], federation.train)
        everything = Batch(examples, np.ones(len(federation.parts[client]), bool))
        params = algorithm.serve(played.servers[0], ())
        sums = federation.model.evaluate(federation.frozen, params, everything)
        count = float(sums["count"].sum())
        assert int(metrics["client/counted"]) == count
        np.testing.assert_allclose(metrics["client/loss"], sums["loss"] / count, rtol=1e-5)
        if case == "ditto":
            np.testing.assert_allclose(metrics["client/personal_loss"], sums["loss"] / count, rtol=1e-5)
        unequal += len(federation.parts[client]) % federation.batch > 0
    assert unequal > 0


def test_one_odd_example_counts_once(tmp_path):
    """21 examples in batches of 20 and 1, the last one unlike the others: the loss in training is the one in the test."""
    inputs = np.zeros((21, 8, 8), np.uint8)
    inputs[:, :4] = 255
    inputs[20] = 255 - inputs[20]
    labels = np.r_[np.zeros(20, int), 1]
    file = tmp_path / "odd.npz"
    both = {
        f"{part}_{name}": value
        for part in ("train", "test")
        for name, value in (("inputs", inputs), ("labels", labels))
    }
    np.savez(file, **both, client_ids=np.zeros(21, int))

    def settings(rounds: int, learning_rate: float, batch_size: int) -> config.Config:
        return config.from_dict(
            {
                "name": "odd",
                "data": {"name": "arrays", "path": str(file)},
                "partition": "natural",
                "model": "mlp",
                "algorithm": "fedavg",
                "participation": {"cohort": 1},
                "rounds": rounds,
                "engine": {"lanes": 1, "rounds_per_chunk": rounds},
                "local": {"learning_rate": learning_rate, "momentum": 0, "batch_size": batch_size, "epochs": 1},
            }
        )

    *_, (trained,) = simulate([build(settings(40, 0.1, 21))])
    begun = trained.state._replace(round=np.zeros((), np.int32))
    ((chunk,),) = simulate([build(settings(1, 1e-12, 20))], [begun])
    assert chunk.records[0]["train_loss"] == pytest.approx(
        0.009604, abs=1e-6
    )  # the mean of the batch means is 0.005995
    assert chunk.records[0]["train_loss"] == pytest.approx(chunk.records[0]["test_loss"], rel=1e-5)


def test_a_rounds_loss_is_the_mean_over_all_examples_of_its_clients():
    """Clients of 3 to 40 examples, all of them in the cohort."""
    values = {
        "name": "round",
        "rounds": 1,
        "data": "digits",
        "partition": {"name": "dirichlet", "clients": 5, "beta": 0.3, "minimum": 20},
        "model": {"name": "mlp", "hidden": [8]},
        "algorithm": "fedavg",
        "participation": {"cohort": 5},
        "engine": {"lanes": 2, "rounds_per_chunk": 1},
        "local": {"learning_rate": 1e-12, "momentum": 0, "batch_size": 32, "epochs": 1},
    }
    experiment = build(config.from_dict(values))
    ((chunk,),) = simulate([experiment])
    train = digits().train
    sums = experiment.model.evaluate(
        (), experiment.algorithm.serve(chunk.state.server, ()), Batch(train, np.ones(len(train.labels), bool))
    )
    assert chunk.records[0]["train_loss"] == pytest.approx(float(sums["loss"]) / len(train.labels), rel=1e-5)
