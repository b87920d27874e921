"""FedACG: clients start ahead of the global model, where the server's momentum would take it.

Source: Kim et al. 2024, "Communication-Efficient Federated Learning with Accelerated Client Gradient" (CVPR), algorithm 1:
clients start at w + λm and pay β/2·‖w_i − (w + λm)‖² for leaving it; then m ← λm + mean(w_i − start) and w ← w + m.

Without the penalty and with uniform weights it is FedQP's drift alone: m is the last global update g, and a cohort whose
mutants all are w + λg follows the same recursion.
"""

from typing import Annotated, Any

import jax
import optax
from pydantic import Field

from fedjax_qp.algorithms import algorithms
from fedjax_qp.algorithms.averaging import Server, averaging
from fedjax_qp.algorithms.local import Weighting
from fedjax_qp.federated import Algorithm, Cohort, Model, Params
from fedjax_qp.settings.values import Probability


@algorithms.register
def fedacg(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    momentum: Probability = 0.85,
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01,
    weighting: Weighting = "size",
) -> Algorithm:
    """Server momentum that the clients look ahead with, and a penalty that keeps them there.

    Args:
      momentum: λ, in the server's momentum and in the clients' look-ahead.
      proximal: β of the penalty.
    """
    server_optimizer = optax.sgd(1.0, momentum)

    def dispatch(server: Server, cohort: Cohort, key: Any) -> tuple[Params, tuple, dict]:
        descent = optax.tree.get(server.optimizer_state, "trace")  # of the pseudo-gradient: −m
        ahead = jax.tree.map(lambda here, slope: here - momentum * slope, server.params.trainable, descent)
        return server.params._replace(trainable=ahead), (), {}

    average = averaging(model, optimizer, server_optimizer, weighting=weighting, proximal=proximal)
    return average._replace(dispatch=dispatch)
