"""Laws of federated LoRA without masks: what is trained, what is averaged, what stays with the client."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.regression import regression

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import blend, factors, only
from fedjax_qp.contract.federations import Played, play, worst_difference

ROUNDS = 3
INIT = jax.random.key(0)


def build(name, expansion=1, **options):
    federation = regression(expansion)
    return algorithms.build(name, federation.model, federation.optimizer, **options)


@cache
def played(name: str, expansion: int = 1, rounds: int = ROUNDS, **options) -> Played:
    return play(build(name, expansion, **options), regression(expansion), rounds)


def start():
    return regression().model.init(INIT).trainable


def took_part(run: Played) -> set[int]:
    return {client for metrics in run.metrics for client in metrics}


@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_fedit_is_federated_averaging_of_adapters(proximal):
    other = played("fedprox", proximal=proximal) if proximal else played("fedavg")
    assert worst_difference(other.server.params.trainable, played("fedit", proximal=proximal).server.adapters) <= 1e-5


def test_ffa_trains_and_sends_b_only():
    run = played("ffa_lora", expansion=2)
    initial = regression(2).model.init(INIT).trainable
    for adapters in [run.server.adapters, *(memory.adapters for memory in run.memories)]:
        assert worst_difference(factors(initial, only("a")), factors(adapters, only("a"))) == 0
    assert worst_difference(factors(initial, only("b")), factors(run.server.adapters, only("b"))) > 0
    size = sum(leaf.size for leaf in factors(initial, only("b")))
    for metrics in run.metrics[0].values():
        assert int(metrics["client/trained_entries"]) == size
        assert int(metrics["client/upload_bytes"]) == 4 * size


def test_fedsa_averages_a_and_leaves_b_with_the_client():
    algorithm, run = build("fedsa_lora"), played("fedsa_lora")
    assert worst_difference(factors(start(), only("b")), factors(run.server.adapters, only("b"))) == 0
    uploads = list(run.uploads[-1].values())
    weight = sum(float(upload.weight) for upload in uploads)
    means = jax.tree.map(lambda *leaves: sum(leaves) / weight, *(upload.adapters for upload in uploads))
    assert worst_difference(means, factors(run.server.adapters, only("a"))) <= 1e-6
    for client in took_part(run):
        served = algorithm.serve(run.server, run.memories[client]).trainable
        assert worst_difference(factors(served, only("a")), factors(run.server.adapters, only("a"))) == 0
        assert worst_difference(factors(served, only("b")), factors(run.memories[client].adapters, only("b"))) == 0


def test_local_lora_sends_nothing_and_goes_on_where_it_stopped():
    algorithm, run = build("local_lora"), played("local_lora")
    assert worst_difference(start(), run.server.adapters) == 0
    assert all(int(m["client/upload_bytes"]) == 0 for metrics in run.metrics for m in metrics.values())
    for client in took_part(run):
        memory = run.memories[client]
        assert worst_difference(start(), memory.adapters) > 0
        assert worst_difference(algorithm.serve(run.server, memory), algorithm.tuned(run.server, memory)) == 0


def test_no_share_of_the_average_is_local_training():
    run, alone = played("fedit", personal_mix=0.0), played("local_lora")
    returned = [c for c in took_part(run) if sum(c in metrics for metrics in run.metrics) > 1]
    first = [c for c in run.metrics[0] if c in returned]
    assert first
    for client in first:  # those who began from the same adapters
        assert worst_difference(alone.memories[client].adapters, run.memories[client].adapters) <= 1e-6


def test_the_whole_average_is_what_a_client_is_served():
    algorithm, run = build("fedit"), played("fedit")
    for memory in run.memories:
        assert worst_difference(run.server.adapters, algorithm.serve(run.server, memory).trainable) == 0


def test_local_rounds_at_the_end_leave_the_server_alone():
    algorithm, run = build("fedit", local_after=1), played("fedit", local_after=1)
    assert worst_difference(run.servers[1].adapters, run.server.adapters) == 0
    assert worst_difference(played("fedit", rounds=1).server.adapters, run.server.adapters) <= 1e-6
    for number, metrics in enumerate(run.metrics):
        assert {int(m["client/upload_bytes"]) > 0 for m in metrics.values()} == {number == 0}
    for client in {c for metrics in run.metrics[1:] for c in metrics}:
        memory = run.memories[client]
        assert worst_difference(memory.adapters, algorithm.serve(run.server, memory).trainable) == 0


def test_who_never_took_part_is_served_the_average():
    algorithm, run = build("fedit", personal_mix=0.5), played("fedit", rounds=1, personal_mix=0.5)
    absent = set(range(len(run.memories))) - took_part(run)
    assert absent
    for client in absent:
        for view in (algorithm.serve, algorithm.tuned):
            assert worst_difference(run.server.adapters, view(run.server, run.memories[client]).trainable) == 0


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_blend(mix):
    average, own = {"a": jnp.array([1.0, 3.0])}, {"a": jnp.array([5.0, -1.0])}
    expected = {0.0: [5.0, -1.0], 0.25: [4.0, 0.0], 1.0: [1.0, 3.0]}[mix]
    np.testing.assert_array_equal(blend(average, own, mix)["a"], expected)
