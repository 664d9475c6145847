"""How often a fault or an odd input was tried, and how often nothing was lost by it."""

from collections.abc import Callable
from typing import NamedTuple

Advance = Callable[[float], None]  # called with 1 after each trial


class Outcome(NamedTuple):
    """A row of the reliability table.

    Attributes:
        fault: What was done.
        tried: How often.
        survived: How often it came out as it should.
        note: What "as it should" means, with the figures that show it.
    """

    fault: str
    tried: int
    survived: int
    note: str = ""
