"""Settings that are valid but probably unintended."""

import dataclasses
from typing import Any

import jax

from fedjax_qp.config import to_dict
from fedjax_qp.experiment.assembly import Experiment
from fedjax_qp.experiment.parts import defaults


def advice(experiment: Experiment) -> list[str]:
    """Lists settings that are valid but probably unintended."""
    config, local, algorithm = experiment.config, experiment.config.local, experiment.algorithm
    found = []
    if algorithm.plain_sgd and local.optimizer == "sgd" and local.momentum > 0:
        found.append(
            f"local.momentum = {local.momentum:g}, but algorithm = {config.algorithm.name!r} is made for plain SGD and may "
            "diverge: set local.momentum=0."
        )
    usual = defaults(to_dict(config))
    if local.optimizer != "sgd" and local.momentum != usual["local"]["momentum"]:
        found.append(f"local.momentum = {local.momentum:g} has no effect: optimizer {local.optimizer} has none.")
    if (
        config.participation.straggler_work != usual["participation"]["straggler_work"]
        and not config.participation.stragglers
    ):
        found.append(
            f"participation.straggler_work = {config.participation.straggler_work:g} has no effect without "
            "participation.stragglers."
        )
    if experiment.task.language is None:
        found += [
            f"text.{name} = {value} has no effect: data = {config.data.name!r} has no instructions."
            for name, value in dataclasses.asdict(config.text).items()
            if value != usual["text"][name]
        ]
    if experiment.task.personal is None and _serves_clients(experiment):
        found.append(
            f"algorithm = {config.algorithm.name!r} makes a model for each client, but only the server's is tested: set "
            "partition.test=matched (or own), and the records hold personal accuracies."
        )
    share = config.partition.options["test_share"]
    if config.partition.options["test"] != "own" and share != usual["partition"]["test_share"]:
        found.append(f"partition.test_share = {share:g} has no effect without partition.test=own.")
    for option in algorithm.unused:
        if (value := config.algorithm.options[option]) != usual["algorithm"][option]:
            found.append(
                f"algorithm.{option} = {value} has no effect beside the other options of {config.algorithm.name}."
            )
    return found


def _serves_clients(experiment: Experiment) -> bool:
    """Whether the model that a client is evaluated with depends on the client."""

    def served(key: jax.Array) -> Any:
        params, clients = experiment.model.init(key), len(experiment.task.parts)
        server, memory = experiment.algorithm.init_server(params, clients), experiment.algorithm.init_client(params)
        memories = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * 2), memory)
        return jax.vmap(experiment.algorithm.serve, in_axes=(None, 0), out_axes=None, axis_size=2)(server, memories)

    try:
        jax.eval_shape(served, jax.random.key(0))
    except ValueError:  # the model has an axis of clients
        return True
    return False
