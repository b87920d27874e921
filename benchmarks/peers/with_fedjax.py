"""FedJAX (google/fedjax) on an old JAX: its `for_each_client` and its federated averaging.

Its own `fed_avg` reports no training loss, so the same few lines stand here with a loss per step. Batches are those of the
workload, padded and masked as FedJAX pads, so that a step compiles once. Networks are plain functions. FedJAX's
default back end (jit) runs: with this JAX its other one (pmap) hands models back with an axis too many.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import fedjax
import jax
import jax.numpy as jnp
import numpy as np
from exchange import Block, Work, Workload, distance, serve
from fedjax.core import tree_util

MASK = "__mask__"
Params = dict[str, Any]


def convolution(inputs: jax.Array, params: Params, name: str, padding: int = 0) -> jax.Array:
    kernel, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    outputs = jax.lax.conv_general_dilated(
        inputs, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(outputs + bias)


def dense(inputs: jax.Array, params: Params, name: str) -> jax.Array:
    return inputs.reshape(len(inputs), -1) @ params[f"{name}.weight"] + params[f"{name}.bias"]


def pool(inputs: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(inputs, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def mlp(params: Params, images: jax.Array) -> jax.Array:
    return dense(images, params, "dense1")


def femnist_cnn(params: Params, images: jax.Array) -> jax.Array:
    outputs = pool(convolution(images, params, "conv1", 2))
    outputs = pool(convolution(outputs, params, "conv2", 2))
    return dense(jax.nn.relu(dense(outputs, params, "dense1")), params, "dense2")


def simple_cnn(params: Params, images: jax.Array) -> jax.Array:
    outputs = pool(convolution(convolution(images, params, "conv1"), params, "conv2"))
    return dense(jax.nn.relu(dense(outputs, params, "dense1")), params, "dense2")


def lenet(params: Params, images: jax.Array) -> jax.Array:
    outputs = pool(convolution(pool(convolution(images, params, "conv1")), params, "conv2"))
    outputs = jax.nn.relu(dense(outputs, params, "dense1"))
    return dense(jax.nn.relu(dense(outputs, params, "dense2")), params, "dense3")


NETWORKS = {"mlp": mlp, "femnist_cnn": femnist_cnn, "simple_cnn": simple_cnn, "lenet": lenet}


def jax_arrays(initial: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kernels OIHW → HWIO and [outputs, inputs] → [inputs, outputs]; see `workloads.torch_arrays`."""
    arrays, channels = {}, 1
    for name, value in initial.items():
        if value.ndim == 4:
            channels, value = len(value), value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            side = round((value.shape[1] / channels) ** 0.5)
            if channels > 1:
                value = value.reshape(-1, channels, side, side).transpose(0, 2, 3, 1).reshape(len(value), -1)
            value, channels = value.T, 1
        arrays[name] = value
    return arrays


def averaging(workload: Workload) -> Callable[[Params, list[tuple[int, Work]]], tuple[Params, list]]:
    """A round of FedJAX's federated averaging."""
    settings, network = workload.settings, NETWORKS[workload.settings["model"]]
    optimizer = fedjax.optimizers.sgd(settings["learning_rate"], momentum=settings["momentum"] or None)

    def loss(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        logits = jax.nn.log_softmax(network(params, batch["x"]))
        of_examples = -jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]
        return jnp.vdot(of_examples, batch[MASK]) / batch[MASK].sum()

    def start(params: Params, unused: Any) -> dict[str, Any]:
        return {"params": params, "opt_state": optimizer.init(params)}

    def step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state["params"], batch)
        opt_state, params = optimizer.apply(gradient, state["opt_state"], state["params"])
        return {"params": params, "opt_state": opt_state}, value

    def finish(params: Params, state: dict[str, Any]) -> Params:
        return jax.tree_util.tree_map(lambda a, b: a - b, params, state["params"])

    train = fedjax.for_each_client(start, step, finish, with_step_result=True)
    images = (workload.images * np.float32(1 / 127.5) - np.float32(1)).astype(np.float32)
    labels, size = workload.labels.astype(np.int32), settings["batch_size"]

    def batches(work: Work):
        for indices in work.batches:
            padded = np.pad(indices, (0, size - len(indices)))
            yield {"x": images[padded], "y": labels[padded], MASK: np.arange(size) < len(indices)}

    def run(params: Params, cohort: list[Work]) -> tuple[Params, list]:
        total, examples, losses = tree_util.tree_zeros_like(params), 0.0, []
        clients = [(slot, batches(work), jnp.zeros(())) for slot, work in enumerate(cohort)]
        for slot, change, of_steps in train(params, clients):
            weight = cohort[slot].size
            total = tree_util.tree_add(total, tree_util.tree_weight(change, weight))
            examples += weight
            losses.append(of_steps)
        mean = tree_util.tree_inverse_weight(total, examples)
        return jax.tree_util.tree_map(lambda a, b: a - b, params, mean), losses

    return run


def prepare(workload: Workload) -> tuple[Callable[[], Block], dict[str, Any]]:
    run = averaging(workload)
    first = {name: jnp.asarray(value) for name, value in jax_arrays(workload.initial).items()}
    began = {name: np.asarray(value) for name, value in first.items()}

    def run_block() -> Block:
        params, found = first, []
        for cohort in workload.rounds:
            params, losses = run(params, cohort)
            found.append(losses)
        values = jax.device_get(found)
        now = {name: np.asarray(value) for name, value in params.items()}
        return Block([float(np.mean([np.mean(steps) for steps in losses])) for losses in values], distance(now, began))

    return run_block, {"versions": {name: version(name) for name in ("fedjax", "jax", "jaxlib")}}


if __name__ == "__main__":
    serve(prepare)
