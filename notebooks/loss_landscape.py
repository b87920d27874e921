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
# # The loss landscape of a run
#
# What a checkpoint's loss looks like around it: along random directions and along the global update, how sharp it is at a
# radius, and its leading Hessian eigenvalues. FedAvg and FedQP on handwritten digits, one seed: it shows how the instruments
# are read, not which method is flatter.
#
# The same from a terminal: `fedjax-qp inspect RUN …`. Runs on a CPU in about two minutes.

# %%
# %matplotlib inline
import json
import tempfile
from pathlib import Path

from IPython.display import Image, display
from matplotlib.figure import Figure
from rich.console import Console

from fedjax_qp import config
from fedjax_qp.instruments.inspection import inspect_runs, numbers_file, side_by_side
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.runs.run import run

settings = {
    "rounds": 20,
    "folder": tempfile.mkdtemp(),
    "data": "digits",
    "partition": {"name": "dirichlet", "clients": 15, "beta": 0.1, "minimum": 5},
    "model": {"name": "mlp", "hidden": [32]},
    "local": {"learning_rate": 0.02, "epochs": 3, "batch_size": 16},
    "engine": {"lanes": 2, "rounds_per_chunk": 5},
    "checkpoints": {"keep": 4},
}
methods = {"FedAvg": {"name": "fedavg", "weighting": "uniform"}, "FedQP": {"name": "fedqp", "alpha": 1.0}}
quiet = Console(quiet=True)
runs = [
    run(config.from_dict({**settings, "name": name, "algorithm": part}), quiet).folder for name, part in methods.items()
]

# %% [markdown]
# ## Surfaces
#
# Directions are filter-normalised (Li et al. 2018): each filter of a random direction has the norm of the model's, so that
# two models with weights of different size can be compared. Left out of such pictures is everything but two directions: a
# flat-looking plane does not make a flat minimum.

# %%
what = ["surface", "sharpness", "curvature"]
small = Settings(examples=300, batch_size=300, grid=9, points=11, samples=5, krylov=15, probes=8)
inspected = inspect_runs(runs, what=what, settings=small)
for one in inspected:
    display(Image(filename=one.files[1]))

# %% [markdown]
# ## Numbers
#
# Sharpness is the rise of the loss at a radius: on average over random directions, and at what an adversary finds. The trace
# of the Hessian sums the curvature over all directions, as the random rise does; the largest eigenvalue is the curvature in
# the worst one, as the adversary's rise is. The two kinds need not agree.

# %%
Console(width=130).print(side_by_side(inspected))

# %% [markdown]
# ## Along a run
#
# Every checkpoint that was kept can be inspected. `headline` in the JSON files holds the few numbers of the table, the rest
# of the file what the figures were drawn from.

# %%
figure = Figure(figsize=(6.5, 3.8), layout="constrained")
axes = figure.subplots()
rounds = (5, 10, 15, 20)
for run_folder, label, style in zip(runs, methods, ("o-", "s--"), strict=True):
    largest = []
    for round in rounds:
        inspect_runs([run_folder], what=["curvature"], round=round, settings=small)
        found = json.loads(Path(numbers_file(run_folder, "curvature", round)).read_text())
        largest.append(found["largest"][0])
    axes.plot(rounds, largest, style, label=label)
axes.set(xlabel="round", ylabel="largest Hessian eigenvalue", xticks=rounds)
axes.legend()
display(figure)
