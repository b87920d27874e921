"""Averaging methods: FedAvg, FedProx and FedOpt's server optimizers.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg);
Li et al. 2020, "Federated Optimization in Heterogeneous Networks" (FedProx); Hsu et al. 2019, "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification" (FedAvgM); Reddi et al. 2021, "Adaptive Federated
Optimization" (FedAdam, FedYogi).
"""

from typing import Annotated, Any, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import LocalState, Upload, Weighting, add, local_training, mean_update, report
from fedjax_qp.federated import Algorithm, Batch, Client, Model, Params
from fedjax_qp.registry import is_zero
from fedjax_qp.settings.values import Probability


class Server(NamedTuple):
    params: Params
    optimizer_state: PyTree


def averaging(
    model: Model,
    optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation,
    *,
    weighting: Weighting,
    proximal: float = 0.0,
) -> Algorithm:
    """The server takes the clients' mean difference, negated, as a gradient (Reddi et al. 2021, algorithm 1).

    Args:
      server_optimizer: optax transformation of the pseudo-gradient; `optax.sgd(1.0)` is FedAvg.
      proximal: μ of FedProx's penalty ½μ‖w − w_global‖².
    """
    training = local_training(model, optimizer)

    def init_server(params: Params, clients: int) -> Server:
        return Server(params, server_optimizer.init(params.trainable))

    def start(shared: Params, own: tuple, memory: tuple, key: Any) -> LocalState:
        return training.start(shared)

    def step(frozen: PyTree, shared: Params, carry: LocalState, batch: Batch, key: Any) -> LocalState:
        def pull(trainable: PyTree) -> PyTree:
            return jax.tree.map(lambda here, there: proximal * (here - there), trainable, shared.trainable)

        return training.step(frozen, carry, batch, key, None if is_zero(proximal) else pull)

    def finish(shared: Params, carry: LocalState, client: Client) -> tuple:
        upload, metrics = report(carry, shared.trainable, shared, client, weighting)
        return upload, (), metrics

    def combine(server: Server, total: Upload, key: Any) -> tuple[Server, dict[str, Array]]:
        mean, metrics = mean_update(total)
        gradient = jax.tree.map(lambda leaf: -leaf, mean.trainable)
        updates, state = server_optimizer.update(gradient, server.optimizer_state, server.params.trainable)
        trainable = optax.apply_updates(server.params.trainable, updates)
        params = Params(trainable, add(server.params.statistics, mean.statistics))
        return Server(params, state), metrics

    return Algorithm(
        init_server=init_server,
        start=start,
        step=step,
        finish=finish,
        combine=combine,
    )


Positive = Annotated[float, Field(gt=0)]


@algorithms.register
def fedavg(model: Model, optimizer: optax.GradientTransformation, *, weighting: Weighting = "size") -> Algorithm:
    """Averages the clients' models, by number of examples or uniformly."""
    return averaging(model, optimizer, optax.sgd(1.0), weighting=weighting)


@algorithms.register
def fedprox(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    proximal: Annotated[float, Field(ge=0)] = 0.01,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedAvg with a penalty on the distance to the global model."""
    return averaging(model, optimizer, optax.sgd(1.0), weighting=weighting, proximal=proximal)


@algorithms.register
def fedavgm(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    momentum: Probability = 0.9,
    server_learning_rate: Positive = 1.0,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedAvg with momentum on the server: heavy ball on the pseudo-gradient."""
    return averaging(model, optimizer, optax.sgd(server_learning_rate, momentum), weighting=weighting)


@algorithms.register
def fedadam(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    server_learning_rate: Positive = 0.01,
    beta1: Probability = 0.9,
    beta2: Probability = 0.99,
    adaptivity: Positive = 1e-3,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedAvg with Adam on the server.

    Deviations from algorithm 2 of the paper: clients are weighted by size (there uniformly, `weighting: uniform`); and two
    of optax's: the moments' initial bias is corrected, and v starts at 0, where the paper asks for at least adaptivity². So
    first steps are larger (twenty times where the updates are far below `adaptivity`).
    """
    server_optimizer = optax.adam(server_learning_rate, beta1, beta2, eps=adaptivity)
    return averaging(model, optimizer, server_optimizer, weighting=weighting)


@algorithms.register
def fedyogi(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    server_learning_rate: Positive = 0.01,
    beta1: Probability = 0.9,
    beta2: Probability = 0.99,
    adaptivity: Positive = 1e-3,
    weighting: Weighting = "size",
) -> Algorithm:
    """FedAvg with Yogi on the server.

    Deviations from algorithm 2 of the paper: clients are weighted by size (there uniformly, `weighting: uniform`); and two
    of optax's: the moments' initial bias is corrected, and both start at 1e-6, whatever `adaptivity` is; the paper asks for
    0 and at least adaptivity².
    """
    server_optimizer = optax.yogi(server_learning_rate, beta1, beta2, eps=adaptivity)
    return averaging(model, optimizer, server_optimizer, weighting=weighting)
