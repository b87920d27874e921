"""The host's random numbers: one independent stream for each use, round and client.

NumPy pads the entropy of a seed with zeros, so that `(5,)`, `(5, 0)` and `(5, 0, 0)` name one and the same stream. Streams
are therefore always named by exactly four numbers, and every use has a number of its own here.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for. A number is never used again: results of earlier runs depend on it."""

    COHORT = 0  # who takes part in a round, who drops out, who is slow
    BATCHES = 1  # the order of a client's examples
    PREPARATION = 2  # the batches of a client's preparation
    PARTITION = 3  # which client owns which training example
    HELD_OUT = 4  # which of its own examples a client keeps for tests
    INSPECTION = 5  # which examples the instruments look at


def generator(seed: int, stream: Stream, *, round: int = 0, client: int = 0) -> np.random.Generator:
    """Returns the generator of one stream, the same in every process and on every machine."""
    return np.random.default_rng((seed, round, stream, client))
