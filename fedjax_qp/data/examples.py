"""What a client trains on: images, or windows of text, and their labels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Shaped


class Examples(NamedTuple):
    """Labelled inputs, on the host (numpy) or on the device (JAX)."""

    inputs: Shaped[np.ndarray | Array, "N *shape"]  # bytes: pixels [N, H, W, C], codes of characters [N, T]; or rows
    labels: Shaped[np.ndarray | Array, "N *classes"]  # int32 [N]; of rows also [N, classes], see `dataset.Target`
