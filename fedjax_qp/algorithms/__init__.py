"""The methods, one idea a file, under their names.

A method is a function `(loss, optimizer, *, options) -> Algorithm`: `loss` as in `Model.loss`, `optimizer` the clients'
optax transformation. To add one, write a file here that registers such a function and import it below.
"""

from fedjax_qp.registry import Registry

algorithms = Registry("algorithm")

from fedjax_qp.algorithms import averaging, fedmut, fedqp  # noqa: E402, F401
