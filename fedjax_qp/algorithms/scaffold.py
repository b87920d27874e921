"""SCAFFOLD: control variates take the difference between a client's gradient and everybody's out of its local steps.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (ICML), algorithm 1:
y_i ← y_i − η_l (g_i(y_i) − c_i + c) on the client, then x ← x + η_g/|S| Σ_S (y_i − x) and c ← c + 1/N Σ_S (c_i⁺ − c_i) on the
server: of N clients, those not in the cohort S keep their c_i, so that c stays the mean of all c_i.

Option I sets c_i⁺ to the gradient of all local data at x. Option II sets c_i⁺ = c_i − c + (x − y_i)/(K_i η_l), K_i being the
client's own number of steps. The steps sum to x − y_i = η_l Σ (g_i(y_i) − c_i + c), so this *is* the mean of the client's
gradients along its way, and is computed as such.

Deviations: that mean makes option II independent of the learning rate and of the local optimizer (with momentum m, dividing
by K_i η_l would give up to 1/(1 − m) times a gradient); the paper's experiments are plain SGD, `local.momentum: 0`. Option I
takes its gradient at x on the batches of the local steps, in the same pass: over whole epochs that is the gradient of all
local data, and costs as much again as the steps.
"""

from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.local import (
    LocalState,
    Upload,
    Weighting,
    add,
    counted,
    local_training,
    loss_gradient,
    mean_update,
    moved,
    report,
)
from fedjax_qp.federated import Algorithm, Batch, Client, Cohort, Model, Params


class ScaffoldServer(NamedTuple):
    params: Params
    control: PyTree  # c
    clients: Float[Array, ""]  # N


class Shared(NamedTuple):
    params: Params
    control: PyTree


class ScaffoldState(NamedTuple):
    """A client in training."""

    local: LocalState
    correction: PyTree  # c − c_i
    gradients: PyTree  # sum, of which c_i⁺ will be the weighted mean
    weight: Float[Array, ""]


class ScaffoldUpload(NamedTuple):
    average: Upload
    control: PyTree  # c_i⁺ − c_i


@algorithms.register
def scaffold(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    option: Literal["I", "II"] = "II",
    server_learning_rate: Annotated[float, Field(gt=0)] = 1.0,
    weighting: Weighting = "uniform",
) -> Algorithm:
    """Control variates take the clients' drift out of their gradients (SCAFFOLD).

    Args:
      option: how a client renews its control variate, see the module. The paper's experiments all use II; I was seen to
        diverge (LeNet, clients of few classes each) at a learning rate that option II tolerates.
      server_learning_rate: η_g.
      weighting: of the clients in the mean model; the paper's is uniform.
    """
    training = local_training(model, optimizer)

    def init_server(params: Params, clients: int) -> ScaffoldServer:
        return ScaffoldServer(params, zeros(params), jnp.asarray(clients, jnp.float32))

    def dispatch(server: ScaffoldServer, cohort: Cohort, key: Any) -> tuple[Shared, tuple, dict]:
        return Shared(server.params, server.control), (), {}

    def start(shared: Shared, own: tuple, memory: PyTree, key: Any) -> ScaffoldState:
        correction = jax.tree.map(jnp.subtract, shared.control, memory)
        return ScaffoldState(training.start(shared.params), correction, zeros(shared.params), jnp.zeros(()))

    def step(frozen: PyTree, shared: Shared, carry: ScaffoldState, batch: Batch, key: Any) -> ScaffoldState:
        found = loss_gradient(model.loss, frozen, carry.local.params, batch, key)
        if option == "I":
            weight = batch.mask.sum()
            controlling = loss_gradient(model.loss, frozen, shared.params, batch, key).gradient
        else:
            weight, controlling = 1, found.gradient
        gradients = jax.tree.map(lambda total, new: total + weight * new, carry.gradients, controlling)
        corrected = found._replace(gradient=add(found.gradient, carry.correction))
        local = moved(optimizer, carry.local, corrected, counted(model, batch))
        return ScaffoldState(local, carry.correction, gradients, carry.weight + weight)

    def finish(shared: Shared, carry: ScaffoldState, client: Client) -> tuple:
        average, metrics = report(carry.local, shared.params.trainable, shared.params, client, weighting)
        control = jax.tree.map(lambda total: total / carry.weight, carry.gradients)
        return ScaffoldUpload(average, jax.tree.map(jnp.subtract, control, client.memory)), control, metrics

    def combine(server: ScaffoldServer, total: ScaffoldUpload, key: Any) -> tuple[ScaffoldServer, dict[str, Array]]:
        mean, metrics = mean_update(total.average)
        further = jax.tree.map(lambda leaf: server_learning_rate * leaf, mean.trainable)
        params = add(server.params, mean._replace(trainable=further))
        control = jax.tree.map(lambda c, change: c + change / server.clients, server.control, total.control)
        return server._replace(params=params, control=control), metrics

    return Algorithm(
        init_server=init_server,
        init_client=zeros,
        dispatch=dispatch,
        start=start,
        step=step,
        finish=finish,
        combine=combine,
        plain_sgd=True,
        step_sizes=("server_learning_rate",),
    )


def zeros(params: Params) -> PyTree:
    """A control variate before the first round."""
    return jax.tree.map(jnp.zeros_like, params.trainable)
