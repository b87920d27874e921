"""What a method wants watched. Imports no JAX: reports, which read it from a run's folder, need none."""

from typing import NamedTuple


class Watch(NamedTuple):
    """A metric of a method that users should see, or be warned of."""

    metric: str  # its name in the records
    label: str = ""  # what tables, which show its mean over rounds, and figures call it; "" keeps it out of them
    limit: float | None = None  # values from here on are worth a warning; figures say that they risk divergence
    # The warning, as a sentence that may begin after a colon. {value} stands for the largest value, {round} for its round,
    # {rounds} for the number of rounds that reach the limit.
    advice: str = ""
