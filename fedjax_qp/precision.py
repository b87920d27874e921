"""The precision of matrix products: whole float32, or their operands rounded to tf32 or bfloat16.

Everything else stays in float32: parameters and optimizer (the "master weights"), sums within a product, normalisation,
losses, and all that the server does. Tests are rounded like training, so their losses carry its error too. The products are
found in the traced program, gradients included, so that the option holds for any model and any method's client step. (JAX's
own setting, `jax.default_matmul_precision`, leaves convolutions out and changes nothing on CPUs.) On devices with units for
a type the compiler uses them; elsewhere the operands are rounded all the same, which shows the effect on accuracy but saves
no time.

Source: Micikevicius et al., "Mixed precision training", ICLR 2018 (float32 master weights).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core import Literal as Constant
from jaxtyping import Array

Precision = Literal["float32", "tf32", "bfloat16"]

_TF32_BITS = (8, 10)  # exponent, mantissa


def in_precision(function: Callable, precision: Precision) -> Callable:
    """Returns the function with its float32 matrix products in the given precision.

    Args:
      function: of pytrees of arrays; to be differentiated inside, not outside.
      precision: "float32" makes devices that would round of their own accord compute in full.
    """

    def with_precision(*arguments: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            if precision == "float32":
                return function(*arguments)
            program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _run(program, precision, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return with_precision


def _run(program: ClosedJaxpr, precision: Precision, arguments: Sequence[Any]) -> list[Any]:
    """Interprets a program; products get rounded operands, programs within it likewise."""
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Constant) else values[variable]

    for equation in jaxpr.eqns:
        outputs = _apply(equation, precision, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: JaxprEqn, precision: Precision, inputs: list[Any]) -> list[Any]:
    primitive, parameters = equation.primitive, dict(equation.params)
    if primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p):
        if all(operand.dtype == jnp.float32 for operand in inputs):
            inputs = [_rounded(operand, precision) for operand in inputs]
            parameters |= {"preferred_element_type": jnp.dtype(jnp.float32), "precision": None}
        return [primitive.bind(*inputs, **parameters)]
    if "call_jaxpr" in parameters:  # a function with a derivative of its own, which nobody asks for any more
        return _run(parameters["call_jaxpr"], precision, inputs)
    changed = {name: _changed(value, precision) for name, value in parameters.items()}
    outputs = primitive.bind(*inputs, **changed)
    return list(outputs) if primitive.multiple_results else [outputs]


def _rounded(operand: Array, precision: Precision) -> Array:
    if precision == "bfloat16":
        return operand.astype(jnp.bfloat16)
    return jax.lax.reduce_precision(operand, *_TF32_BITS)


def _changed(value: Any, precision: Precision) -> Any:
    """Programs among an operation's parameters, such as the body of a loop, with their products rounded."""
    if type(value) is tuple:  # not a named one
        return tuple(_changed(part, precision) for part in value)
    if isinstance(value, ClosedJaxpr):
        return _rounded_within(value, precision)
    if isinstance(value, Jaxpr):  # a type of its own in JAX 0.10; later the same, and handled above
        return _rounded_within(ClosedJaxpr(value, ()), precision).jaxpr
    return value


def _rounded_within(program: ClosedJaxpr, precision: Precision) -> ClosedJaxpr:
    inputs = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in program.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *arguments: _run(program, precision, arguments))(*inputs)
