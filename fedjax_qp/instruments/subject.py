"""What the instruments look at: a run, and its model at one checkpoint."""

import dataclasses
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fedjax_qp.algorithms.fedmut import MutationServer
from fedjax_qp.config import Config, Part
from fedjax_qp.engine import cut_test_set
from fedjax_qp.engine.layout import fewest_lanes
from fedjax_qp.experiment import Experiment, build, first_state, kind_of, method
from fedjax_qp.federated import Algorithm, FederatedState, Params
from fedjax_qp.instruments.objective import Objective
from fedjax_qp.instruments.replay import Replay, make_replay
from fedjax_qp.instruments.settings import Settings
from fedjax_qp.registry import ConfigurationError
from fedjax_qp.runs.folder import RunFolder
from fedjax_qp.runs.programs import layout_of
from fedjax_qp.runs.provenance import provenance
from fedjax_qp.settings import plugins
from fedjax_qp.streams import Stream, generator

Source = Literal["last", "next"]


class Update(NamedTuple):
    """The global update g at a checkpoint of round r."""

    tree: PyTree
    source: Source  # "last": w^r − w^{r−1}; "next": w^{r+1} − w^r, where the one before is not known


class InspectedRun(NamedTuple):
    """A run folder, opened for its checkpoints."""

    folder: Path
    experiment: Experiment
    kept: tuple[int, ...]  # rounds that have a checkpoint
    history: list[dict]  # its records
    replay: Replay
    fedmut: Algorithm | None  # draws the mutations that the run's method starts from; None where it has none


class Subject(NamedTuple):
    """A run's global model after some round."""

    run: InspectedRun
    round: int
    state: FederatedState
    params: Params
    objective: Objective
    update: Update | None = None  # filled in by `with_update`


def open_run(folder: Path, like: InspectedRun | None = None) -> InspectedRun:
    """Opens a run folder; nothing is computed yet.

    Args:
      like: a run whose data and model are taken where the settings that make them are the same; then the instruments'
        programs are shared too.

    Raises:
      ConfigurationError: no run in the folder, one of a language model, or one without a checkpoint.
    """
    read = RunFolder(folder)
    config = read.config()
    plugins.load_of_run(read.plugins, config.plugins)
    if kind_of(config).tunes_adapters:
        raise ConfigurationError(
            f"{folder} is a run of the language model {config.model.name!r}, whose clients have models of their own: the "
            "instruments look at one global model. Use `fedjax-qp compare` for perplexities, or give a run on images."
        )
    kept = tuple(read.saved_rounds())
    if not kept:
        raise ConfigurationError(f"{folder} has no checkpoint yet: let it run, or `fedjax-qp resume {folder}`.")
    experiment = build(_on_one_device(config), like.experiment if like is not None else None)
    layout = layout_of(read) or fewest_lanes(experiment.config.engine)
    if experiment.task.shares is None:
        raise ConfigurationError(
            f"{folder} predicts no classes (data = {config.data.name!r}), by which the instruments measure: give a run that "
            "does."
        )
    (made_of,) = provenance([experiment])
    made_of.check(read, warnings.warn)
    return InspectedRun(
        folder, experiment, kept, read.records(), make_replay(experiment, layout.lanes), _fedmut(experiment)
    )


def load(run: InspectedRun, round: int | None, settings: Settings) -> Subject:
    """Reads a run's checkpoint of a round, by default its newest, and draws the sample of training examples.

    Raises:
      ConfigurationError: there is no checkpoint of that round, or it is damaged.
    """
    round = run.kept[-1] if round is None else round
    state = state_at(run, round)
    experiment = run.experiment
    params: Params = experiment.algorithm.serve(state.server, ())
    taken = _sample(experiment.task.parts, settings)
    examples = jax.tree.map(lambda leaf: leaf[taken], experiment.task.train)
    points = cut_test_set(examples, min(settings.batch_size, len(taken)))
    return Subject(run, round, state, params, Objective(experiment.task.frozen, params.statistics, points))


def state_at(run: InspectedRun, round: int) -> FederatedState:
    """The state after a round that has a checkpoint.

    Raises:
      ConfigurationError: it has none, or a damaged one.
    """
    if round not in run.kept:
        raise ConfigurationError(
            f"{run.folder} has no checkpoint of round {round}: choose one of {', '.join(map(str, run.kept))}, or run it "
            "with a larger checkpoints.keep and a smaller engine.rounds_per_chunk."
        )
    with RunFolder(run.folder).checkpoints() as checkpoints:
        return checkpoints.restore_round(first_state(run.experiment), round)


def with_update(subject: Subject) -> Subject:
    """The subject with its global update: w^r − w^{r−1} where the server remembers it or that checkpoint is kept.

    Otherwise the next round is run, and the update is w^{r+1} − w^r.
    """
    if subject.update is not None:
        return subject
    run, server, here = subject.run, subject.state.server, subject.params.trainable
    if isinstance(server, MutationServer) and subject.round > 0:
        return subject._replace(update=Update(server.update, "last"))
    serve = run.experiment.algorithm.serve

    def difference(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new, old)

    if subject.round - 1 in run.kept:
        before = serve(state_at(run, subject.round - 1).server, ()).trainable
        return subject._replace(update=Update(difference(here, before), "last"))
    after = serve(run.replay(subject.state).server, ()).trainable
    return subject._replace(update=Update(difference(after, here), "next"))


def update_number(source: str) -> dict[str, float]:
    """Which update g was, as a number beside the others: runs can only be compared along g where it is the same."""
    return {"g is the last update (0) or the next (1)": float(source == "next")}


def global_update(subject: Subject) -> PyTree:
    """g of a subject that `with_update` gave."""
    assert subject.update is not None, "call with_update first"
    return subject.update.tree


def _fedmut(experiment: Experiment) -> Algorithm | None:
    """FedMut with the options of its draw, which FedQP shares."""
    config = experiment.config
    if config.algorithm.name not in ("fedmut", "fedqp"):
        return None
    options = {name: config.algorithm.options[name] for name in ("alpha", "beta0", "mutation_rounds")}
    return method(dataclasses.replace(config, algorithm=Part("fedmut", options)), experiment.model)({})


def _on_one_device(config: Config) -> Config:
    """A run may be inspected on a smaller machine than it ran on."""
    engine = dataclasses.replace(config.engine, parallel="vmap", devices=1, model_devices=1)
    return dataclasses.replace(config, engine=engine)


def _sample(parts: list[np.ndarray], settings: Settings) -> np.ndarray:
    """Indices of some of all clients' training examples; the same for equal data and settings, whatever the partition."""
    everything = np.unique(np.concatenate(parts))
    count = min(settings.examples, len(everything))
    return np.sort(generator(settings.seed, Stream.INSPECTION).choice(everything, count, replace=False))
