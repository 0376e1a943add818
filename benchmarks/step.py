"""A step of the run: one thing that is measured of one system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

#: What a step has measured, by name; times are in seconds.
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """:param measure: what is measured; a file of :mod:`benchmarks.measures`.
    :param case: under which conditions; empty where there is but one.
    :param system: of what, in words.
    :param run: measures it.
    :param seconds: about how long that takes.
    :param rounds: in how many rounds at most.
    :param worth: whether it is worth measuring in a round, 0 being the first, when all that comes
        before has been measured.
    :param odds: how likely that is in the first round, and in each other one.
    """

    measure: str
    case: str
    system: str
    run: Callable[[], Figures]
    seconds: float
    rounds: int = 99
    worth: Callable[[int], bool] = lambda turn: True
    odds: tuple[float, float] = (1.0, 1.0)

    def takes(self, turn: int) -> float:
        """Seconds to expect in a round."""
        return self.seconds * self.odds[turn > 0]

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.measure, self.case, self.system)))
