"""Training examples that stay on the host: each device is sent those of its own lanes, chunk by chunk.

For training sets that exceed a device's memory, or that eight devices need not hold eight times.
"""

import jax
import numpy as np
from jaxtyping import Int, PyTree

from fedjax_qp.engine.plan import IDLE, Plan


class HostExamples:
    """The training set of a run, and the tables that its chunks need."""

    def __init__(self, train: PyTree, devices: int):
        """Args: train: arrays [N, ...]; devices: how many share the lanes."""
        self.train, self.devices = train, devices
        self._rows = 1

    def take(self, plan: Plan) -> tuple[Plan, PyTree]:
        """A plan whose indices point into the table of each lane's device, and the tables, one after another.

        Returns:
          The plan, and arrays [devices · rows, ...]. The number of rows is a power of two (or N) that never shrinks, so that
          few chunks find a program of another shape.
        """
        parts = (plan.lanes.examples, plan.preparations.examples)
        by_device = zip(*(np.split(np.asarray(part), self.devices) for part in parts), strict=True)
        found = [_used(own) for own in by_device]
        most = max(len(used) for used, _ in found)
        total = len(jax.tree.leaves(self.train)[0])
        self._rows = max(self._rows, min(total, 1 << (most - 1).bit_length()))
        taken = np.concatenate([np.resize(used, self._rows) for used, _ in found])
        lanes, preparations = (np.concatenate(indices) for indices in zip(*(own for _, own in found), strict=True))
        local = plan._replace(
            lanes=plan.lanes._replace(examples=lanes), preparations=plan.preparations._replace(examples=preparations)
        )
        return local, jax.tree.map(lambda leaf: leaf[taken], self.train)


def _used(parts: tuple[Int[np.ndarray, "..."], ...]) -> tuple[Int[np.ndarray, "U"], list[Int[np.ndarray, "..."]]]:
    """The examples that some indices name (one at least, so that a table is never empty), and the places among them."""
    everything = np.unique(np.concatenate([part.ravel() for part in parts]))
    used = everything[everything != IDLE] if (everything != IDLE).any() else np.zeros(1, np.int32)
    return used, [np.where(part == IDLE, IDLE, np.searchsorted(used, part)).astype(np.int32) for part in parts]
