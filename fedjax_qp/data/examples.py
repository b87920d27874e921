"""What a client trains on: images and their labels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int32, UInt8


class Examples(NamedTuple):
    """Labelled images, on the host (numpy) or on the device (JAX)."""

    inputs: UInt8[np.ndarray | Array, "N H W C"]
    labels: Int32[np.ndarray | Array, "N"]
