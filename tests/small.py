"""A small federation that compiles in a second: real 8×8 digits, an MLP, twelve clients of very different size."""

from functools import cache

import jax
import numpy as np
import optax

from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Local, Participation
from fedjax_qp.data import sources
from fedjax_qp.engine import Engine, cut_test_set, make_engine
from fedjax_qp.federated import Algorithm, FederatedState, Model, init_state
from fedjax_qp.models import models
from fedjax_qp.models.classifier import classifier
from fedjax_qp.plan import Plan, Workload, plan_chunk

CLIENTS, COHORT, BATCH, ROUNDS = 12, 5, 8, 2

# Every registered algorithm appears at least once; `test_contract` checks that.
CASES = {
    "fedavg": ("fedavg", {}),
    "fedavg-uniform": ("fedavg", {"weighting": "uniform"}),
    "fedprox": ("fedprox", {"proximal": 0.1}),
    "fedavgm": ("fedavgm", {"momentum": 0.5}),
    "fedadam": ("fedadam", {}),
    "fedyogi": ("fedyogi", {}),
    "fedmut": ("fedmut", {"alpha": 2.0}),
    "fedqp-nearest": ("fedqp", {"form": "nearest", "margin": 0.2, "max_drift": 0.9}),
    "fedqp-box": ("fedqp", {"form": "box", "margin": 0.2}),
    "fedqp-joint": ("fedqp", {"form": "joint"}),
    "fedqp-clients": ("fedqp", {"form": "references", "references": "clients", "references_kept": 4}),
    "fedqp-history": ("fedqp", {"form": "references", "references": "history", "references_kept": 2}),
    "fedqp-shifted": ("fedqp", {"form": "nearest", "use": "shifted"}),
    "fedqp-drift": ("fedqp", {"form": "nearest", "use": "drift"}),
}
MUTATING = {"fedmut", "fedqp"}


@cache
def digits():
    return sources.build("digits")


@cache
def small_model() -> Model:
    dataset = digits()
    build = models.build("mlp", dataset.train.inputs.shape[1:], dataset.classes, hidden=(16,))
    return classifier(build, mean=dataset.mean, std=dataset.std, classes=dataset.classes)


def small_algorithm(case: str) -> Algorithm:
    name, options = CASES[case]
    return algorithms.build(name, small_model().loss, optax.sgd(0.05, 0.9), **options)


def small_parts() -> list[np.ndarray]:
    """Sizes 3 to 40: at most 5 local steps of 8."""
    sizes = [3, 40, 8, 25, 5, 33, 16, 4, 9, 38, 12, 20]
    order = np.random.default_rng(1).permutation(len(digits().train.labels))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[:-1]]


def small_work(**changes) -> Workload:
    participation = Participation(**{"cohort": COHORT, **changes})
    return Workload(small_parts(), participation, Local(epochs=1, batch_size=BATCH), seed=0)


def small_plan(first_round: int, rounds: int, lanes: int, capacity: int = ROUNDS, work: Workload | None = None) -> Plan:
    work = work or small_work()
    return plan_chunk(work, first_round, rounds, capacity=capacity, lanes=lanes, evaluate_every=1, last_round=100)


def small_engine(algorithm: Algorithm, parallel: str = "vmap", devices: int = 1) -> Engine:
    dataset = digits()
    return make_engine(
        algorithm,
        small_model(),
        frozen=(),
        train=dataset.train,
        test=cut_test_set(dataset.test, 64),
        seed=0,
        parallel=parallel,
        devices=devices,
    )


def small_state(algorithm: Algorithm, clients: int = CLIENTS) -> FederatedState:
    return init_state(algorithm, small_model().init(jax.random.key(0)), clients)


def run_rounds(
    algorithm: Algorithm,
    engine: Engine,
    lanes: int,
    rounds: int = ROUNDS,
    state: FederatedState | None = None,
    **changes,
) -> tuple[FederatedState, dict]:
    """Runs `rounds` rounds as chunks of ROUNDS from `state` on; returns the last chunk's metrics."""
    state = engine.place_state(small_state(algorithm) if state is None else state)
    work = small_work(**changes)
    start = int(state.round)
    metrics: dict = {}
    for first in range(start, start + rounds, ROUNDS):
        plan = small_plan(first, min(ROUNDS, start + rounds - first), lanes, work=work)
        state, metrics = engine.run(state, engine.place_plan(plan))
    return jax.device_get(state), jax.device_get(metrics)


def worst_difference(first, second) -> float:
    """Largest difference of two trees, relative to the largest entry of each array (or 1)."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(
        (
            float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)), initial=0))
            / max(float(np.max(np.abs(np.asarray(a, float)), initial=0)), 1e-3)
            for a, b in pairs
        ),
        default=0.0,
    )
