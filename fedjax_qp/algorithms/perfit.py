"""PerFIT: personalised federated instruction tuning. Each client searches its own sparse LoRA module.

Source: "Personalized Federated Instruction Tuning via Neural Architecture Search", arXiv 2402.16919: the frozen model's LoRA
space is expanded, each client prunes it by Taylor importance back to the original number of parameters (richer clients
keep more), tunes its sparse module, and the server averages parameter by parameter over the clients that own it.

Our formulation, where the paper's text leaves it open (its code is not public):
  * the scale alpha/rank stays at expansion: masks of ones are FedIT at the expanded rank;
  * B starts at zero, which makes every Taylor score zero: the dense module is warmed up first, for `warm_up` of the client's
    local steps (they count as such); the warm-up's weights are kept;
  * b_i = ρ_i · P/e entries of the mask, exactly (P of the expanded module); ties break by index;
  * an entry that nobody of the round owns keeps its old value; a search starts from the dense average, since a masked one
    could never grow back (with `personal_mix` below 1, from the mix on the entries that the client had);
  * a client that was never sampled has no mask and is served the dense average, over all groups;
  * two models of a client: "personal", m_i ⊙ the average (after aggregation), and "tuned", as it left its own training.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import Expansion, Mix, blend, entry_metrics, training_metrics
from fedjax_qp.algorithms.importance import by_rank, flatten, keep_top, schedule, taylor_scores, unflatten
from fedjax_qp.algorithms.local import LocalState, LocalTraining, Weighting, client_weight
from fedjax_qp.algorithms.sparse import Level, check_levels, masked_training
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params, Preparation
from fedjax_qp.models.language import lora
from fedjax_qp.registry import ConfigurationError

Search = Literal["taylor", "taylor_ranks", "random", "common_random"]
_TAYLOR = ("taylor", "taylor_ranks")
MOST_BATCHES = 100_000  # of one client's search; they are chosen on the host


class PerfitServer(NamedTuple):
    adapters: PyTree  # [G, ...] the dense average of each group of clients
    seed: UInt32[Array, ""]  # of the mask that all share in a "common_random" search
    round: Int[Array, ""]


class PerfitOwn(NamedTuple):
    """What each client gets besides."""

    budget: Int[Array, ""]  # b_i
    group: Int[Array, ""]


class PerfitMemory(NamedTuple):
    """What a client keeps between rounds."""

    adapters: PyTree  # θ_i as the client left them; after a search, the warmed-up ones
    masks: PyTree  # m_i; all True before the first search
    group: Int[Array, ""]
    searched: Bool[Array, ""]  # in this round, before training
    trained: Int[Array, ""]  # number of the last round it took part in, from 1; 0 = never


class PerfitUpload(NamedTuple):
    """Summed over the cohort, each client in the row of its group."""

    owners: PyTree  # [G, ...] n_i m_i
    adapters: PyTree  # [G, ...] n_i m_i θ_i


def check_warm_up(search: Search, warm_up: int, levels: tuple[float, ...], expansion: int) -> None:
    """Checks that scores say something before they prune.

    Raises:
      ConfigurationError: a Taylor search without warm-up.
    """
    if search in _TAYLOR and warm_up == 0 and min(levels) < expansion:
        raise ConfigurationError(
            "algorithm.warm_up = 0: B starts at 0, so every Taylor score is 0 and the search would prune by index. Choose at "
            "least 1, or algorithm.search = 'random'."
        )


def check_batches(warm_up: int, prunings: int, score_batches: int) -> None:
    """Checks that the batches of a search can be laid out.

    Raises:
      ConfigurationError: there are far too many.
    """
    if warm_up + prunings * score_batches > MOST_BATCHES:
        raise ConfigurationError(
            f"algorithm.warm_up = {warm_up} and algorithm.prunings = {prunings} with algorithm.score_batches = "
            f"{score_batches} each ask for more than {MOST_BATCHES:,} batches of every client: choose smaller numbers."
        )


def check_budgets(budgets: list[int], modules: int) -> None:
    """Checks that no module need be empty.

    Raises:
      ConfigurationError: a client keeps fewer entries than there are modules (adapted matrices).
    """
    if min(budgets) < modules:
        raise ConfigurationError(
            f"a client keeps {min(budgets)} adapter entries for {modules} modules: some would be empty. Raise model.rank or "
            "algorithm.levels, or lower algorithm.expansion."
        )


@algorithms.register
def perfit(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    expansion: Expansion = 2,
    prunings: Annotated[int, Field(ge=1, le=1000)] = 4,
    warm_up: Annotated[int, Field(ge=0)] = 10,
    score_batches: Annotated[int, Field(ge=1, le=1000)] = 2,
    search: Search = "taylor",
    search_every: Annotated[int, Field(ge=1)] | None = None,
    levels: tuple[Level, ...] = (1.0,),
    grouped: bool = False,
    personal_mix: Mix = 1.0,
    weighting: Weighting = "size",
) -> Algorithm:
    """Each client searches its own sparse LoRA module (PerFIT), or draws it at random as a control.

    Args:
      expansion: e, factor on the model's rank; the search prunes back to 1/e of the entries.
      prunings: Q, steps of the pruning, each scored anew.
      warm_up: local steps on the dense module before the search; taken off the round's local steps.
      score_batches: batches over which a pruning's gradient is averaged.
      search: "taylor", or as controls of ours "taylor_ranks", which keeps the best ranks whole, and random masks of the same
        size: each client's own, or one for all.
      search_every: rounds between searches; None = once, in the first round a client takes part in.
      levels: ρ, resource levels; client k has level k modulo their number.
      grouped: average only over clients of the same level.
      personal_mix: λ, share of the average in a client's next start; 1 is the paper's.

    Raises:
      ConfigurationError: a level above the expansion, a Taylor search without warm-up, or one of far too many batches.
    """
    check_levels(levels, expansion)
    check_batches(warm_up, prunings, score_batches)
    check_warm_up(search, warm_up, levels, expansion)
    training = masked_training(model, optimizer)
    kinds = sorted(set(levels))
    groups = len(kinds) if grouped else 1
    group_of_level = jnp.array([kinds.index(level) if grouped else 0 for level in levels])

    def dispatch(server: PerfitServer, cohort: Cohort, key: Any) -> tuple[PerfitServer, PerfitOwn, dict]:
        total = int(lora.count(server.adapters)) // groups
        budgets = [round(level * total / expansion) for level in levels]
        check_budgets(budgets, modules=sum(adapter["a"].shape[1] for adapter in server.adapters.values()))
        level = jnp.asarray(cohort.clients) % len(levels)
        return server, PerfitOwn(jnp.array(budgets)[level], group_of_level[level]), {}

    def prepare(
        frozen: PyTree, shared: PerfitServer, own: PerfitOwn, memory: PerfitMemory, batches: Batch, key: Any
    ) -> PerfitMemory:
        dense = mixed(of_group(shared, own.group), memory)
        warm_up_key, search_key = jax.random.split(key)
        warmed = _warm_up(training, frozen, dense, jax.tree.map(lambda leaf: leaf[:warm_up], batches), warm_up_key)
        if search in _TAYLOR:
            counts = schedule(int(lora.count(dense)), own.budget, prunings)
            scored = jax.tree.map(lambda leaf: leaf[warm_up:], batches)
            masks = _search(model, frozen, warmed, scored, counts, whole_ranks=search == "taylor_ranks")
        else:
            common = jax.random.key(shared.seed)
            masks = _random_masks(dense, own.budget, search_key if search == "random" else common)
        adapters = lora.apply_masks(warmed, masks)
        return memory._replace(adapters=adapters, masks=masks, group=own.group, searched=jnp.array(True))

    def of_group(server: PerfitServer, group: Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[group], server.adapters)

    def over_groups(server: PerfitServer) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.mean(0), server.adapters)

    def mixed(average: PyTree, memory: PerfitMemory) -> PyTree:
        """λθ̄ + (1−λ)θ_i where the client has entries, θ̄ elsewhere."""
        mix = jnp.where(memory.trained == 0, 1.0, personal_mix)
        blended = blend(average, memory.adapters, mix)
        return jax.tree.map(jnp.where, memory.masks, blended, average)

    def personal(server: PerfitServer, memory: PerfitMemory) -> Params:
        """m_i ⊙ (λθ̄ + (1−λ)θ_i): the client after the last aggregation, and its next start."""
        never = memory.trained == 0  # its group is not known either
        everybody, group = over_groups(server), of_group(server, memory.group)
        average = jax.tree.map(lambda all_, some: jnp.where(never, all_, some), everybody, group)
        return Params(lora.apply_masks(mixed(average, memory), memory.masks), (), memory.masks)

    def begin(shared: PerfitServer, memory: PerfitMemory) -> PyTree:
        """Right after a search a client goes on from its warm-up."""
        average = personal(shared, memory).trainable
        return jax.tree.map(lambda own, other: jnp.where(memory.searched, own, other), memory.adapters, average)

    def start(shared: PerfitServer, own: PerfitOwn, memory: PerfitMemory, key: Any) -> LocalState:
        return training.start(Params(begin(shared, memory), (), memory.masks))

    def step(frozen: PyTree, shared: PerfitServer, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        return training.step(frozen, carry, batch, key)

    def finish(shared: PerfitServer, carry: LocalState, client: Client) -> tuple[PerfitUpload, PerfitMemory, dict]:
        adapters, masks, memory = carry.params.trainable, carry.params.masks, client.memory
        row = client_weight(weighting, client) * jax.nn.one_hot(client.own.group, groups)

        def by_group(leaf: Array) -> Array:
            return row.reshape(-1, *(1,) * leaf.ndim) * leaf

        upload = PerfitUpload(jax.tree.map(by_group, masks), jax.tree.map(by_group, adapters))
        metrics = training_metrics(carry, begin(shared, memory))
        metrics |= mask_metrics(masks, memory.searched)
        memory = memory._replace(adapters=adapters, searched=jnp.array(False), trained=shared.round + 1)
        return upload, memory, metrics

    def combine(server: PerfitServer, total: PerfitUpload, key: Any) -> tuple[PerfitServer, dict]:
        def mean(old: Array, owners: Array, summed: Array) -> Array:
            return jnp.where(owners > 0, summed / jnp.where(owners > 0, owners, 1), old)

        adapters = jax.tree.map(mean, server.adapters, total.owners, total.adapters)
        owned = (flatten(total.owners) > 0).mean()
        update = jax.tree.map(jnp.subtract, adapters, server.adapters)
        metrics = {"update/norm": optax.tree.norm(update), "mask/owned_share": owned}
        return server._replace(adapters=adapters, round=server.round + 1), metrics

    def serve(server: PerfitServer, memory: PerfitMemory | tuple) -> Params:
        if isinstance(memory, PerfitMemory):
            return personal(server, memory)
        return Params(over_groups(server), ())

    def tuned(server: PerfitServer, memory: PerfitMemory) -> Params:
        """A client as it left its own training; one that never took part is served the dense average."""
        served = personal(server, memory)
        never = memory.trained == 0
        return served._replace(
            trainable=jax.tree.map(lambda s, o: jnp.where(never, s, o), served.trainable, memory.adapters)
        )

    def init_server(params: Params, clients: int) -> PerfitServer:
        adapters = jax.tree.map(lambda leaf: jnp.stack([leaf] * groups), params.trainable)
        # The initial A is as random as the run's seed: the one thing here that knows it and is the same for all clients.
        bits = jax.lax.bitcast_convert_type(flatten(params.trainable).astype(jnp.float32), jnp.uint32)
        seed = bits.sum(dtype=jnp.uint32)  # of integers, so the same in any order
        return PerfitServer(adapters, seed, jnp.zeros((), jnp.int32))

    def init_client(params: Params) -> PerfitMemory:
        everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params.trainable)
        number = jnp.zeros((), jnp.int32)
        return PerfitMemory(params.trainable, everything, number, jnp.array(False), number)

    return Algorithm(
        init_server=init_server,
        init_client=init_client,
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine=combine,
        serve=serve,
        prepare=prepare,
        preparation=Preparation(warm_up + prunings * score_batches, search_every, warm_up, "warm_up"),
        tuned=tuned,
        tunes_adapters=True,
        rank_factor=expansion,
        unused=() if search in _TAYLOR else ("prunings", "score_batches"),
    )


def _warm_up(training: LocalTraining, frozen: PyTree, dense: PyTree, batches: Batch, key: Any) -> PyTree:
    """A few plain steps on the dense module, so that B leaves zero and Taylor scores say something."""

    def step(state: LocalState, indexed: tuple) -> tuple[LocalState, None]:
        index, batch = indexed
        return training.step(frozen, state, batch, jax.random.fold_in(key, index)), None

    count = len(batches.mask)
    final, _ = jax.lax.scan(step, training.start(Params(dense, ())), (jnp.arange(count), batches))
    return final.params.trainable


def _search(
    model: Model, frozen: PyTree, adapters: PyTree, batches: Batch, counts: Int[Array, "Q"], *, whole_ranks: bool
) -> PyTree:
    """Prunes in Q steps, each scored on its own batches, with the mask as it then is and without dropout.

    A factor common to all scores decides nothing, so gradients are summed, not averaged.
    """
    prunings = len(counts)
    by_pruning = jax.tree.map(lambda leaf: leaf.reshape(prunings, -1, *leaf.shape[1:]), batches)

    def gradient_sum(masks: PyTree, some: Batch) -> PyTree:
        def loss(theta: PyTree, batch: Batch) -> Float[Array, ""]:
            return model.loss(frozen, Params(theta, (), masks), batch, None)[0]

        def add(total: PyTree, batch: Batch) -> tuple[PyTree, None]:
            gradient = jax.grad(loss)(lora.apply_masks(adapters, masks), batch)
            return jax.tree.map(jnp.add, total, gradient), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapters), some)[0]

    def prune(flat: Bool[Array, "P"], turn: tuple) -> tuple[Bool[Array, "P"], None]:
        count, some = turn
        gradient = gradient_sum(unflatten(flat, adapters), some)
        scores = taylor_scores(adapters, gradient)
        return keep_top(by_rank(scores, adapters) if whole_ranks else scores, flat, count), None

    flat, _ = jax.lax.scan(prune, jnp.ones(int(lora.count(adapters)), bool), (counts, by_pruning))
    return unflatten(flat, adapters)


def _random_masks(like: PyTree, budget: Int[Array, ""], key: Any) -> PyTree:
    """Masks with as many entries as a search leaves, at random places; of two budgets one holds the other's."""
    scores = jax.random.uniform(key, (int(lora.count(like)),))
    return unflatten(keep_top(scores, jnp.ones(scores.shape, bool), budget), like)


def mask_metrics(masks: PyTree, searched: Bool[Array, ""]) -> dict[str, Array]:
    """How many entries a client trains, what they can express, how many of them cannot matter, and what it sends.

    b values travel each way; in a round with a search the dense average down instead, and the mask's bits up besides.
    """
    kept, dead = lora.count(masks), lora.dead_entries(masks)
    total = sum(mask.size for mask in jax.tree.leaves(masks))
    bits = -(-total // 8)
    metrics = entry_metrics(kept, sent=kept, received=jnp.where(searched, total, kept), most=total + bits)
    metrics["client/upload_bytes"] += jnp.where(searched, bits, 0)
    empty = sum(layers.sum() for layers in lora.empty_modules(masks).values())
    metrics |= {"client/dead_entries": dead.a + dead.b, "client/empty_modules": jnp.asarray(empty)}
    return metrics | {"client/product_share": lora.product_share(masks)}
