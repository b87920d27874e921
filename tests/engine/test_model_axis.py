"""Frozen weights shared by several devices: the same results, and really shared."""

import dataclasses
from functools import cache

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from fedjax_qp import config
from fedjax_qp.algorithms import algorithms
from fedjax_qp.config import Local, Participation
from fedjax_qp.contract.language import SIZES, personal_tests, sequences_of, training_set
from fedjax_qp.engine import Data, Layout, Runs, cut_test_set, make_engine, make_program
from fedjax_qp.engine.plan import Workload, plan_chunk
from fedjax_qp.experiment import build
from fedjax_qp.federated import init_state
from fedjax_qp.models.language.llama import LlamaConfig, initial_weights, split_axes
from fedjax_qp.models.language.model import language_model
from fedjax_qp.registry import ConfigurationError

BASE = LlamaConfig(
    vocabulary=32,
    width=16,
    layers=2,
    heads=4,
    key_value_heads=4,
    head_size=4,
    hidden=24,
    rope_theta=1e4,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tied=False,
    attention_bias=True,
)
LANES, ROUNDS = 4, 1
OPTIMIZER = optax.sgd(0.5, 0.9)  # Adam would make steps of gradients that are 0 but for rounding


@cache
def parts():
    model = language_model(BASE, rank=2, alpha=4.0, dropout=0.05, rematerialise=True)
    model = model._replace(loss=jax.jit(model.loss), evaluate=jax.jit(model.evaluate))
    return model, algorithms["fedit"](model, OPTIMIZER), jax.device_get(initial_weights(BASE, jax.random.key(0)))


@cache
def plan(first_round):
    ends = np.cumsum(SIZES)
    members = [np.arange(end - size, end) for size, end in zip(SIZES, ends, strict=True)]
    work = Workload(members, Participation(cohort=6), Local(epochs=1, batch_size=4), seed=0)  # at most 5 steps
    return plan_chunk([work], first_round, 1, capacity=ROUNDS, lanes=LANES, evaluate_every=1, last_round=9)


def started(**layout):
    model, algorithm, frozen = parts()
    engine = make_engine(
        lambda settings: algorithm,
        model,
        Data(frozen, training_set(), cut_test_set(sequences_of(1, 6, seed=2), 3), personal_tests()),
        Layout(LANES, **layout),
        Runs({}, jax.random.key(0)[None]),
        frozen_axes=split_axes(BASE, layout.get("model_devices", 1)),
    )
    return engine, engine.place_states([init_state(algorithm, model.init(jax.random.key(1)), len(SIZES))])


def one_round(**layout):
    engine, state = started(**layout)
    return jax.device_get(engine.run(state, engine.place_plan(plan(0))))


@cache
def alone():
    return one_round()


def assert_close(found, expected):
    """Relative to each array's largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-30, np.abs(b).max()))


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel": "shard_map", "devices": 2, "model_devices": 4},
        pytest.param({"parallel": "shard_map", "devices": 4, "model_devices": 2}, marks=pytest.mark.slow),
        {"parallel": "vmap", "model_devices": 2},
    ],
    ids=["2x4", "4x2", "vmap"],
)
def test_sharing_the_weights_changes_nothing_and_compiles_once(layout, compilations):
    engine, state = started(**layout)
    plans = [engine.place_plan(plan(number)) for number in (0, 1)]
    state, metrics = engine.run(state, plans[0])
    assert_close((state, metrics), alone())
    before = compilations()
    state, _ = engine.run(state, plans[1])
    assert compilations() == before
    assert int(state.round) == 2


def test_the_weights_are_split_as_megatron_does():
    axes = split_axes(BASE, 4)
    blocks = axes["blocks"]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert blocks[name] == {"kernel": 2, "bias": 1}
    assert blocks["gate_proj"] == blocks["up_proj"] == {"kernel": 2}
    assert blocks["o_proj"] == blocks["down_proj"] == {"kernel": 1}
    assert (axes["embed"], axes["head"], axes["norm"], blocks["input_norm"]) == (0, {"kernel": 1}, None, None)


def test_what_does_not_divide_evenly_is_whole_everywhere():
    few = dataclasses.replace(BASE, key_value_heads=2, vocabulary=30, hidden=22)
    axes = split_axes(few, 4)
    assert axes["blocks"]["q_proj"]["kernel"] == 2
    for name in ("k_proj", "v_proj", "up_proj", "down_proj"):  # two heads are not cut, though 8 outputs could be
        assert set(axes["blocks"][name].values()) == {None}
    assert axes["embed"] is axes["head"]["kernel"] is None


def test_each_device_holds_its_share_of_the_weights():
    model, algorithm, _ = parts()
    axes = split_axes(BASE, 4)
    program = make_program(lambda settings: algorithm, model, Layout(2, 2, 4, "shard_map"), frozen_axes=axes)
    placed = jax.device_put(parts()[2], program.frozen)
    for path, shape in ((("blocks", "q_proj", "kernel"), (2, 16, 4)), (("blocks", "down_proj", "kernel"), (2, 6, 16))):
        leaf = placed
        for key in path:
            leaf = leaf[key]
        assert len(leaf.addressable_shards) == 8
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}
    assert placed["embed"].addressable_shards[0].data.shape == (8, 16)
    assert placed["norm"].sharding.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"parallel": "pmap", "model_devices": 2}, "model_devices = 2 with engine.parallel = 'pmap'.*choose shard_map"),
        (
            {"parallel": "shard_map", "devices": 4, "model_devices": 3},
            "model_devices = 3 with engine.devices = 4 needs 12 devices, but 8 .*choose 1 to 2",
        ),
        ({"parallel": "vmap", "devices": 2, "model_devices": 2}, "devices = 2 with engine.parallel = 'vmap'"),
    ],
)
def test_layouts_that_cannot_work_are_refused(engine, message):
    settings = {"name": "x", "data": "alpaca_demo", "partition": "iid", "algorithm": "fedit", "engine": engine}
    with pytest.raises(ConfigurationError, match=message):
        build(config.from_dict({**settings, "model": {"name": "pretrained", "path": "nowhere"}}))


def test_a_model_without_frozen_weights_has_nothing_to_share():
    settings = {"name": "x", "data": "digits", "partition": "iid", "model": "mlp", "algorithm": "fedavg"}
    with pytest.raises(ConfigurationError, match="model_devices = 2, but model = 'mlp' has no frozen weights"):
        build(config.from_dict({**settings, "engine": {"model_devices": 2}}))
    model, algorithm, _ = parts()
    with pytest.raises(ValueError, match="pmap has one axis"):
        make_program(lambda settings: algorithm, model, Layout(1, model_devices=2, parallel="pmap"))
