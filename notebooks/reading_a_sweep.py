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
# # Reading a sweep
#
# A sweep is a YAML file, or a dictionary as here: a base configuration, what varies, which seeds. Runs that differ in numbers
# only (seeds, learning rates, α) share one program; the rest are tasks for Dask's workers. `fedjax-qp sweep FILE` does the
# same from a terminal; either continues what the other began.
#
# Runs on a CPU in about two minutes, with data that is installed with the package.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import pandas as pd
from IPython.display import Image, display
from matplotlib.figure import Figure
from rich.console import Console

from fedjax_qp import config
from fedjax_qp.sweeps import space
from fedjax_qp.sweeps.results import table
from fedjax_qp.sweeps.run import run_sweep

folder = Path(tempfile.mkdtemp())
base = config.from_dict(
    {
        "name": "digits",
        "rounds": 15,
        "data": "digits",
        "partition": {"name": "dirichlet", "clients": 15, "beta": 0.1, "minimum": 5},
        "model": {"name": "mlp", "hidden": [32]},
        "algorithm": "fedavg",
        "local": {"learning_rate": 0.02, "epochs": 2, "batch_size": 16},
        "engine": {"lanes": 4, "rounds_per_chunk": 5},
    }
)
config.save(base, folder / "digits.yaml")
sweep = space.from_dict(
    {
        "name": "alpha-and-rate",
        "config": str(folder / "digits.yaml"),
        "folder": str(folder),
        "seeds": [0, 1, 2],
        "search": "grid",
        "workers": 1,
        "space": {"local.learning_rate": [0.01, 0.03]},
        "variants": [
            {"name": "fedavg", "settings": {"algorithm": "fedavg", "algorithm.weighting": "uniform"}},
            {"name": "fedqp", "settings": {"algorithm": "fedqp"}, "space": {"algorithm.alpha": [0.5, 1.0]}},
        ],
        "rank": {"metric": "test_accuracy", "last": 5},
    }
)
outcome = run_sweep(sweep, Console(quiet=True))
Console(width=120).print(table(sweep, outcome.trials))

# %% [markdown]
# ## One tidy table
#
# `results.csv` in the sweep's folder has one row for each trial, seed and evaluation, with the settings as columns. So
# every question is a selection and a mean. Which learning rate does each method like?

# %%
frame = pd.read_csv(outcome.folder / "results.csv")
late = frame[frame["round"] > 10]
print(late.pivot_table(index="variant", columns="local.learning_rate", values="test_accuracy").round(3))

# %% [markdown]
# Spread over seeds decides whether a difference means anything: take the mean over the last rounds of each run first, then
# the deviation over runs.

# %%
of_run = late.groupby(["variant", "trial", "seed"])["test_accuracy"].mean()
print(of_run.groupby(["variant", "trial"]).agg(["mean", "std", "count"]).round(3))

# %% [markdown]
# ## Curves
#
# The sweep draws the best trial of each variant with its spread, and the space that was searched; anything else is a plot of
# the same table. `optuna-dashboard` shows `study.log` in the sweep's folder.

# %%
for image in sorted(outcome.folder.glob("*.png")):
    display(Image(filename=image))

# %%
figure = Figure(figsize=(6.5, 3.8), layout="constrained")
axes = figure.subplots()
styles = iter(("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1))))
for (variant, rate), rows in frame.groupby(["variant", "local.learning_rate"]):
    curve = rows.groupby("round")["test_loss"].mean()
    axes.plot(curve.index, curve, linestyle=next(styles), label=f"{variant}, learning rate {rate}")
axes.set(xlabel="round", ylabel="test loss (nats), mean over seeds and α")
axes.legend(fontsize=8)
display(figure)
