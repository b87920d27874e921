"""Two small federations that compile in a second or two: what the laws of methods are checked on.

Images: real 8×8 digits, an MLP, twelve clients of very different size. Language: see `contract.language`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Numpy arrays stand in for JAX arrays, and named tuples are made from leaves.

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from fedjax_qp.config import Local, Participation
from fedjax_qp.contract import language as small_language
from fedjax_qp.data import sources
from fedjax_qp.data.dataset import Dataset
from fedjax_qp.engine import Data, Engine, Layout, PersonalTests, Runs, TestSet, cut_test_set, make_engine
from fedjax_qp.engine.plan import Plan, Workload, plan_chunk
from fedjax_qp.federated import (
    PREPARATION,
    Algorithm,
    Batch,
    Client,
    Cohort,
    FederatedState,
    Model,
    client_key,
    init_state,
    round_keys,
)
from fedjax_qp.models import models
from fedjax_qp.models.classifier import classifier

CLIENTS, COHORT, BATCH, ROUNDS = 12, 5, 8, 2


class Federation(NamedTuple):
    """All that a run needs besides the method."""

    model: Model
    optimizer: optax.GradientTransformation
    frozen: PyTree
    train: PyTree
    test: TestSet
    personal: PersonalTests | None
    parts: list[np.ndarray]
    batch: int


@cache
def digits() -> Dataset:
    """The images of both the laws and the tests."""
    return sources.build("digits")


@cache
def small_model() -> Model:
    dataset = digits()
    build = models.build("mlp", dataset.train.inputs.shape[1:], dataset.classes, hidden=(16,))
    return classifier(build, mean=dataset.mean, std=dataset.std, classes=dataset.classes)


@cache
def images() -> Federation:
    dataset = digits()
    return Federation(
        model=small_model(),
        optimizer=optax.sgd(0.05, 0.9),
        frozen=(),
        train=dataset.train,
        test=cut_test_set(dataset.test, 64),
        personal=None,
        parts=small_parts(),
        batch=BATCH,
    )


@cache
def language(expansion: int = 1) -> Federation:
    """The model's rank is `expansion` times what it would be, as the algorithm's option of that name asks for."""
    ends = np.cumsum(small_language.SIZES)
    return Federation(
        model=small_language.language(expansion),
        optimizer=small_language.OPTIMIZER,
        frozen=small_language.base_weights(),
        train=small_language.training_set(),
        test=cut_test_set(small_language.common_test(), 8),
        personal=small_language.personal_tests(),
        parts=[np.arange(end - size, end) for size, end in zip(small_language.SIZES, ends, strict=True)],
        batch=4,
    )


def small_parts() -> list[np.ndarray]:
    """Sizes 3 to 40: at most 5 local steps of 8."""
    sizes = [3, 40, 8, 25, 5, 33, 16, 4, 9, 38, 12, 20]
    order = np.random.default_rng(1).permutation(len(digits().train.labels))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[:-1]]


def small_work(federation: Federation | None = None, algorithm: Algorithm | None = None, **changes) -> Workload:
    """What the algorithm asks to prepare is part of the work."""
    federation = federation or images()
    participation = Participation(**{"cohort": COHORT, **changes})
    local = Local(epochs=1, batch_size=federation.batch)
    preparation = algorithm.preparation if algorithm is not None else None
    return Workload(federation.parts, participation, local, seed=0, preparation=preparation)


def small_plan(first_round: int, rounds: int, lanes: int, capacity: int = ROUNDS, work: Workload | None = None) -> Plan:
    work = work or small_work()
    return plan_chunk([work], first_round, rounds, capacity=capacity, lanes=lanes, evaluate_every=1, last_round=100)


def small_engine(
    algorithm: Algorithm,
    parallel: str = "vmap",
    devices: int = 1,
    federation: Federation | None = None,
    data_store: str = "device",
) -> Engine:
    federation = federation or images()
    return make_engine(
        lambda settings: algorithm,
        federation.model,
        Data(federation.frozen, federation.train, federation.test, federation.personal),
        Layout(devices, devices, parallel=parallel),
        Runs({}, jax.random.key(0)[None]),
        examples_on_host=data_store == "host",
    )


def small_state(
    algorithm: Algorithm, clients: int | None = None, federation: Federation | None = None
) -> FederatedState:
    federation = federation or images()
    return init_state(algorithm, federation.model.init(jax.random.key(0)), clients or len(federation.parts))


def run_rounds(
    algorithm: Algorithm,
    engine: Engine,
    lanes: int,
    rounds: int = ROUNDS,
    state: FederatedState | None = None,
    federation: Federation | None = None,
    **changes,
) -> tuple[FederatedState, dict]:
    """Runs `rounds` rounds as chunks of ROUNDS from `state` on; returns the last chunk's metrics."""
    state = small_state(algorithm, federation=federation) if state is None else state
    work = small_work(federation, algorithm, **changes)
    start = int(state.round)
    state, metrics = engine.place_states([state]), {}
    for first in range(start, start + rounds, ROUNDS):
        plan = small_plan(first, min(ROUNDS, start + rounds - first), lanes, work=work)
        state, metrics = engine.run(state, engine.place_plan(plan))
    return jax.device_get(state), jax.device_get(metrics)


