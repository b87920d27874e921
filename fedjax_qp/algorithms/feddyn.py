"""FedDyn: every client's loss gets a linear term that makes the clients' optima agree with the global one.

Source: Acar et al. 2021, "Federated Learning Based on Dynamic Regularization" (ICLR), algorithm 1. Client k of m minimises
L_k(θ) − ⟨g_k, θ⟩ + α/2 ‖θ − θ^{t−1}‖² and then sets g_k ← g_k − α(θ_k − θ^{t−1}); the server sets
h ← h − α/m Σ_{k in the cohort P} (θ_k − θ^{t−1}) and θ^t = 1/|P| Σ_P θ_k − h/α.

Written without the α that cancels: g_k = −α·D_k, where D_k is the sum of the client's moves θ_k − θ^{t−1} over its rounds,
and −h/α is the mean of D_k over *all m* clients. So the server moves by the cohort's mean move and, once more in every round,
by that mean of all past moves. For α → 0 the clients' work becomes FedAvg's, but the server's does not.

θ^t is what the clients start from and what algorithm 1 returns. The published code tests the cohort's mean model instead,
1/|P| Σ_P θ_k; `served: average` does so too.

Deviations: the local optimizer is free (the paper: plain SGD, so `local.momentum: 0`), takes the usual number of steps
instead of going to the minimum, and starts at θ^{t−1}. Batch-norm statistics are averaged over the cohort. The published code
further divides α by the client's share of the examples and adds weight decay; the paper's algorithm does neither.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import LocalState, Upload, add, local_training, mean_update, report
from fedjax_qp.federated import Algorithm, Batch, Client, Model, Params


class FeddynServer(NamedTuple):
    params: Params
    moves: PyTree  # −h/α, the mean of D_k over all clients
    clients: Float[Array, ""]  # m


class FeddynState(NamedTuple):
    """A client in training."""

    local: LocalState
    moves: PyTree  # D_k


@algorithms.register
def feddyn(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    alpha: Annotated[float, Field(ge=0)] = 0.01,
    served: Literal["server", "average"] = "server",
) -> Algorithm:
    """A linear term in each client's loss makes the clients' optima agree with the global one (FedDyn).

    Args:
      alpha: α; the paper's choices are 0.1, 0.01 and 0.001.
      served: the model that is tested: the server's θ^t, or the mean of the cohort's models. Training does not depend on it.
    """
    training = local_training(model, optimizer)

    def init_client(params: Params) -> PyTree:
        return jax.tree.map(jnp.zeros_like, params.trainable)

    def init_server(params: Params, clients: int) -> FeddynServer:
        return FeddynServer(params, init_client(params), jnp.asarray(clients, jnp.float32))

    def start(shared: Params, own: tuple, memory: PyTree, key: Any) -> FeddynState:
        return FeddynState(training.start(shared), memory)

    def step(frozen: PyTree, shared: Params, carry: FeddynState, batch: Batch, key: Any) -> FeddynState:
        def pull(trainable: PyTree) -> PyTree:
            return jax.tree.map(lambda d, w, begun: alpha * (d + w - begun), carry.moves, trainable, shared.trainable)

        return FeddynState(training.step(frozen, carry.local, batch, key, pull), carry.moves)

    def finish(shared: Params, carry: FeddynState, client: Client) -> tuple:
        upload, metrics = report(carry.local, shared.trainable, shared, client, "uniform")
        return upload, add(client.memory, upload.update.trainable), metrics

    def combine(server: FeddynServer, total: Upload, key: Any) -> tuple[FeddynServer, dict[str, Array]]:
        mean, metrics = mean_update(total)
        moves = jax.tree.map(lambda d, new: d + new / server.clients, server.moves, total.update.trainable)
        params = add(server.params, mean._replace(trainable=add(mean.trainable, moves)))
        return server._replace(params=params, moves=moves), metrics

    def serve(server: FeddynServer, memory: PyTree) -> Params:
        if served == "server":
            return server.params
        return server.params._replace(trainable=jax.tree.map(jnp.subtract, server.params.trainable, server.moves))

    return Algorithm(
        init_server=init_server,
        init_client=init_client,
        start=start,
        step=step,
        finish=finish,
        combine=combine,
        serve=serve,
        plain_sgd=True,
    )
