"""Device side: runs a plan. The only folder that knows vmap, scan, meshes, shard_map and pmap.

One program runs a whole chunk of rounds: a loop over rounds around a loop over steps around `vmap` over lanes, with
evaluation inside. A lane runs its clients one after another: at a client's first step it loads the start model, at its
last it adds the upload to the round's sum. That boundary work sits under a scalar `lax.cond`, so ordinary steps do not
pay for it. The number of steps and of rounds are dynamic trip counts: nothing is recompiled from round to round.

All arrays have an axis of runs: several runs of one method may share a program. A lane then trains a client of any of them,
server functions are vmapped over the runs, and uploads are summed by run. A run alone is folded where the program is made.

Several devices split the lanes; everything else is replicated (the training examples only unless they stay on the host, see
`host_data`), and the devices meet in one sum at the end of a round. Each group of lanes may have several devices that share
the frozen weights (see `mesh`).
"""

from fedjax_qp.engine.chunk import Data, Method, Runs
from fedjax_qp.engine.evaluation import PersonalTests, TestSet, cut_client_tests, cut_test_set
from fedjax_qp.engine.layout import Layout
from fedjax_qp.engine.mesh import (
    AXIS,
    Engine,
    Program,
    bytes_needed,
    host_copy,
    make_engine,
    make_program,
)

__all__ = [
    "AXIS",
    "Data",
    "Engine",
    "Layout",
    "Method",
    "PersonalTests",
    "Program",
    "Runs",
    "TestSet",
    "bytes_needed",
    "cut_client_tests",
    "cut_test_set",
    "host_copy",
    "make_engine",
    "make_program",
]
