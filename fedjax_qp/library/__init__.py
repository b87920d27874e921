"""The public face, `import fedjax_qp as fq`: parts as functions, runs that answer. Light to import: JAX comes with use."""

from fedjax_qp.library.parts import Arrays, constructor, constructor_names
from fedjax_qp.library.results import Comparison, Runs, compare, inspect, load
from fedjax_qp.library.running import run, simulate, sweep

__all__ = [
    "Arrays",
    "Comparison",
    "Runs",
    "compare",
    "constructor",
    "constructor_names",
    "inspect",
    "load",
    "run",
    "simulate",
    "sweep",
]
