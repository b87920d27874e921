"""How evenly a model serves the clients: its accuracy for each of them, and quantiles over them.

Two accuracies of a client: on test examples in the client's own mixture of classes (weighing the accuracies of the classes,
as the records do), and on its own training examples. The latter is what a method that remembers its clients (Ditto) serves
them with; the former is the global model's.

Source: fairness as the spread of accuracy over clients: Li et al. 2020, "Fair Resource Allocation in Federated Learning".
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from fedjax_qp.engine.evaluation import PersonalTests, evaluate, evaluate_clients, even_batches
from fedjax_qp.engine.plan import IDLE
from fedjax_qp.experiment import Experiment
from fedjax_qp.instruments.drawing import curve_style, new_figure, place_legend, style_axes
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.instruments.subject import Subject
from fedjax_qp.runs.records import mixture_accuracy, quotient
from fedjax_qp.streams import Stream, generator

VIEWS = {"mixture": "test examples, client's mixture of classes", "training": "client's own training examples"}
_evaluate = jax.jit(evaluate, static_argnums=(0, 4))
_evaluate_clients = jax.jit(evaluate_clients, static_argnums=(0, 2, 5, 6))
_QUANTILES = {"worst": 0.0, "q05": 0.05, "q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "best": 1.0}


def measure(subject: Subject, settings: Settings) -> dict[str, Any]:
    """Tests the model for every client.

    Returns:
      "size", the clients' training examples; of each view "accuracy" (a list over all K clients, None where nothing could be
      tested) and "spread": quantiles, mean and standard deviation over clients.
    """
    experiment = subject.run.experiment
    found = {"mixture": _by_mixture(subject), "training": _by_training(subject, settings)}
    result: dict[str, Any] = {"size": [len(part) for part in experiment.task.parts]}
    for view, accuracy in found.items():
        known = accuracy[np.isfinite(accuracy)]
        values = [float(value) if np.isfinite(value) else None for value in accuracy]
        result[view] = {"accuracy": values, "spread": _spread(known)}
    return result


def headline(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for the table."""
    names = ("mean", "q10", "worst", "deviation")
    return {f"client accuracy, {view}, {name}": result[view]["spread"][name] for view in VIEWS for name in names}


def draw(result: dict[str, Any], title: str, path: Path) -> Figure:
    """Draws the clients' accuracies in order, and against the number of their examples."""
    figure, (ordered, by_size) = new_figure(2, title)
    for index, (view, label) in enumerate(VIEWS.items()):
        pairs = [(size, a) for size, a in zip(result["size"], result[view]["accuracy"], strict=True) if a is not None]
        if not pairs:
            continue
        sizes, values = (np.array(column, float) for column in zip(*pairs, strict=True))
        style = curve_style(index, marker="")
        ordered.plot(np.linspace(0, 100, len(values)), 100 * np.sort(values), label=label, **style)
        marks = curve_style(index, linestyle="none", markerfacecolor="none" if index else style["color"])
        by_size.plot(sizes, 100 * values, label=label, **marks)
    ordered.set(xlabel="clients, worst first (%)", ylabel="accuracy (%)")
    ordered.axvline(10, color="0.4", linewidth=1, linestyle=":", label="worst tenth")
    by_size.set(xlabel="training examples of the client", ylabel="accuracy (%)", xscale="log")
    for axes in (ordered, by_size):
        style_axes(axes)
        place_legend(axes)
    figure.savefig(path, dpi=150)
    return figure


def _by_mixture(subject: Subject) -> Float[np.ndarray, "K"]:
    experiment = subject.run.experiment
    sums = _evaluate(experiment.model, experiment.task.frozen, subject.params, experiment.task.test, None)
    correct, count = (np.asarray(sums[name], float) for name in ("correct", "count"))
    assert experiment.task.shares is not None, "runs of language models are refused before"
    return mixture_accuracy(quotient(correct, count), experiment.task.shares)


def _by_training(subject: Subject, settings: Settings) -> Float[np.ndarray, "K"]:
    experiment = subject.run.experiment
    sums = _evaluate_clients(
        experiment.model,
        experiment.task.frozen,
        experiment.algorithm.serve,
        subject.state,
        _own_examples(experiment, settings),
        min(settings.lanes, len(experiment.task.parts)),
        None,
    )
    correct, count = (np.asarray(sums[name], float).sum(-1) for name in ("correct", "count"))
    return quotient(correct, count)


def _own_examples(experiment: Experiment, settings: Settings) -> PersonalTests:
    """Every client's training examples, or a sample of them, as its own tests."""
    parts, numbers = experiment.task.parts, generator(settings.seed, Stream.INSPECTION)
    most = min(settings.client_examples, max(len(part) for part in parts))
    batches, size = even_batches(most, settings.batch_size)
    indices = np.full((len(parts), batches * size), IDLE)
    for row, part in zip(indices, parts, strict=True):
        row[: min(len(part), most)] = numbers.permutation(part)[:most]
    indices = indices.reshape(len(parts), -1, size)
    examples = jax.tree.map(lambda leaf: leaf[np.maximum(indices, 0)], experiment.task.train)
    return PersonalTests(examples, indices != IDLE)


def _spread(values: Float[np.ndarray, "K"]) -> dict[str, float]:
    """NaN where no client could be tested, since no class that they train on is in the test set."""
    if not len(values):
        return dict.fromkeys(("mean", "deviation", *_QUANTILES), math.nan)
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    named = {name: float(value) for name, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": float(values.mean()), "deviation": float(values.std()), **named}
