"""Rotary position embedding and its scalings.

Source: Su et al., "RoFormer", 2021, in the half-split convention of Hugging Face's Llama: coordinate j of a head turns
together with coordinate j + head_size / 2, by the angle position · frequency_j.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from fedjax_qp.registry import ConfigurationError
from fedjax_qp.settings.values import shown

# What each scaling must state, by Hugging Face's names.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Rotation(NamedTuple):
    """By how much each position turns each pair of coordinates."""

    cosine: Float32[Array, "B T 1 half"]
    sine: Float32[Array, "B T 1 half"]


def scaling_type(scaling: Mapping | None) -> str:
    """Returns the name of a scaling.

    Raises:
      ConfigurationError: it is unknown or incomplete, or a number of it is out of range.
    """
    if scaling is None:
        return "default"
    name = scaling.get("rope_type")
    if not isinstance(name, str) or name not in SCALINGS:
        raise ConfigurationError(
            f"rotary scaling {shown(name)} is not supported. Valid rope_type: {', '.join(SCALINGS)}. "
            "Choose a model with one of these."
        )
    missing = [key for key in SCALINGS[name] if key not in scaling]
    if missing:
        raise ConfigurationError(
            f"rotary scaling {name!r} needs {', '.join(missing)}, but states {shown(dict(scaling))}."
        )
    for key in SCALINGS[name]:
        value = scaling[key]
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise ConfigurationError(
                f"rotary scaling {name!r}: {key} = {shown(value)} must be a number above 0. Check the model's "
                "configuration file."
            )
    if name == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigurationError(
            f"rotary scaling 'llama3': low_freq_factor = {scaling['low_freq_factor']} must be below high_freq_factor = "
            f"{scaling['high_freq_factor']}. Check the model's configuration file."
        )
    return name


def frequencies(head_size: int, theta: float, scaling: Mapping | None) -> Float32[np.ndarray, "half"]:
    """Returns the angle in radians by which each pair of coordinates turns from one position to the next.

    Args:
      head_size: coordinates of a head, an even number.
      theta: base of the geometric series of frequencies.
      scaling: Hugging Face's `rope_parameters`, or None. "dynamic" changes nothing up to the model's maximum length; longer
        sequences are refused elsewhere.

    Raises:
      ConfigurationError: the scaling is unknown or incomplete.
    """
    plain = theta ** -(np.arange(0, head_size, 2) / head_size)
    kind = scaling_type(scaling)
    if scaling is None or kind in ("default", "dynamic"):
        return plain.astype(np.float32)
    if kind == "linear":
        return (plain / scaling["factor"]).astype(np.float32)
    # Llama 3: waves that fit often into the original length stay, rare ones are stretched, a ramp lies between.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (share + (1 - share) / scaling["factor"])).astype(np.float32)


def rotation(frequency: Float32[np.ndarray, "half"], positions: Int[Array, "B T"]) -> Rotation:
    """Returns the turns at these positions, in float32 whatever the model's type."""
    angles = positions[..., None, None].astype(jnp.float32) * frequency
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(inputs: Float[Array, "B T heads head_size"], turn: Rotation) -> Float[Array, "B T heads head_size"]:
    """Turns queries or keys."""
    first, second = jnp.split(inputs, 2, axis=-1)
    turned = (first * turn.cosine - second * turn.sine, second * turn.cosine + first * turn.sine)
    return jnp.concatenate(turned, axis=-1).astype(inputs.dtype)
