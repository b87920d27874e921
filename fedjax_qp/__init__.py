"""fedjax_qp: a JAX simulator for federated learning.

Data flows one way: config → data → plan → round (jit) → run loop → records → plots. Start reading at `federated`.

    import fedjax_qp as fq

    runs = fq.run(
        data=fq.mnist5k(),
        partition=fq.dirichlet(clients=20, beta=0.3, minimum=5),
        model=fq.mlp(),
        methods={"FedAvg": fq.fedavg(weighting="uniform"), "FedQP": fq.fedqp(form="nearest", alpha=1.0)},
        local=fq.Local(learning_rate=0.05, momentum=0.0, epochs=1, batch_size=20),
        rounds=3,
        seeds=[0, 1],
    )
    runs.frame()  # 12 rows: method, seed, round, test_accuracy, …
    runs.compare(baseline="FedAvg")
    runs.plot("test_accuracy")

Every registered part (`fedjax-qp list`) is a function here: `fq.fedqp(alpha=1)` is what `{name: fedqp, alpha: 1}` is in a
configuration, with the same options and the same errors. `dir(fq)` names them all, `help(fq.fedqp)` explains one. Nothing is
loaded before its first use, JAX neither.
"""

from collections.abc import Callable as _Callable
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fedjax_qp.config import (
        Checkpoints,
        Config,
        Engine,
        Evaluation,
        Local,
        Mlflow,
        Part,
        Participation,
        Text,
        Tracking,
        Wandb,
    )
    from fedjax_qp.library import Arrays, Comparison, Runs, compare, inspect, load, run, simulate, sweep
    from fedjax_qp.registry import ConfigurationError

__all__ = [
    "Arrays",
    "Checkpoints",
    "Comparison",
    "Config",
    "ConfigurationError",
    "Engine",
    "Evaluation",
    "Local",
    "Mlflow",
    "Part",
    "Participation",
    "Runs",
    "Text",
    "Tracking",
    "Wandb",
    "compare",
    "inspect",
    "load",
    "run",
    "simulate",
    "sweep",
]

_HOMES = {
    **dict.fromkeys(__all__, "fedjax_qp.config"),
    **dict.fromkeys(("Arrays", "Comparison", "Runs", "compare", "inspect", "load"), "fedjax_qp.library"),
    **dict.fromkeys(("run", "simulate", "sweep"), "fedjax_qp.library"),
    "ConfigurationError": "fedjax_qp.registry",
}


def __getattr__(name: str) -> "_Callable[..., Part]":
    """Loads what is asked for; any name that is not above is a registered part's."""
    from importlib import import_module
    from importlib.util import find_spec

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is not None:  # a room is loaded by its own import
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("fedjax_qp.library").constructor(name)


def __dir__() -> list[str]:
    from fedjax_qp.library import constructor_names

    return sorted({*globals(), *__all__, *constructor_names()})
