"""What the instruments are set to. Light to import: the command line reads its options from here."""

import dataclasses
import math
from typing import Literal, get_args

from fedjax_qp.registry import ConfigurationError

What = Literal["surface", "sharpness", "curvature", "conflict", "mutations", "fairness"]
NAMES: tuple[What, ...] = get_args(What)

_COUNTS = ("examples", "batch_size", "lanes", "points", "grid", "lines", "samples", "ascent_steps")
_COUNTS += ("eigenvalues", "krylov", "probes", "draws", "client_examples", "replays")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every default of an inspection.

    Attributes:
      examples: training examples that loss, gradient and Hessian are means over.
      batch_size: examples in memory at a time.
      lanes: moved models evaluated side by side.
      seed: of the sample and of all random directions.
      points: on each line of the surface. With 11, 21, 31, … the mutants themselves are among them.
      grid: on each side of a plane of the surface; odd, so that the checkpoint is a point of it.
      lines: random lines, and mutations, that the surface is cut along.
      radii: of the sharpness: ‖ε‖ for random, adversarial and mutating directions; the share of a filter's norm for
        filter-normalised ones.
      samples: random directions at each radius.
      ascent_steps: of the stronger adversary; the other one takes a single step.
      eigenvalues: leading ones that are reported.
      krylov: steps of Lanczos.
      probes: of Hutchinson's trace.
      draws: cohorts of mutations in the angle histogram.
      replays: rounds that are run once more for the conflict over rounds, spread over the checkpoints that are kept.
      client_examples: cap on each client's training examples that are tested.
    """

    examples: int = 1000
    batch_size: int = 500
    lanes: int = 4
    seed: int = 0
    points: int = 21
    grid: int = 15
    lines: int = 3
    radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    samples: int = 20
    ascent_steps: int = 5
    eigenvalues: int = 5
    krylov: int = 30
    probes: int = 32
    draws: int = 50
    replays: int = 6
    client_examples: int = 200

    def __post_init__(self):
        """Raises ConfigurationError for a value out of range."""
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} = {getattr(self, name)} is not valid: it must be 1 or more.")
        if not self.radii or not all(math.isfinite(radius) and radius > 0 for radius in self.radii):
            raise ConfigurationError(f"radii = {self.radii} is not valid: give one or more positive numbers.")
        if self.seed < 0:
            raise ConfigurationError(f"seed = {self.seed} is not valid: it must be 0 or more.")
        for name in ("points", "grid"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                raise ConfigurationError(
                    f"{name} = {getattr(self, name)} is not valid: it must be odd and 3 or more, so that the checkpoint "
                    "itself is one of the points."
                )
        for name in ("samples", "probes"):
            if getattr(self, name) < 2:
                raise ConfigurationError(
                    f"{name} = {getattr(self, name)} is not valid: a standard error needs 2 or more."
                )
        if self.krylov < self.eigenvalues:
            raise ConfigurationError(
                f"krylov = {self.krylov} cannot give eigenvalues = {self.eigenvalues}: choose at least three times as "
                "many steps as eigenvalues."
            )
