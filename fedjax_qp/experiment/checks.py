"""What a run asks of its clients, its memory and its method, checked before any compute. All raise a ConfigurationError."""

import math

import jax
import psutil
from jaxtyping import PyTree

from fedjax_qp.config import Config
from fedjax_qp.engine.layout import fewest_lanes
from fedjax_qp.engine.plan import Workload, fewest_steps, plan_bytes
from fedjax_qp.federated import Algorithm, Cohort, Model, Preparation
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.tasks import Task


def check_cohort(config: Config, clients: int) -> None:
    if config.participation.cohort > clients:
        raise ConfigurationError(
            f"participation.cohort = {config.participation.cohort} is more than the {clients} clients there are: choose 1 to "
            f"{clients}, or more clients in the partition."
        )


def check_dispatch(model: Model, algorithm: Algorithm, clients: int, members: int) -> None:
    """Traces the dispatch on shapes alone: limits that depend on the cohort's size show up now, not in round 1."""

    def dispatch(key: jax.Array) -> tuple:
        number, size = jax.numpy.ones(members, int), jax.numpy.ones(members)
        server = algorithm.init_server(model.init(key), clients)
        return algorithm.dispatch(server, Cohort(number, size, number), key)

    jax.eval_shape(dispatch, jax.random.key(0))


def check_state(config: Config, model: Model, algorithm: Algorithm, clients: int) -> None:
    """Traces the first state on shapes alone, so that one that fits no memory is never made."""

    def state(key: jax.Array) -> tuple:
        params = model.init(key)
        return algorithm.init_server(params, clients), algorithm.init_client(params)

    server, client = jax.eval_shape(state, jax.random.key(0))
    needed = _bytes(server) + clients * _bytes(client)
    if needed > (available := psutil.virtual_memory().total):
        raise ConfigurationError(
            f"model = {config.model.name!r} with algorithm = {config.algorithm.name!r} takes {_gibibytes(_bytes(server))} on "
            f"the server and {_gibibytes(_bytes(client))} for each of {clients} clients, but this machine has "
            f"{_gibibytes(available)}: choose a smaller model, or fewer clients."
        )


def check_plan(config: Config, work: Workload) -> None:
    """A plan of absurd size would end in a MemoryError when the run has begun."""
    rounds, local = config.engine.rounds_per_chunk, config.local
    needed = plan_bytes(work, rounds, fewest_lanes(config.engine).lanes)
    if needed > (available := psutil.virtual_memory().total):
        raise ConfigurationError(
            f"the plan of a chunk takes {_gibibytes(needed)}, but this machine has {_gibibytes(available)}: lower "
            f"engine.rounds_per_chunk = {rounds}, local.epochs = {local.epochs} or local.batch_size = {local.batch_size}."
        )


def check_sampling(config: Config, task: Task, algorithm: Algorithm) -> None:
    """A cohort that depends on the round before cannot be drawn again."""
    if algorithm.sampling is not None and algorithm.sampling.reads_memories and task.personal is not None:
        raise ConfigurationError(
            f"algorithm = {config.algorithm.name!r} draws cohorts that cannot be drawn again, but this task reports on "
            "clients by whether they have taken part: choose an algorithm that does not draw by what clients sent"
            f"{'' if task.language is not None else ', or partition.test = common'}."
        )


def check_preparation(work: Workload) -> None:
    """A preparation counts as local steps, so it must leave some: otherwise the method would work more than others."""
    preparation = work.preparation
    if preparation is None or preparation.charged == 0:
        return
    fewest, client = fewest_steps(work)
    if preparation.charged >= fewest:
        raise ConfigurationError(
            f"algorithm.{preparation.charged_by} = {preparation.charged} takes all {fewest} local steps of client {client}: "
            f"choose 0 to {fewest - 1}, or more local.epochs or a smaller local.batch_size."
        )


def check_accumulation(work: Workload) -> None:
    """A client with fewer steps than gradients to average would never move, nor would its preparation."""
    every, preparation = work.local.accumulate, work.preparation or Preparation(0)
    if 0 < preparation.charged < every:
        raise ConfigurationError(
            f"local.accumulate = {every} leaves nothing of the {preparation.charged} steps of "
            f"algorithm.{preparation.charged_by}: choose 1 to {preparation.charged} here, or at least {every} there."
        )
    fewest, client = fewest_steps(work)
    left = fewest - preparation.charged
    if every > left:
        raise ConfigurationError(
            f"local.accumulate = {every} is more than the {left} local steps of client {client}: choose 1 to {left}, or more "
            "local.epochs or a smaller local.batch_size."
        )


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
