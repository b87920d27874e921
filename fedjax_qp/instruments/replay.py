"""The round after a checkpoint, once more, with every client's update looked at.

The cohort, its batches and its keys are a function of (seed, round) and, where the method draws by them, of the clients'
memories, so this is the round that the run had (or would have had). It goes through the engine: only `combine` is
replaced, by one that sees the single uploads, measures the angles between them, and then does what the method does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from fedjax_qp.algorithms.local import Upload
from fedjax_qp.engine import Layout, host_copy
from fedjax_qp.engine.plan import plan_chunk
from fedjax_qp.experiment import Experiment, start_engine
from fedjax_qp.federated import Algorithm, Cohort, FederatedState
from fedjax_qp.quadratic import full_precision
from fedjax_qp.registry import ConfigurationError


class Replayed(NamedTuple):
    """One round, looked at; M' clients reported."""

    server: PyTree  # after the round
    clients: Int[np.ndarray, "R"]  # who reported
    progress: Float[np.ndarray, "R R"]  # cosines between trained − start model: what clients learned
    difference: Float[np.ndarray, "R R"]  # cosines between trained − global model: what the server averages


Replay = Callable[[FederatedState], Replayed]

_PROGRESS, _DIFFERENCE = "conflict/progress", "conflict/difference"


def make_replay(experiment: Experiment, lanes: int) -> Replay:
    """Returns the function that runs the round after a state; compiled when first called, once for all rounds."""
    algorithm = watched(experiment.algorithm)
    compiled: list[Callable] = []

    def replay(state: FederatedState) -> Replayed:
        if not compiled:
            compiled.append(_engine_run(experiment, algorithm, lanes))
        return compiled[0](state)

    return replay


def _engine_run(experiment: Experiment, algorithm: Algorithm, lanes: int) -> Replay:
    experiment = experiment._replace(algorithm=algorithm)
    engine = start_engine([experiment], Layout(lanes))

    def run(state: FederatedState) -> Replayed:
        round = int(state.round)
        work = experiment.work._replace(memories=state.clients)
        plan = plan_chunk(
            [work], round, 1, capacity=1, lanes=lanes, evaluate_every=1, last_round=experiment.config.rounds
        )
        clients, reported = plan.cohorts.clients[0], np.asarray(plan.cohorts.steps[0]) > 0
        # Only the cohort's memories go to the device, and nothing is tested.
        rows = np.arange(len(clients), dtype=np.int32)[None]
        plan = plan._replace(rows=rows, evaluate=np.zeros(1, bool))
        state = host_copy(state._replace(clients=jax.tree.map(lambda leaf: leaf[clients], state.clients)))
        after, metrics = engine.run(engine.place_states([state]), engine.place_plan(plan))
        (found,), (last,) = engine.metrics(metrics), engine.states(after)
        progress, difference = (found[name][0][np.ix_(reported, reported)] for name in (_PROGRESS, _DIFFERENCE))
        return Replayed(last.server, np.asarray(clients)[reported], progress, difference)

    return run


def watched(algorithm: Algorithm) -> Algorithm:
    """The same method, whose metrics hold the cosines between the clients' uploads, [M, M]."""

    def combine_each(server: PyTree, uploads: PyTree, cohort: Cohort, key: Any) -> tuple[PyTree, dict[str, Array]]:
        reports = _reports(uploads)
        found = {
            _PROGRESS: cosine_matrix(reports.direction),
            _DIFFERENCE: cosine_matrix(reports.update.trainable),
        }
        if algorithm.combine_each is not None:
            new, metrics = algorithm.combine_each(server, uploads, cohort, key)
        else:
            assert algorithm.combine is not None
            total = jax.tree.map(lambda leaf: leaf.sum(0), uploads)
            new, metrics = algorithm.combine(server, total, key)
        return new, metrics | found

    return algorithm._replace(combine=None, combine_each=combine_each)


def _reports(uploads: PyTree) -> Upload:
    """The common part of uploads, wherever a method puts it."""

    def is_report(node: Any) -> bool:
        return isinstance(node, Upload)

    found = [leaf for leaf in jax.tree.leaves(uploads, is_leaf=is_report) if is_report(leaf)]
    if not found:
        raise ConfigurationError(
            "conflict: this method's clients report no `algorithms.local.Upload`, so there are no updates to compare: leave "
            "conflict out."
        )
    return found[0]


@full_precision
def cosine_matrix(rows: PyTree) -> Float[Array, "M M"]:
    """Cosines between trees stacked on a leading axis; 0 where one of them is zero."""
    matrices = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)]
    gram = jnp.sum(jnp.stack([matrix @ matrix.T for matrix in matrices]), axis=0)
    norms = jnp.sqrt(jnp.diag(gram))
    product = jnp.outer(norms, norms)
    return jnp.where(product > 0, gram / jnp.where(product > 0, product, 1), 0)


def conflict_share(cosines: Float[np.ndarray, "R R"], clients: Int[np.ndarray, "R"]) -> float:
    """Share of the pairs of different clients whose cosine is negative; NaN without a pair."""
    pairs = _pairs(cosines, clients)
    return float((pairs < 0).mean()) if len(pairs) else float("nan")


def mean_cosine(cosines: Float[np.ndarray, "R R"], clients: Int[np.ndarray, "R"]) -> float:
    """Mean cosine of the pairs of different clients; NaN without a pair."""
    pairs = _pairs(cosines, clients)
    return float(pairs.mean()) if len(pairs) else float("nan")


def _pairs(cosines: Float[np.ndarray, "R R"], clients: Int[np.ndarray, "R"]) -> Float[np.ndarray, "pairs"]:
    """A client that was drawn twice is no pair with itself."""
    first, second = np.triu_indices(len(cosines), 1)
    different = clients[first] != clients[second]
    return cosines[first[different], second[different]]
