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
# # FedQP's geometry
#
# 1. two layers in a picture: FedMut's mutations, and what each form of the quadratic program makes of them;
# 2. the same in a model: angles of real mutants with the global update, before and after the correction;
# 3. what it costs: the mutants' mean is a server momentum, and the forms differ in how much of it they add.
#
# Runs on a CPU in about two minutes, with data that is installed with the package.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from IPython.display import Image, display
from matplotlib.figure import Figure
from rich.console import Console

from fedjax_qp import config, quadratic
from fedjax_qp.instruments.inspection import inspect_runs, side_by_side
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.run import run

# %% [markdown]
# ## Two layers
#
# With two layers a mutation has two coefficients, one for each layer's part of the last global update g; scaled by the
# square roots of the layers' shares, lengths and angles in the picture are those in parameter space. FedMut draws ±α per
# layer, so half of the mutants look away from g. The blue area is where each form wants them: QP-1 moves a mutant along g
# until its cosine with g is at least the margin τ, so the one that looks straight back is corrected to nothing; QP-2 and QP-4
# ask for an inner product of at least τα‖g‖² and let no layer's coefficient grow beyond α.

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
grid = np.stack(np.meshgrid(*[np.linspace(-2.8, 2.8, 401)] * 2))  # [layers, points, points]
along = np.tensordot(scale, grid, 1)  # inner product with g over ‖g‖
in_fan = along >= margin * np.linalg.norm(grid, axis=0)
in_box = (along >= margin * alpha) & (np.abs(grid) <= alpha * scale[:, None, None]).all(0)

figure = Figure(figsize=(12, 4.4), layout="constrained")
for axes, (name, (coefficients, report)) in zip(figure.subplots(1, 3, sharey=True), forms.items(), strict=True):
    corrected = np.asarray(coefficients) * scale
    allowed = in_fan if name.startswith("nearest") else in_box
    axes.contourf(*grid, allowed, levels=[0.5, 1], colors=["#56B4E9"], alpha=0.25)
    axes.fill([], [], color="#56B4E9", alpha=0.25, label="allowed")
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
# ## Real mutants
#
# FedMut and two forms of FedQP on handwritten digits, fifteen clients, Dirichlet β = 0.1. The instrument draws cohorts of
# mutations from a checkpoint, as the next round would, and measures the angle between each mutant's offset and g.

# %%
folder = Path(tempfile.mkdtemp())
settings = {
    "rounds": 12,
    "folder": str(folder),
    "data": "digits",
    "partition": {"name": "dirichlet", "clients": 15, "beta": 0.1, "minimum": 5},
    "model": {"name": "mlp", "hidden": [32, 32]},
    "local": {"learning_rate": 0.02, "epochs": 3, "batch_size": 16},
    "engine": {"lanes": 2, "rounds_per_chunk": 6},
}
methods = {
    "FedMut": {"name": "fedmut", "alpha": 1.0},
    "nearest": {"name": "fedqp", "form": "nearest", "alpha": 1.0},
    "joint": {"name": "fedqp", "form": "joint", "alpha": 1.0, "drift": 0.5},
}
quiet = Console(quiet=True)
runs = {
    name: run(config.from_dict({**settings, "name": name, "algorithm": part}), quiet).folder
    for name, part in methods.items()
}
inspected = inspect_runs([*runs.values()], what=["mutations"], settings=Settings(examples=300, batch_size=300))
display(Image(filename=inspected[0].files[1]))
display(Image(filename=inspected[1].files[1]))
Console(width=130).print(side_by_side(inspected))

# %% [markdown]
# ## Drift
#
# A mutant is the global model plus coefficients times the layers of g. Their mean over the cohort, weighted by the layers'
# shares, is how far the cohort as a whole starts ahead: FedMut's signs cancel but for α·β_t/2, QP-1's do not.
# `mutation/drift` of the records is that number; FedAvg with server momentum of the same size is the control to compare with.

# %%
figure = Figure(figsize=(7, 3.8), layout="constrained")
axes = figure.subplots()
for (name, path), style in zip(runs.items(), ("-", "--", "-."), strict=True):
    lines = [line for line in RunFolder(path).records() if line.get("mutation/drift") is not None]
    axes.plot([line["round"] for line in lines], [line["mutation/drift"] for line in lines], style, label=name)
    print(f"{name:8s} mean drift {np.mean([line['mutation/drift'] for line in lines[1:]]):+.2f}")
axes.set(xlabel="round", ylabel="drift (mean coefficient of g)")
axes.legend()
display(figure)
