"""How long a run takes until its first round begins. Timings stay out of the records so that these are reproducible."""

import time

from fedjax_qp.runs.folder import RunFolder


class Startup:
    """A stopwatch with phases; it starts when it is made."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, phase: str) -> None:
        """Gives the time since the last phase to this one."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def write(self, folder: RunFolder) -> None:
        """Leaves the times in a run's folder."""
        folder.startup.write({phase: round(value, 3) for phase, value in self.seconds.items()})

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in self.seconds.items())
        return f"the first round begins after {sum(self.seconds.values()):.1f} s ({phases})"
