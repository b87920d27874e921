"""The vocabulary of the simulator and the shape of a round. Read this file first.

A round is server → clients → server:

    shared, own, metrics = dispatch(server, cohort, key)       what all clients get, and what each one gets
    carry = start(shared, own, memory, key)                    a client begins ...
    carry = step(frozen, shared, carry, batch, key)            ... trains on one batch after another ...
    upload, memory, metrics = finish(shared, carry, client)    ... and reports; `client` holds its `own` and `memory`
    server, metrics = combine(server, total, key)              `total` is the sum of the uploads

A method with heavy work of its own before training (PerFIT's search) adds

    memory = prepare(frozen, shared, own, memory, batches, key)        in the rounds that its `Preparation` names

An algorithm is these pure functions and nothing else. It never sees lanes, devices or padding: `engine` interleaves the
clients of a cohort, adds up their uploads and carries their memories. A method that must see every single upload gives
`combine_each` in place of `combine`, one that draws its own cohorts a `Sampling`.

The way to write a method is to take one that exists and to replace the functions in which it differs, in a file of
`algorithms/`. `optimizer` is the clients' optax transformation; keyword-only arguments with types are the method's options:

    import jax.numpy as jnp
    import optax

    from fedjax_qp.algorithms import algorithms
    from fedjax_qp.algorithms.averaging import fedavg
    from fedjax_qp.federated import Algorithm

    @algorithms.register
    def clipped_average(model, optimizer, *, radius: float = 1.0) -> Algorithm:
        '''FedAvg in which no client moves the model by more than `radius`.'''
        average = fedavg(model, optimizer, weighting="uniform")

        def finish(shared, carry, client):
            upload, memory, metrics = average.finish(shared, carry, client)
            share = jnp.minimum(1, radius / metrics["client/update_norm"])
            update = upload.update._replace(trainable=optax.tree.scale(share, upload.update.trainable))
            return upload._replace(update=update), memory, metrics

        return average._replace(finish=finish)

Metrics named `client/…` are per client; `client/loss` and, where a method has it, `update/norm` guard against divergence. A
client's losses (`client/…loss`) are means over the examples of all its steps, or over whatever else the model's loss is a
mean of; `client/counted` is their number, the weight of these losses in a round's mean over clients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedjax_qp.watch import Watch


class Params(NamedTuple):
    """A model's arrays. Algorithms optimise, mutate and mask `trainable` only; `statistics` are averaged."""

    trainable: PyTree
    statistics: PyTree  # batch-norm running means and variances; () where there are none
    masks: PyTree = ()  # which entries of `trainable` this client has: the same tree of bools; () where it has all


class Batch(NamedTuple):
    """Examples of one step; a padded example has mask False and must not influence anything."""

    examples: PyTree  # arrays [B, ...]
    mask: Bool[Array, "B"]


class Parts(NamedTuple):
    """A classifier of examples that have `labels`, cut before its last layer."""

    features: Callable  # (Params, Batch, train=bool) -> (features [B, F], new statistics)
    classify: Callable  # (Params, features [B, F]) -> logits [B, classes]
    width: int  # F
    classes: int


class Model(NamedTuple):
    """What is trained, as pure functions. `frozen` holds weights that no client changes (`()` where there are none)."""

    init: Callable  # (key) -> Params
    loss: Callable  # (frozen, Params, Batch, key) -> (mean loss over the mask, new statistics)
    evaluate: Callable  # (frozen, Params, Batch) -> dict of sums over the mask
    merge: Callable | None = None  # (frozen, trainable) -> frozen with the adapters folded in, where there are adapters
    parts: Parts | None = None  # of a classifier, for methods that work on what its last layer sees
    counted: Callable | None = None  # (Batch) -> number of what `loss` is the mean of; None = the examples in the mask
    scores: Callable | None = (
        None  # (sums over a whole test, on the host) -> dict of numbers; None = means of further sums
    )


class Cohort(NamedTuple):
    """The M clients of one round. A client with zero steps dropped out: it receives, but never reports."""

    clients: Int[Array | np.ndarray, "M"]  # indices into the federation, 0 … K−1
    sizes: Float[Array | np.ndarray, "M"]  # number of training examples
    steps: Int[Array | np.ndarray, "M"]  # local steps the client will take


