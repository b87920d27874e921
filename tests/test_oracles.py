"""Federated rounds against a plain PyTorch loop: same weights, batches and signs, nothing else shared."""

import jax
import numpy as np
import pytest
from support.federations import small_algorithm

from fedjax_qp.contract.federations import digits, small_engine, small_model, small_plan, small_state
from fedjax_qp.engine.plan import IDLE
from fedjax_qp.federated import Cohort, round_keys

pytestmark = pytest.mark.oracle
ROUNDS = 3


def torch_network(torch, trainable):
    """The small MLP in PyTorch; returns it and its parameters in the order of our tree's leaves."""
    paths = jax.tree_util.tree_leaves_with_path(trainable)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    tensors = [torch.tensor(np.array(leaf), requires_grad=True) for _, leaf in paths]
    named = dict(zip(names, tensors, strict=True))
    layers = sorted({name.rsplit("/", 1)[0] for name in names}, key=lambda n: -named[f"{n}/kernel"].shape[0])

    def logits(images):
        hidden = (images.reshape(len(images), -1) / 255 - 0.5) / 0.5
        for index, layer in enumerate(layers):
            hidden = hidden @ named[f"{layer}/kernel"] + named[f"{layer}/bias"]
            hidden = torch.relu(hidden) if index + 1 < len(layers) else hidden
        return hidden

    return logits, tensors


def train(torch, start: list[np.ndarray], structure, batches: np.ndarray) -> list[np.ndarray]:
    """One client's local steps with torch.optim.SGD."""
    logits, tensors = torch_network(torch, jax.tree.unflatten(structure, start))
    optimizer = torch.optim.SGD(tensors, lr=0.05, momentum=0.9)
    for indices in batches:
        indices = indices[indices != IDLE]
        images = torch.tensor(np.asarray(digits().train.inputs)[indices], dtype=torch.float32)
        labels = torch.tensor(np.asarray(digits().train.labels)[indices], dtype=torch.long)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(images), labels).backward()
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


@pytest.mark.parametrize("case", ["fedavg", "fedavg-uniform", "fedmut", "fedqp-joint"])
def test_rounds_equal_a_torch_loop(case):
    torch = pytest.importorskip("torch")
    algorithm = small_algorithm(case)
    engine = small_engine(algorithm)
    state = engine.place_states([small_state(algorithm)])
    plan = small_plan(0, ROUNDS, lanes=2, capacity=ROUNDS)

    weights, structure = jax.tree.flatten(small_model().init(jax.random.key(0)).trainable)
    weights = [np.array(leaf) for leaf in weights]
    update = [np.zeros_like(leaf) for leaf in weights]
    server = small_state(algorithm).server
    for round in range(ROUNDS):
        cohort = Cohort(*(leaf[round] for leaf in plan.cohorts))
        _, own, _ = algorithm.dispatch(server, cohort, round_keys(jax.random.key(0), round).dispatch)
        coefficients = np.asarray(own.coefficients) if own else np.zeros((len(cohort.clients), len(weights)))
        results = []
        for slot in range(len(cohort.clients)):
            lane, step = np.nonzero(plan.lanes.slots[:, round] == slot)
            batches = plan.lanes.examples[lane, round, step]
            start = [w + c * g for w, c, g in zip(weights, coefficients[slot], update, strict=True)]
            results.append(train(torch, [leaf.astype(np.float32) for leaf in start], structure, batches))
        shares = cohort.sizes / cohort.sizes.sum() if case == "fedavg" else np.full(len(results), 1 / len(results))
        new = [sum(s * leaf for s, leaf in zip(shares, leaves, strict=True)) for leaves in zip(*results, strict=True)]
        update, weights = [a - b for a, b in zip(new, weights, strict=True)], new
        state, _ = engine.run(state, engine.place_plan(small_plan(round, 1, lanes=2, capacity=ROUNDS)))
        server = jax.tree.map(np.array, jax.device_get(state.server))
    for ours, theirs in zip(jax.tree.leaves(state.server.params.trainable), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)
