"""Every form of convolution against `jax.lax`, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_qp.models.convolution import Form, convolution, convolution_relu_pool, resolve_form
from fedjax_qp.models.winograd import matrices

FORMS: list[Form] = ["patches", "toeplitz", "winograd"]

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "height": st.integers(6, 13),
        "width": st.integers(6, 13),
        "channels": st.sampled_from([1, 3, 6, 17]),
        "outputs": st.integers(1, 5),
        "size": st.sampled_from([1, 2, 3, 5]),
        "padding": st.sampled_from(["SAME", "VALID", 1, 2]),
    }
)


def draw(shape: dict, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(shape["batch"], shape["height"], shape["width"], shape["channels"]))
    kernel = random.normal(size=(shape["size"], shape["size"], shape["channels"], shape["outputs"]))
    return jnp.float32(inputs), jnp.float32(kernel), jnp.float32(random.normal(size=shape["outputs"]))


def assert_same(function, arguments, form: Form, **options) -> None:
    """Values and all gradients of `form` equal those of `lax`."""

    def value_and_gradients(form: Form):
        outputs, pull_back = jax.vjp(lambda *arguments: function(*arguments, form=form, **options), *arguments)
        return outputs, pull_back(jnp.cos(3 * outputs) + jnp.arange(outputs.size).reshape(outputs.shape) / outputs.size)

    results = jax.jit(lambda: (value_and_gradients("lax"), value_and_gradients(form)))()
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=shapes, stride=st.sampled_from([1, 2]))
def test_forms_equal_lax(form: Form, shape: dict, stride: int) -> None:
    inputs, kernel, _ = draw(shape)
    assert_same(convolution, (inputs, kernel), form, stride=stride, padding=shape["padding"])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=shapes)
def test_pooled_forms_equal_lax(form: Form, shape: dict) -> None:
    assert_same(convolution_relu_pool, draw(shape), form, padding=shape["padding"])


@pytest.mark.parametrize("size", [3, 5])
def test_winograd_is_nearly_as_accurate_as_the_plain_sum(size: int) -> None:
    """Errors against a sum in float64, at the number of channels of ResNet's first stage."""
    random = np.random.default_rng(0)
    inputs = np.float32(random.normal(size=(2, 13, 12, 64)))
    kernel = np.float32(random.normal(size=(size, size, 64, 8)))
    views = np.lib.stride_tricks.sliding_window_view(np.float64(inputs), (size, size), (1, 2))
    expected = np.einsum("bhwcyx,yxco->bhwo", views, np.float64(kernel), optimize=True)

    def error(form: Form) -> float:
        got = jax.jit(lambda *arguments: convolution(*arguments, form=form))(inputs, kernel)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))

    assert error("winograd") < 6 * error("patches")
    assert error("winograd") < 2e-6


def test_winograd_matrices_compute_a_correlation_exactly() -> None:
    """Lavin and Gray's definition, in float64: outputs = Aᵀ[(G g) · (Bᵀ d)]."""
    for tile, size in ((4, 3), (2, 5)):
        use = matrices(tile, size)
        random = np.random.default_rng(0)
        inputs, kernel = random.normal(size=tile + size - 1), random.normal(size=size)
        got = use.outputs @ ((use.kernel @ kernel) * (use.inputs @ inputs))
        np.testing.assert_allclose(got, np.correlate(inputs, kernel, "valid"), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_kernels_equals_a_loop(form: Form) -> None:
    shape = {"batch": 2, "height": 8, "width": 8, "channels": 3, "outputs": 4, "size": 3}
    clients = [draw(shape, seed) for seed in range(3)]
    stacked = [jnp.stack(parts) for parts in zip(*clients, strict=True)]
    layer = jax.jit(lambda *arguments: convolution_relu_pool(*arguments, form=form))
    together = jax.jit(jax.vmap(layer))(*stacked)
    alone = [layer(*client) for client in clients]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_convolution_is_left_for_the_compiler(form: Form) -> None:
    inputs, kernel, bias = draw({"batch": 2, "height": 12, "width": 12, "channels": 3, "outputs": 4, "size": 5})
    program = jax.make_jaxpr(jax.grad(lambda k: convolution_relu_pool(inputs, k, bias, form=form).sum()))(kernel)
    assert "conv_general_dilated" not in str(program)


def test_auto_is_resolved_to_a_measured_form() -> None:
    on_cpu = jax.default_backend() == "cpu"
    assert resolve_form("auto", (5, 5, 6, 16)) == ("toeplitz" if on_cpu else "patches")
    assert resolve_form("auto", (3, 3, 64, 64)) == ("winograd" if on_cpu else "patches")
    assert resolve_form("lax", (3, 3, 64, 64)) == "lax"
