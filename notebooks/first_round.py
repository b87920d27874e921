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
# 2. the geometry of FedQP in a picture: FedMut's mutations, and what the quadratic program makes of them;
# 3. a short run of three methods compared.
#
# Runs on a CPU in about two minutes, with data that is installed with the package.

# %%
# %matplotlib inline
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure

from fedjax_qp import config, quadratic
from fedjax_qp.data import print_table, summary
from fedjax_qp.experiment import build, first_state
from fedjax_qp.federated import Batch, Client, round_keys
from fedjax_qp.simulate import chunk_plan, simulate

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
plan = chunk_plan(experiment, lanes=1, first_round=0, rounds=1)
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
    upload, _, metrics = algorithm.finish(shared, (), carry, (), client)
    total = upload if total is None else jax.tree.map(jnp.add, total, upload)
    print(f"client {client.index:2d}: {int(client.size):3d} examples, mean loss {metrics['client/loss']:.3f}")
server, metrics = algorithm.combine(state.server, total, keys.combine)
print(f"mean cosine between two clients' progress: {metrics['update/cosine_between_clients']:.3f}")

# %% [markdown]
# The engine's first round gives the same model:

# %%
one_round = dataclasses.replace(experiment.config, rounds=1)
engine_state = next(simulate(experiment._replace(config=one_round))).state
difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), server.params, engine_state.server.params)
worst = max(jax.tree.leaves(difference))
print(f"largest difference of a parameter: {worst:.1e}")
assert worst < 1e-4

# %% [markdown]
# ## FedQP's geometry
#
# With two layers a mutation has two coefficients, one for each layer's part of the last global update g; scaled by the
# square roots of the layers' shares, lengths and angles in the picture are those in parameter space. FedMut draws ±α per
# layer, so half of the mutants look away from g. The fan around g is where FedQP wants them; the one that looks straight
# back is corrected to nothing by QP-1, which only ever moves along g.

# %%
shares = jnp.array([0.65, 0.35])
alpha, margin = 2.0, 0.3
signs = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
scale = np.sqrt(np.asarray(shares))
drawn = alpha * np.asarray(signs) * scale
forms = {
    "nearest (QP-1)": quadratic.nearest(signs, shares, alpha=alpha, margin=margin),
    "box (QP-2)": quadratic.boxed(signs, shares, alpha=alpha, margin=margin),
    "joint (QP-4), drift 0.7": quadratic.joint(signs, shares, alpha=alpha, margin=margin, drift=0.7),
}

figure = Figure(figsize=(12, 4.4), layout="constrained")
for axes, (name, (coefficients, report)) in zip(figure.subplots(1, 3, sharey=True), forms.items(), strict=True):
    corrected = np.asarray(coefficients) * scale
    half_angle = np.arccos(margin)
    centre = np.arctan2(scale[1], scale[0])
    angles = np.linspace(centre - half_angle, centre + half_angle, 60)
    axes.fill(np.r_[0, 2.6 * np.cos(angles)], np.r_[0, 2.6 * np.sin(angles)], color="#56B4E9", alpha=0.25, label="fan")
    axes.annotate("", xy=scale, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2})
    axes.annotate("g", xy=scale * 1.05)
    for start, end in zip(drawn, corrected, strict=True):
        axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#777777"})
    axes.scatter(*drawn.T, marker="x", s=60, color="#D55E00", label="FedMut's mutants", zorder=3)
    axes.scatter(*corrected.T, marker="o", s=45, color="#0072B2", label="corrected", zorder=3)
    axes.scatter(*corrected.mean(0), marker="*", s=160, color="#009E73", label="their mean (drift)", zorder=4)
    axes.set(title=name, xlabel="layer 1, scaled coefficient", aspect="equal", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8))
    inner = np.round(np.asarray(coefficients @ shares) / alpha, 2) + 0.0
    print(f"{name}: inner products with g {inner} in units of α‖g‖², KKT residual {report.residual.max():.0e}")
figure.axes[0].set_ylabel("layer 2, scaled coefficient")
figure.axes[0].legend(loc="lower left", fontsize=8)
display(figure)

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
    records = [record for chunk in simulate(method) for record in chunk.records]
    axes.plot(
        [record["round"] for record in records], [record["test_accuracy"] for record in records], style, label=label
    )
    print(f"{label:16s} mean accuracy of the last 5 rounds: {np.mean([r['test_accuracy'] for r in records[-5:]]):.3f}")
axes.set(xlabel="round", ylabel="test accuracy")
axes.legend()
display(figure)
