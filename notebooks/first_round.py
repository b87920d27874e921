# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first round by hand
#
# 1. one round of federated averaging, written out with the functions an algorithm is made of;
# 2. a short run of three methods compared.
#
# Runs on a CPU in about a minute, with data that is installed with the package.

# %%
# %matplotlib inline
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from fedjax_qp import config
from fedjax_qp.data import print_table, summary
from fedjax_qp.experiment import build, first_state
from fedjax_qp.federated import Batch, Client, round_keys
from fedjax_qp.runs.loop import chunk_plan, simulate

settings = {
    "name": "notebook",
    "rounds": 20,
    "data": "digits",
    "partition": {"name": "dirichlet", "clients": 30, "beta": 0.1, "minimum": 5},
    "model": {"name": "mlp", "hidden": [32]},
    "algorithm": "fedavg",
    "local": {"learning_rate": 0.02, "epochs": 3, "batch_size": 16},
    "engine": {"lanes": 2, "rounds_per_chunk": 5},
}
experiment = build(config.from_dict(settings))
print_table(summary(experiment.task.counts))

# %% [markdown]
# ## One round, step by step
#
# The server dispatches, every client of the cohort starts, steps through its batches and finishes; the uploads are added
# up and combined. The engine does just this, for many clients side by side and without a Python loop.

# %%
algorithm, train = experiment.algorithm, experiment.task.train
state = first_state(experiment)
plan = chunk_plan([experiment], lanes=1, first_round=0, rounds=1)
cohort = jax.tree.map(lambda leaf: leaf[0], plan.cohorts)
keys = round_keys(jax.random.key(experiment.config.seed), state.round)

shared, _, _ = algorithm.dispatch(state.server, cohort, keys.dispatch)
step = jax.jit(algorithm.step)
total = None
for slot in range(len(cohort.clients)):
    carry = algorithm.start(shared, (), (), keys.clients)
    for indices in plan.lanes.examples[0, 0][plan.lanes.slots[0, 0] == slot]:
        examples = jax.tree.map(lambda leaf, i=indices: leaf[np.maximum(i, 0)], train)
        carry = step((), shared, carry, Batch(examples, indices >= 0), keys.clients)
    client = Client(*(leaf[slot] for leaf in cohort))
    upload, _, metrics = algorithm.finish(shared, carry, client)
    total = upload if total is None else jax.tree.map(jnp.add, total, upload)
    print(f"client {client.index:2d}: {int(client.size):3d} examples, mean loss {metrics['client/loss']:.3f}")
server, metrics = algorithm.combine(state.server, total, keys.combine)
print(f"mean cosine between two clients' progress: {metrics['update/cosine_between_clients']:.3f}")

# %% [markdown]
# The engine's first round gives the same model:

# %%
one_round = dataclasses.replace(experiment.config, rounds=1)
engine_state = next(simulate([experiment._replace(config=one_round)]))[0].state
difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), server.params, engine_state.server.params)
worst = max(jax.tree.leaves(difference))
print(f"largest difference of a parameter: {worst:.1e}")
assert worst < 1e-4

# %% [markdown]
# ## A short run compared
#
# Same data, same split, same budget; only the algorithm differs. One seed on a small data set shows how to compare, not
# which method is better.

# %%
methods = {
    "FedAvg (uniform)": {"name": "fedavg", "weighting": "uniform"},
    "FedMut": {"name": "fedmut", "alpha": 1.0},
    "FedQP": {"name": "fedqp", "alpha": 1.0},
}
figure = Figure(figsize=(6.5, 4), layout="constrained")
axes = figure.subplots()
for (label, part), style in zip(methods.items(), ("-", "--", "-."), strict=True):
    method = build(config.from_dict({**settings, "algorithm": part}))
    records = [record for (chunk,) in simulate([method]) for record in chunk.records]
    axes.plot(
        [record["round"] for record in records], [record["test_accuracy"] for record in records], style, label=label
    )
    print(f"{label:16s} mean accuracy of the last 5 rounds: {np.mean([r['test_accuracy'] for r in records[-5:]]):.3f}")
axes.set(xlabel="round", ylabel="test accuracy", xticks=range(0, 21, 5))
axes.legend()
display(figure)
