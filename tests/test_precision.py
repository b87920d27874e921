"""Rounded products: against numpy, in every kind of program, and in a run's client steps; float32 changes nothing."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_qp import config
from fedjax_qp.contract import language
from fedjax_qp.data.examples import Examples
from fedjax_qp.experiment import build
from fedjax_qp.federated import Batch, Model
from fedjax_qp.models import classifier, models
from fedjax_qp.precision import Precision, in_precision
from fedjax_qp.registry import ConfigurationError

SMALL = {
    "name": "small",
    "data": "digits",
    "partition": {"name": "iid", "clients": 3},
    "model": {"name": "mlp", "hidden": [4]},
    "algorithm": "fedavg",
    "participation": {"cohort": 2},
}


def operand_types(function, *arguments) -> set[str]:
    """Types of the operands of all matrix products in a program, before the compiler changes it."""
    text = jax.jit(function).lower(*arguments).as_text()
    operands = re.findall(r"stablehlo\.(?:dot_general|convolution).*: \((.*)\) ->", text)
    assert operands
    return set(re.findall(r"x((?:bf|f|i)\d+)>", " ".join(operands)))


def image_model(name: str) -> tuple[Model, Batch]:
    shape = (16, 16, 1)
    batch = Batch(Examples(jnp.ones((2, *shape)), jnp.array([0, 1])), jnp.ones(2, bool))
    return classifier(models.build(name, shape, 3), classes=3), batch


def adapters() -> tuple[Model, Batch]:
    return language.language(), Batch(language.sequences_of(0, 2, seed=0), jnp.ones(2, bool))


def gradient(model: Model, frozen, batch: Batch, trainable, params):
    return jax.grad(lambda own: model.loss(frozen, params._replace(trainable=own), batch, None)[0])(trainable)


@pytest.mark.parametrize("name", ["lenet", "femnist_cnn", pytest.param("resnet18", marks=pytest.mark.slow), "llama"])
def test_every_product_of_a_step_is_rounded(name: str) -> None:
    model, batch = adapters() if name == "llama" else image_model(name)
    frozen = language.base_weights() if name == "llama" else ()
    params = jax.eval_shape(model.init, jax.random.key(0))
    step = partial(gradient, model, frozen, batch, params=params._replace(masks=()))
    if params.statistics:
        params = model.init(jax.random.key(0))
        step = partial(gradient, model, frozen, batch, params=params)
    assert operand_types(step, params.trainable) == {"f32"}
    assert operand_types(in_precision(step, "bfloat16"), params.trainable) == {"bf16"}
    outputs = jax.eval_shape(in_precision(step, "bfloat16"), params.trainable)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outputs))


def test_float32_changes_no_bit() -> None:
    model, batch = image_model("lenet")
    params = model.init(jax.random.key(0))
    step = partial(gradient, model, (), batch, params=params)
    plain, full = jax.jit(step)(params.trainable), jax.jit(in_precision(step, "float32"))(params.trainable)
    jax.tree.map(np.testing.assert_array_equal, full, plain)


@pytest.mark.parametrize(("precision", "kept_bits"), [("tf32", 10), ("bfloat16", 7)])
def test_operands_are_rounded_to_the_nearest(precision: Precision, kept_bits: int) -> None:
    random = np.random.default_rng(0)
    first, second = (random.normal(size=shape).astype(np.float32) for shape in ((5, 9), (9, 4)))

    def rounded(values: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(np.float64(values))
        return np.ldexp(np.round(np.ldexp(mantissa, kept_bits + 1)), exponent - kept_bits - 1)

    got = jax.jit(in_precision(jnp.matmul, precision))(first, second)
    np.testing.assert_allclose(got, rounded(first) @ rounded(second), rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, first @ second, rtol=1e-5, atol=1e-6)


def test_products_within_loops_branches_and_recomputation_are_rounded() -> None:
    def program(matrix):
        def body(carry, _):
            return jax.checkpoint(lambda values: jnp.tanh(values @ matrix))(carry), None

        carry, _ = jax.lax.scan(body, matrix, None, length=2)
        carry = jax.lax.fori_loop(0, 2, lambda _, values: values @ matrix, carry)
        return jax.lax.cond(carry.sum() > 0, lambda values: values @ matrix, lambda values: values, carry)

    matrix = jnp.eye(3)
    assert operand_types(in_precision(program, "bfloat16"), matrix) == {"bf16"}
    np.testing.assert_allclose(jax.jit(in_precision(program, "bfloat16"))(matrix), jax.jit(program)(matrix), rtol=0.02)


def test_a_run_rounds_the_products_of_its_clients_and_tests() -> None:
    experiment = build(config.from_dict({**SMALL, "precision": "bfloat16"}))
    train = jax.tree.map(lambda leaf: jnp.asarray(leaf[:4]), experiment.task.train)
    batch, params = Batch(train, jnp.ones(4, bool)), experiment.model.init(jax.random.key(0))
    carry = experiment.algorithm.start(params, (), (), None)
    assert operand_types(experiment.algorithm.step, (), params, carry, batch, jax.random.key(0)) == {"bf16"}
    assert "bf16" in operand_types(experiment.model.evaluate, (), params, batch)
    after = jax.eval_shape(experiment.algorithm.step, (), params, carry, batch, jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"precision = 'float16'.*bfloat16"):
        config.from_dict({**SMALL, "precision": "float16"})