class Client(NamedTuple):
    """What `finish` may need to know of one client."""

    index: Int[Array, ""]
    size: Float[Array, ""]
    steps: Int[Array, ""]
    own: PyTree = ()  # what `dispatch` gave it
    memory: PyTree = ()  # as its training found it


class FederatedState(NamedTuple):
    """Everything that changes during a run, and exactly what a checkpoint holds."""

    round: Int[Array, ""]  # number of finished rounds
    server: PyTree
    clients: PyTree  # client memories, leading axis K (or the rows in use, see `engine`); () where there are none


class Preparation(NamedTuple):
    """When a method wants `prepare` to run, and on how much data."""

    batches: int  # batches that each client's `prepare` gets
    every: int | None = None  # rounds after which it runs anew; None = once, in the first round a client takes part in
    charged: int = 0  # local steps that it counts for, taken off the same round's training
    charged_by: str = ""  # the method's option that says how many, for messages


class Sampling(NamedTuple):
    """How a method draws its cohorts, where it does not draw them uniformly without replacement. On the host, in numpy."""

    draw: Callable  # (sizes [K], memories [K, ...], M, generator) -> clients [M], possibly the same more than once
    reads_memories: bool = False  # reads the last round's memories, which forces one round per chunk


def no_memory(params: Params) -> tuple:
    """Clients keep nothing between rounds."""
    return ()


def send_model(server: PyTree, cohort: Cohort, key: Key[Array, ""]) -> tuple[Params, tuple, dict]:
    """All clients get the server's model, and nothing else."""
    return serve_model(server, ()), (), {}


def serve_model(server: PyTree, memory: PyTree) -> Params:
    """The server's model: its `params`, or the server itself where it is nothing more."""
    return server if isinstance(server, Params) else server.params


class Algorithm(NamedTuple):
    """One federated method as pure functions; see the module docstring for the order of the calls.

    Shapes: `own`, memories, uploads and metrics of `start`, `step` and `finish` are those of one client; `dispatch`
    returns `own` with a leading axis [M]. Metrics are flat dicts of arrays whose shapes do not depend on the round.
    """

    init_server: Callable  # (Params, number of clients in the federation) -> server
    start: Callable  # (shared, own, memory, key) -> carry
    step: Callable  # (frozen, shared, carry, Batch, key) -> carry
    finish: Callable  # (shared, carry, Client) -> (upload, memory, metrics)
    init_client: Callable = no_memory  # (Params) -> memory
    dispatch: Callable = send_model  # (server, Cohort, key) -> (shared, own[M, ...], metrics)
    serve: Callable = serve_model  # (server, memory) -> Params to evaluate a client with
    combine: Callable | None = None  # (server, total, key) -> (server, metrics)
    combine_each: Callable | None = None  # (server, uploads[M, ...], Cohort, key) -> (server, metrics)
    prepare: Callable | None = None  # (frozen, shared, own, memory, Batch[batches, B], key) -> memory
    preparation: Preparation | None = None  # with `prepare`
    tuned: Callable | None = None  # (server, memory) -> Params as the client itself left them, where memory keeps them
    sampling: Sampling | None = None
    tunes_adapters: bool = False  # of a language model; nothing else has what it works on
    rank_factor: int = 1  # on the rank (and alpha) of a language model's adapters
    plain_sgd: bool = False  # its equations take local steps without momentum for granted
    unused: tuple[str, ...] = ()  # its options that have no effect beside the others
    step_sizes: tuple[str, ...] = ()  # its options to lower where training diverges
    watch: tuple[Watch, ...] = ()  # its metrics that users should see


FIRST_ROUND = 2**32 - 1  # in the place of round 0, see `round_keys`


def initial_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of the initial model, from the run's own."""
    return jax.random.fold_in(key, 0)


class RoundKeys(NamedTuple):
    """The three independent streams of randomness of one round."""

    dispatch: Key[Array, ""]
    clients: Key[Array, ""]
    combine: Key[Array, ""]


