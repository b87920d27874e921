"""Low-rank adapters at their simplest, for the laws of methods: least squares under two layers of two adapted matrices.

The loss sums the mean of (x (W + D + scale·A B) − y)² over layers and matrices; D has been merged into the base. A step
compiles at once, so that laws can be tested on whole rounds.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_qp.contract.federations import Federation
from fedjax_qp.engine import cut_test_set
from fedjax_qp.federated import Model, Params
from fedjax_qp.models.language import lora

LAYERS, INPUTS, OUTPUTS = 2, 6, {"q_proj": 8, "v_proj": 4}
RANK, SCALE = 2, 0.5
SIZES = [3, 20, 8, 14, 5, 11, 4, 17]


def regression_model(expansion: int = 1) -> Model:
    rank = expansion * RANK

    def init(key):
        def module(key, outputs):
            a = jax.random.uniform(key, (LAYERS, INPUTS, rank), minval=-1, maxval=1) / INPUTS**0.5
            return {"a": a, "b": jnp.zeros((LAYERS, rank, outputs))}

        keys = jax.random.split(key, len(OUTPUTS))
        return Params({name: module(key, size) for key, (name, size) in zip(keys, OUTPUTS.items(), strict=True)}, ())

    def loss(frozen, params, batch, key):
        total = 0.0
        adapters = lora.apply_masks(params.trainable, params.masks)
        for name, adapter in adapters.items():
            kernel = frozen["blocks"][name]["kernel"] + SCALE * adapter["a"] @ adapter["b"]
            if params.statistics:
                kernel = kernel + params.statistics[name]
            error = jnp.einsum("ni,lio->lno", batch.examples["x"], kernel) - batch.examples[name][None]
            total += (error**2 * batch.mask[:, None]).mean((0, 2)).sum() / jnp.maximum(batch.mask.sum(), 1)
        return total, params.statistics

    def merge(frozen, trainable, masks=()):
        return lora.merge(frozen, trainable, SCALE, masks)

    return Model(init, loss, lambda *_: {}, merge)


@cache
def regression(expansion: int = 1) -> Federation:
    """Every client has a map of its own, near a common one."""
    generator = np.random.default_rng(0)
    count = sum(SIZES)
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    train = {"x": generator.normal(size=(count, INPUTS)).astype(np.float32)}
    frozen = {"blocks": {}}
    for name, size in OUTPUTS.items():
        maps = generator.normal(size=(1, INPUTS, size)) + 0.3 * generator.normal(size=(len(SIZES), INPUTS, size))
        train[name] = np.einsum("ni,nio->no", train["x"], maps[owner]).astype(np.float32)
        frozen["blocks"][name] = {"kernel": 0.1 * generator.normal(size=(LAYERS, INPUTS, size)).astype(np.float32)}
    ends = np.cumsum(SIZES)
    return Federation(
        model=regression_model(expansion),
        optimizer=optax.adamw(0.02, weight_decay=0.1),
        frozen=frozen,
        train=train,
        test=cut_test_set(train, 16),
        personal=None,
        parts=[np.arange(end - size, end) for size, end in zip(SIZES, ends, strict=True)],
        batch=4,
    )
