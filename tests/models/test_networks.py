"""The registered networks: sizes, shapes, initial weights, errors."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_qp.data.examples import Examples
from fedjax_qp.federated import Batch
from fedjax_qp.models import classifier, models
from fedjax_qp.registry import ConfigurationError


def parameter_count(name: str, shape: tuple[int, int, int], classes: int = 10, **options) -> int:
    build = models.build(name, shape, classes, **options)
    state = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


# The sums over the layers: LeNet 456 + 2,416 + 48,120 + 10,164 + 850; the others as published for CIFAR-10.
@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("lenet", (32, 32, 3), 62_006),
        ("lenet", (28, 28, 1), 44_426),
        ("resnet18", (32, 32, 3), 11_173_962),
        ("vgg16", (32, 32, 3), 14_728_266),
        ("simple_cnn", (32, 32, 3), 896 + 18_496 + 12_544 * 128 + 128 + 1290),
        ("mlp", (28, 28, 1), 784 * 200 + 200 + 200 * 200 + 200 + 2010),
    ],
)
def test_known_parameter_counts(name: str, shape: tuple[int, int, int], count: int) -> None:
    assert parameter_count(name, shape) == count


def test_the_femnist_network_has_as_many_parameters_as_published() -> None:
    assert parameter_count("femnist_cnn", (28, 28, 1)) == 1_663_370  # McMahan et al. 2017, with ten classes
    assert parameter_count("femnist_cnn", (28, 28, 1), 62) == 1_690_046


@pytest.mark.parametrize("normalisation", ["batch", "group", "none"])
@pytest.mark.parametrize(
    ("name", "shape"), [("lenet", (17, 20, 2)), ("resnet18", (8, 9, 1)), ("vgg16", (32, 35, 1)), ("mlp", (5, 4, 2))]
)
def test_output_shapes(name: str, shape: tuple[int, int, int], normalisation: str) -> None:
    options = {} if name == "mlp" else {"normalisation": normalisation}
    build = models.build(name, shape, 7, **options)

    def outputs(inputs):
        return build(nnx.Rngs(0))(inputs, jnp.ones(3, bool), train=True)

    assert jax.eval_shape(outputs, jnp.zeros((3, *shape))).shape == (3, 7)


@pytest.mark.parametrize(("name", "shape"), [("femnist_cnn", (13, 9, 2)), ("simple_cnn", (7, 9, 2))])
def test_output_shapes_of_the_benchmarked_networks(name: str, shape: tuple[int, int, int]) -> None:
    build = models.build(name, shape, 7)
    outputs = jax.eval_shape(lambda inputs: build(nnx.Rngs(0))(inputs, train=True), jnp.zeros((3, *shape)))
    assert outputs.shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "width"),
    [("lenet", 84), ("mlp", 200), ("resnet18", 512), ("vgg16", 512), ("femnist_cnn", 512), ("simple_cnn", 128)],
)
def test_the_parts_make_the_whole(name: str, width: int) -> None:
    model = classifier(models.build(name, (32, 32, 1), 7), classes=7)
    assert model.parts is not None and (model.parts.width, model.parts.classes) == (width, 7)
    batch = Batch(Examples(jnp.zeros((3, 32, 32, 1), jnp.uint8), jnp.zeros(3, jnp.int32)), jnp.ones(3, bool))
    params = jax.eval_shape(model.init, jax.random.key(0))
    features, statistics = jax.eval_shape(partial(model.parts.features, train=True), params, batch)
    assert features.shape == (3, width)
    assert jax.tree.structure(statistics) == jax.tree.structure(params.statistics)
    assert jax.eval_shape(model.parts.classify, params, features).shape == (3, 7)


@pytest.mark.parametrize("normalisation", ["batch", "none"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (17, 19, 3)])
def test_the_form_does_not_change_lenet(shape: tuple[int, int, int], normalisation: str) -> None:
    inputs = jax.random.normal(jax.random.key(1), (4, *shape))

    def logits(form: str) -> jax.Array:
        network = models.build("lenet", shape, 10, convolution=form, normalisation=normalisation)(nnx.Rngs(0))
        return network(inputs, jnp.ones(4, bool), train=True)

    results = jax.jit(lambda: [logits(form) for form in ("lax", "patches", "toeplitz", "winograd")])()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["femnist_cnn", "simple_cnn"])
def test_the_form_does_not_change_the_benchmarked_networks(name: str) -> None:
    inputs = jax.random.normal(jax.random.key(1), (3, 14, 15, 1))
    forms = ("lax", "patches", "toeplitz", "winograd")
    networks = [models.build(name, inputs.shape[1:], 10, convolution=form)(nnx.Rngs(0)) for form in forms]
    results = jax.jit(lambda: [network(inputs, train=True) for network in networks])()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_initial_weights_are_uniform_within_the_bound_of_pytorch() -> None:
    network = models.build("lenet", (32, 32, 3), 10)(nnx.Rngs(3))
    fan_in = {"conv1": 75, "conv2": 150, "dense1": 400, "dense2": 120, "dense3": 84}
    for name, inputs in fan_in.items():
        kernel, bias = (np.asarray(getattr(getattr(network, name), part)[...]) for part in ("kernel", "bias"))
        bound = inputs**-0.5
        assert np.abs(kernel).max() <= bound and np.abs(bias).max() <= bound
        assert np.abs(kernel).max() > 0.95 * bound
        # A uniform distribution has the standard deviation bound / √3; 450 weights at least.
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.1)
        assert np.abs(bias).max() > 0.3 * bound


def test_one_array_a_weight_and_a_bias_with_readable_names() -> None:
    build = models.build("lenet", (16, 16, 1), 2)
    names = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param))
    assert {name: set(parts) for name, parts in names.items()} == {
        name: {"kernel", "bias"} for name in ("conv1", "conv2", "dense1", "dense2", "dense3")
    }


@pytest.mark.parametrize(
    ("name", "shape", "smallest"),
    [
        ("lenet", (15, 28, 1), "16×16"),
        ("resnet18", (8, 7, 3), "8×8"),
        ("vgg16", (28, 28, 1), "32×32"),
        ("femnist_cnn", (3, 28, 1), "4×4"),
        ("simple_cnn", (32, 5, 3), "6×6"),
    ],
)
def test_small_images_are_refused_with_a_remedy(name: str, shape: tuple[int, int, int], smallest: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"'{name}' needs images of at least {smallest}.*{shape[0]}×.*use"):
        models.build(name, shape, 10)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "vgg16", "femnist_cnn", "simple_cnn"])
@pytest.mark.parametrize("shape", [(30,), (32, 32), (2, 32, 32, 3)])
def test_inputs_that_are_no_images_are_refused_with_a_remedy(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"\(height, width, channels\).*has the shape \(.*the model 'mlp'"
    ) as error:
        models.build(name, shape, 10)
    assert str(shape) in str(error.value)
    assert parameter_count("mlp", shape, hidden=()) == (math.prod(shape) + 1) * 10


def test_windows_of_text_need_their_shape() -> None:
    for shape in ((80, 1), (), (0,)):
        with pytest.raises(ConfigurationError, match=r"\(characters,\), but"):
            models.build("char_lstm", shape, 81)


def test_absurd_sizes_are_refused_before_any_weight_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"has 1000076000010 weights \(3726 GiB\); at most 2147483648"):
        classifier(models.build("mlp", (8, 8, 1), 10, hidden=(10**6, 10**6)), classes=10)
    for hidden in ((10**12,), (10**30,), (-1,)):
        with pytest.raises(ConfigurationError, match=r"hidden = .*between 1 and 1000000"):
            models["mlp"]((8, 8, 1), 10, hidden=hidden)
    with pytest.raises(ConfigurationError, match="hidden has 1000000 layers"):
        models["mlp"]((8, 8, 1), 10, hidden=(1,) * 10**6)
    for name in ("embedding", "hidden", "layers"):
        with pytest.raises(ConfigurationError, match=rf"{name} = 1000000 must be between 1 and 100"):
            models["char_lstm"]((80,), 81, **{name: 10**6})


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="normalisation"):
        models.build("lenet", (32, 32, 3), 10, normalisation="layer")
    with pytest.raises(ConfigurationError, match="convolution"):
        models.build("resnet18", (32, 32, 3), 10, convolution="fourier")
    with pytest.raises(ConfigurationError, match=r"hidden = \(20, 0\)"):
        models.build("mlp", (8, 8, 1), 10, hidden=(20, 0))


@pytest.mark.oracle
def test_lenet_equals_pytorch() -> None:
    torch = pytest.importorskip("torch")
    network = models.build("lenet", (32, 32, 3), 10)(nnx.Rngs(0))
    inputs = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)

    def weights(name: str) -> tuple:
        layer = getattr(network, name)
        return torch.from_numpy(np.array(layer.kernel[...])), torch.from_numpy(np.array(layer.bias[...]))

    outputs = torch.from_numpy(inputs).permute(0, 3, 1, 2)
    for name in ("conv1", "conv2"):
        kernel, bias = weights(name)
        outputs = torch.nn.functional.conv2d(outputs, kernel.permute(3, 2, 0, 1), bias)
        outputs = torch.nn.functional.max_pool2d(outputs.relu(), 2)
    outputs = outputs.permute(0, 2, 3, 1).flatten(1)
    for name in ("dense1", "dense2", "dense3"):
        kernel, bias = weights(name)
        outputs = outputs @ kernel + bias
        outputs = outputs if name == "dense3" else outputs.relu()
    np.testing.assert_allclose(network(jnp.asarray(inputs), train=False), outputs.numpy(), rtol=1e-4, atol=1e-5)