def round_keys(key: Key[Array, ""], round: Int[Array, ""]) -> RoundKeys:
    """Keys are a function of (seed, round) alone, so that a resumed run draws what the uninterrupted one would have.

    Splitting a key gives what folding in 0, 1, … gives, and the model was initialised from `initial_key` by such folds. So
    the first round takes a number that is no round's.
    """
    number = jnp.where(round == 0, jnp.uint32(FIRST_ROUND), jnp.asarray(round, jnp.uint32))
    return RoundKeys(*jax.random.split(jax.random.fold_in(key, number), 3))


PREPARATION = 2**32 - 1  # in the place of the local step: the key of a client's `prepare`


def client_key(key: Key[Array, ""], client: Int[Array, ""], local_step: Int[Array, ""] | int) -> Key[Array, ""]:
    """A function of the client and its own step count: never of slot, lane or device."""
    return jax.random.fold_in(jax.random.fold_in(key, client), local_step)


def init_state(algorithm: Algorithm, params: Params, clients: int) -> FederatedState:
    """Returns the state before round 0; copies, so that the caller's arrays survive donation.

    Args:
      params: initial model.
      clients: K, the number of clients in the federation.
    """
    params = jax.tree.map(jnp.array, params)
    memory = algorithm.init_client(params)
    # On the host: with `client_store: host` all K memories never fit the device at once.
    memories = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], clients, axis=0), memory)
    server = jax.tree.map(jnp.array, algorithm.init_server(params, clients))
    return FederatedState(jnp.zeros((), jnp.int32), server, memories)


def federated_round(
    method: Callable[[PyTree], Algorithm],
    each: Callable[[Callable], Callable],
    prepare_clients: Callable,
    run_clients: Callable,
    state: FederatedState,
    cohort: Cohort,
    rows: Int[Array, "X M"],
    settings: PyTree,
    key: Key[Array, "X"],
) -> tuple[FederatedState, dict[str, Array]]:
    """One round: the whole of federated learning in a few lines.

    Several runs of one method may share a program (`runs.programs`); all arrays have a leading axis of runs, [X]. A run alone
    is one of one.

    Args:
      method: `(settings of one run) -> Algorithm`.
      each: turns a function of one run into one of all of them.
      prepare_clients: `(shared, own, memories, key) -> memories`, the engine's parallel `prepare` of those who are due.
      run_clients: `(shared, own, memories, key) -> (collected, memories, metrics)`, the engine's parallel training of
        the cohorts; `collected` is the sum of a run's uploads, or all of them [X, M, ...] for `combine_each`.
      rows: where each cohort member's memory lies in `state.clients`.

    Returns:
      The next state, and a flat dict of metrics (per-client ones have shape [X, M]).
    """

    def of_method(name: str) -> Callable:
        return each(lambda settings, *arguments: getattr(method(settings), name)(*arguments))

    kind = method(jax.tree.map(lambda values: values[0], settings))  # which functions there are is the same for all
    keys = each(round_keys)(key, state.round)
    shared, own, dispatch_metrics = of_method("dispatch")(settings, state.server, cohort, keys.dispatch)
    memories = each(lambda memories, rows: jax.tree.map(lambda leaf: leaf[rows], memories))(state.clients, rows)
    if kind.prepare is not None:
        memories = prepare_clients(shared, own, memories, keys.clients)
    collected, memories, client_metrics = run_clients(shared, own, memories, keys.clients)
    if kind.combine_each is not None:
        server, metrics = of_method("combine_each")(settings, state.server, collected, cohort, keys.combine)
    else:
        assert kind.combine is not None, "an algorithm needs combine or combine_each"
        server, metrics = of_method("combine")(settings, state.server, collected, keys.combine)

    def close(state: FederatedState, server: PyTree, memories: PyTree, cohort: Cohort, rows: Array) -> FederatedState:
        # A round in which everybody dropped out must not move the server, not even by its momentum.
        reported = (cohort.steps > 0).any()
        server = jax.tree.map(lambda new, old: jnp.where(reported, new, old), server, state.server)
        clients = jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), state.clients, memories)
        return FederatedState(state.round + 1, server, clients)

    state = each(close)(state, server, memories, cohort, rows)
    return state, {**dispatch_metrics, **client_metrics, **metrics}
