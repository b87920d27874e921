"""The small quadratic programs that keep mutations at an acute angle with the global update.

Source: the nearest acute mutation is FedQP's (SEKE 2024, arXiv 2411.15847); margins, boxes, references and drift are
our formulation. All four forms work on coefficients: a mutation is (c_1 g_1, …, c_L g_L), and only the layers' shares
of ‖g‖² (or, for `referenced`, Gram matrices) enter.

| form | problem | solution |
|---|---|---|
| `nearest` | moved along g until its cosine is ≥ margin | closed form known, the solver's fallback |
| `boxed` | nearest in FedMut's box with inner product ≥ margin | closed form known, the solver's fallback |
| `joint` | the whole cohort, in fan and box, with a given mean coefficient | needs the solver |
| `referenced` | acute with several reference directions | needs the solver |
"""

from fedjax_qp.quadratic.geometry import (
    Report,
    check_drift,
    check_margin,
    cosines,
    full_precision,
    joint_feasible_range,
    shares_of,
)
from fedjax_qp.quadratic.joint import joint
from fedjax_qp.quadratic.references import referenced
from fedjax_qp.quadratic.single import boxed, nearest

__all__ = [
    "Report",
    "boxed",
    "check_drift",
    "check_margin",
    "cosines",
    "full_precision",
    "joint",
    "joint_feasible_range",
    "nearest",
    "referenced",
    "shares_of",
]
