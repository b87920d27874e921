"""The methods, one idea a file, under their names.

A method is a function `(model, optimizer, *, options) -> Algorithm`: `optimizer` is the clients' optax transformation. To
add one, write a file here that registers such a function: every file of this folder is imported.

Options that are floats may be arrays when runs with different values share a program (`runs.programs`): compute with
them, do not branch on them (`registry.is_zero` tells a plain 0). Options of other types are always plain values.
"""

from fedjax_qp.registry import Registry, import_modules

algorithms = Registry("algorithm")

import_modules(__name__, __path__)
