"""Methods on the shapes of a model of 7B parameters: what is counted there does not fit into 24 or 31 bits everywhere."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.adapters import bytes_of, entry_metrics
from fedjax_qp.algorithms.importance import schedule
from fedjax_qp.algorithms.perfit import mask_metrics
from fedjax_qp.data.text.sequences import Sequences
from fedjax_qp.federated import Batch, Client, Cohort, Model
from fedjax_qp.models.language import lora
from fedjax_qp.models.language.llama import abstract_weights
from fedjax_qp.models.language.model import language_model
from fedjax_qp.models.language.pretrained_config import read_config
from fedjax_qp.registry import ConfigurationError

BASE = read_config(Path(__file__).parents[2] / "configs" / "llama7b")
ALL = tuple(BASE.projections())
MEMBERS, LENGTH, RANK = 10, 16, 8
FOR_CLASSIFIERS = {"fedgen", "moon"}
VARIANTS = [
    *((name, {}) for name in algorithms.names() if name not in FOR_CLASSIFIERS),
    *(("perfit", {"search": search}) for search in ("taylor_ranks", "random", "common_random")),
    ("perfit", {"levels": (1.0, 1.5), "grouped": True, "search_every": 2, "personal_mix": 0.5}),
    ("fedit", {"expansion": 2, "proximal": 0.1, "personal_mix": 0.5}),
    ("fedit", {"local_after": 3}),
]


@cache
def model(targets: tuple[str, ...], expansion: int) -> Model:
    made = language_model(BASE, rank=expansion * RANK, alpha=16.0, dropout=0.05, targets=targets)
    return made._replace(loss=jax.jit(made.loss), evaluate=jax.jit(made.evaluate))  # each is traced once


def shapes(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch(*leading: int) -> Any:
    token = shapes(*leading, 2, LENGTH)
    return Batch(
        Sequences(token, token, token, shapes(*leading, 2, LENGTH, dtype=bool)), shapes(*leading, 2, dtype=bool)
    )


def metrics_of_a_round(algorithm, large: Model) -> dict:
    """Traces every function of a method, in the order of a round."""
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    frozen = abstract_weights(BASE, "bfloat16")
    params = jax.eval_shape(large.init, key)
    memory = jax.eval_shape(algorithm.init_client, params)
    server = jax.eval_shape(lambda params: algorithm.init_server(params, MEMBERS), params)
    cohort = Cohort(shapes(MEMBERS), shapes(MEMBERS, dtype=jnp.float32), shapes(MEMBERS))
    shared, every_own, _ = jax.eval_shape(algorithm.dispatch, server, cohort, key)
    own = jax.tree.map(lambda leaf: shapes(*leaf.shape[1:], dtype=leaf.dtype), every_own)
    if algorithm.prepare is not None:
        memory = jax.eval_shape(
            algorithm.prepare, frozen, shared, own, memory, batch(algorithm.preparation.batches), key
        )
    carry = jax.eval_shape(algorithm.start, shared, own, memory, key)
    carry = jax.eval_shape(algorithm.step, frozen, shared, carry, batch(), key)
    client = Client(shapes(), shapes(dtype=jnp.float32), shapes(), own, memory)
    upload, memory, metrics = jax.eval_shape(algorithm.finish, shared, carry, client)
    if algorithm.combine is not None:
        server, _ = jax.eval_shape(algorithm.combine, server, upload, key)
    else:
        uploads = jax.tree.map(lambda leaf: shapes(MEMBERS, *leaf.shape, dtype=leaf.dtype), upload)
        server, _ = jax.eval_shape(algorithm.combine_each, server, uploads, cohort, key)
    for view in (algorithm.serve, algorithm.tuned):
        if view is not None:
            jax.eval_shape(large.evaluate, frozen, jax.eval_shape(view, server, memory), batch())
    return metrics


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL], ids=["two", "seven"])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(VARIANTS)])
def test_every_method_traces(name, options, targets):
    resolved = algorithms.resolve(name, options)
    large = model(targets, resolved.get("expansion", 1))
    algorithm = algorithms[name](large, optax.adamw(1e-4), **resolved)
    if targets == ALL and not algorithm.tunes_adapters and name != "ditto":
        return  # they count nothing
    metrics = metrics_of_a_round(algorithm, large)
    assert "client/update_norm" in metrics


def test_what_a_mask_of_7b_leaves_is_counted_exactly():
    """8,388,608 entries of 2 · 32 layers · 16 ranks · (4096 + 4096), and 2³⁴ products."""
    shape = lora.adapter_shapes(BASE, 16, ("q_proj", "v_proj"))
    masks = {name: {side: jnp.ones(of, bool) for side, of in sides.items()} for name, sides in shape.items()}
    found = mask_metrics(masks, jnp.array(True))
    assert float(found["client/product_share"]) == 1
    assert int(found["client/trained_entries"]) == 8_388_608
    assert int(found["client/upload_bytes"]) == 4 * 8_388_608 + 8_388_608 // 8
    assert int(found["client/download_bytes"]) == 4 * 8_388_608
    assert int(found["client/dead_entries"]) == 0
    half = {name: {**sides, "a": sides["a"].at[..., :8].set(False)} for name, sides in masks.items()}
    assert float(lora.product_share(half)) == 0.5
    assert int(mask_metrics(half, jnp.array(False))["client/dead_entries"]) == 8_388_608 // 4


@pytest.mark.parametrize(
    ("entries", "most", "dtype"),
    [
        (460_800, 460_800, jnp.int32),
        (2**29 - 1, 2**29 - 1, jnp.int32),  # 2³¹ − 4 bytes
        (2**29, 2**29, jnp.float32),
        (8_388_608 * 100, 8_388_608 * 100, jnp.float32),  # a stack of 100 clients
        (3, 2**31 - 1, jnp.float32),
    ],
)
def test_bytes_are_right_beyond_an_int32(entries, most, dtype):
    for given in (entries, jnp.asarray(entries, jnp.int32)):
        found = bytes_of(given, most)
        assert found.dtype == dtype
        assert int(found) == 4 * entries  # all of these numbers are float32's own
    reported = entry_metrics(3, sent=entries, received=0, most=most)
    assert float(reported["client/upload_bytes"]) == 4 * entries


def test_the_schedule_of_many_entries_ends_at_the_budget():
    total = lora.MOST_ENTRIES
    for budget in (total, total - 1, total // 2, 2**24 + 1):
        counts = np.asarray(schedule(total, jnp.asarray(budget, jnp.int32), 4)).astype(np.int64)
        assert counts[-1] == budget
        assert ((counts >= budget) & (counts <= total)).all()
        assert (np.diff(counts) <= 0).all()
        np.testing.assert_allclose(counts, total * (budget / total) ** (np.arange(1, 5) / 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("rank", "targets", "message"),
    [
        (0, "q_proj", r"LoRA rank = 0 \(model.rank · the algorithm's factor on it\) must be 1 to 4096"),
        (4097, ["q_proj", "down_proj"], "rank = 4097 .* must be 1 to 4096, the smaller side of the largest matrix"),
        (10**30, "q_proj", "must be 1 to 4096"),
        (4096, "*_proj", r"10,234,101,760 entries for a client; at most 2,147,483,647"),
    ],
)
def test_adapters_too_large_to_count_are_refused(rank, targets, message):
    with pytest.raises(ConfigurationError, match=message):
        language_model(BASE, rank=rank, targets=targets)
