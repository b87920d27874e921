"""The laws of data sources, partitions and models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_qp.contract.federations import digits
from fedjax_qp.data import check_partition
from fedjax_qp.data.examples import Examples
from fedjax_qp.federated import Batch, Model
from fedjax_qp.models import classifier
from fedjax_qp.registry import Registry, require
from fedjax_qp.tasks import KINDS

CLASSES, SIZE = 10, 12  # of made-up examples, and how many in a batch
# A batch of each kind of examples, for models; those of instructions are whole pre-trained models, which have no laws here.
SHAPES = {"images": ((32, 32, 3), np.uint8), "rows": ((7,), np.float32), "characters": ((20,), np.uint8)}


def source_laws(registry: Registry, name: str, options: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Laws of a data source."""
    kept: list[Any] = []

    def built() -> Any:
        kept.append(registry[name](**registry.own(options)))
        return kept[-1]

    def form() -> None:
        dataset = built()
        kinds = registry.examples(name)
        kind = dataset.examples or kinds[0]
        assert kind in kinds, f"it gives {kind}, but declares {' and '.join(kinds)}"
        KINDS[kind].check(dataset)

    def again() -> None:
        first, second = (kept[0] if kept else built()), built()
        _assert_same(
            (first.train, first.test), (second.train, second.test), "the examples differ when it is read again"
        )

    return {"form": form, "same again": again}


def partition_laws(registry: Registry, name: str, options: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Laws of a partition, on the digits, each of twelve people who wrote them."""
    owners = np.arange(len(digits().train.labels)) % 12
    dataset = digits()._replace(client_ids=owners)

    def parts(seed: int) -> Any:
        return registry[name](dataset, np.random.default_rng(seed), **registry.own(options))

    def form() -> None:
        for part in check_partition(parts(0), dataset):
            assert (np.diff(part) > 0).all(), "the indices of a client must be sorted"

    def same_key() -> None:
        _assert_same(list(parts(0)), list(parts(0)), "the same random numbers give other clients: draw from rng alone")

    return {"form": form, "same key": same_key}


def model_laws(registry: Registry, name: str, options: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Laws of a network, on made-up examples of the kinds that it declares."""
    laws = {}
    for kind in registry.examples(name):
        if kind not in SHAPES:
            continue
        for law in (gradients, padding, sums):
            title = f"{law.__name__} ({kind})"
            laws[title] = lambda law=law, kind=kind: law(_network(registry, name, options, kind), _batch(kind))
    return laws


def gradients(model: Model, batch: Batch) -> None:
    """The loss is finite, and so are its gradients, of the parameters' structure; not all of them are 0."""
    params = model.init(jax.random.key(0))
    (loss, _), gradient = jax.value_and_grad(_loss(model, batch), has_aux=True)(params.trainable, params)
    leaves = jax.tree.leaves(gradient)
    assert np.isfinite(loss), "the loss of the first step is not finite"
    assert all(np.isfinite(leaf).all() for leaf in leaves), "gradients are not finite"
    assert any(np.any(leaf) for leaf in leaves), "all gradients are 0: nothing would be learnt"


def padding(model: Model, batch: Batch) -> None:
    """Examples with mask False change neither loss nor gradients nor statistics."""
    params = model.init(jax.random.key(0))
    results = []
    for fill in (0, 1):
        inputs, labels = (np.array(leaf) for leaf in batch.examples)
        mask = np.arange(SIZE) < SIZE // 2
        inputs[~mask], labels[~mask] = fill, fill
        padded = Batch(Examples(inputs, labels), jnp.asarray(mask))
        results.append(jax.value_and_grad(_loss(model, padded), has_aux=True)(params.trainable, params))
    _assert_same(results[0], results[1], "what stands in padded examples changes the step: honour the mask", close=True)


def sums(model: Model, batch: Batch) -> None:
    """What `evaluate` gives are sums: a batch and its two halves come to the same."""
    params = model.init(jax.random.key(0))
    halves = [batch._replace(mask=np.arange(SIZE) // (SIZE // 2) == half) for half in (0, 1)]
    first, second = (model.evaluate((), params, half) for half in halves)
    added = jax.tree.map(jnp.add, first, second)
    _assert_same(model.evaluate((), params, batch), added, "tests of two halves do not add up to the whole", close=True)


def parts_laws(registry: Registry, name: str, options: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """The laws of a part that is no algorithm, by name, ready to be called."""
    laws = {"data source": source_laws, "partition": partition_laws, "model": model_laws}
    return laws[registry.kind](registry, name, options)


def _loss(model: Model, batch: Batch) -> Callable:
    return lambda trainable, params: model.loss((), params._replace(trainable=trainable), batch, jax.random.key(1))


def _network(registry: Registry, name: str, options: dict[str, Any], kind: str) -> Model:
    build = registry[name](SHAPES[kind][0], CLASSES, **registry.own(options))
    scale = (lambda inputs: inputs) if kind == "rows" else None
    middle = None if kind == "characters" else 0.5
    return classifier(build, classes=CLASSES, scale=scale, mean=middle, std=middle)


def _batch(kind: str) -> Batch:
    shape, form = SHAPES[kind]
    numbers = np.random.default_rng(0)
    inputs = numbers.integers(0, CLASSES if kind == "characters" else 256, (SIZE, *shape))
    inputs = numbers.normal(size=(SIZE, *shape)) if form == np.float32 else inputs
    return Batch(Examples(inputs.astype(form), np.arange(SIZE, dtype=np.int32) % CLASSES), jnp.ones(SIZE, bool))


def _assert_same(first: Any, second: Any, message: str, *, close: bool = False) -> None:
    require(jax.tree.structure(first) == jax.tree.structure(second), message)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        same = np.allclose(a, b, rtol=1e-4, atol=1e-5) if close else np.array_equal(a, b)
        require(np.shape(a) == np.shape(b) and same, message)