class Played(NamedTuple):
    """A run without the engine."""

    server: PyTree
    memories: list[PyTree]  # of all clients
    metrics: list[dict[int, dict]]  # per round and client, what `finish` reported
    uploads: list[dict[int, PyTree]]  # per round and client
    servers: list[PyTree]  # before each round


def play(algorithm: Algorithm, federation: Federation, rounds: int = ROUNDS, **changes) -> Played:
    """The round as `federated` describes it: one client after another, in a Python loop, without engine or evaluation."""
    work = small_work(federation, algorithm, **changes)
    plan = small_plan(0, rounds, lanes=1, capacity=rounds, work=work)
    params = federation.model.init(jax.random.key(0))
    server, fresh = algorithm.init_server(params, len(federation.parts)), algorithm.init_client(params)
    memories = [fresh] * len(federation.parts)
    step, start, finish = jax.jit(algorithm.step), jax.jit(algorithm.start), jax.jit(algorithm.finish)
    prepare = jax.jit(algorithm.prepare) if algorithm.prepare is not None else None
    combine = jax.jit(algorithm.combine if algorithm.combine_each is None else algorithm.combine_each)
    played = Played(server, memories, [], [], [])

    def batch(indices: np.ndarray) -> Batch:
        return Batch(jax.tree.map(lambda leaf: leaf[np.maximum(indices, 0)], federation.train), indices >= 0)

    for number in range(rounds):
        keys = round_keys(jax.random.key(0), jnp.int32(number))
        cohort = Cohort(*(leaf[number] for leaf in plan.cohorts))
        shared, own, _ = algorithm.dispatch(server, cohort, keys.dispatch)
        played.servers.append(server)
        reports, uploads, metrics = {}, {}, {}
        due = plan.preparations.slots[0, number].tolist()
        for slot in range(len(cohort.clients)):
            client, mine = int(cohort.clients[slot]), jax.tree.map(lambda leaf, s=slot: leaf[s], own)
            if slot in due:
                assert prepare is not None
                batches = batch(plan.preparations.examples[0, number, due.index(slot)])
                key = client_key(keys.clients, client, PREPARATION)
                memories[client] = prepare(federation.frozen, shared, mine, memories[client], batches, key)
            carry = start(shared, mine, memories[client], client_key(keys.clients, client, 0))
            for place, indices in enumerate(plan.lanes.examples[0, number][plan.lanes.slots[0, number] == slot]):
                key = client_key(keys.clients, client, place + 1)
                carry = step(federation.frozen, shared, carry, batch(indices), key)
            facts = Client(*(leaf[slot] for leaf in cohort), mine, memories[client])
            reports[slot], memories[client], metrics[client] = finish(shared, carry, facts)
            uploads[client] = reports[slot]
        in_order = [reports[slot] for slot in range(len(cohort.clients))]
        if algorithm.combine_each is not None:
            every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)
            server, _ = combine(server, every, cohort, keys.combine)
        else:
            total = jax.tree.map(lambda *leaves: sum(leaves), *in_order)
            server, _ = combine(server, total, keys.combine)
        played.metrics.append(metrics)
        played.uploads.append(uploads)
    return played._replace(server=server)


def worst_difference(first, second) -> float:
    """Largest difference of two trees, relative to the largest entry of each array (or 0.001); NaN where an array has one."""

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        return np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(a), initial=0), 1e-3)

    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    found = [difference(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs]
    return float(np.max(found, initial=0))  # unlike Python's max, it does not lose a NaN
