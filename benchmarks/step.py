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
    :param again: whether it is worth another round, after the first; how likely that is, is in
        ``odds``.
    """

    measure: str
    case: str
    system: str
    run: Callable[[], Figures]
    seconds: float
    rounds: int = 99
    again: Callable[[], bool] = lambda: True
    odds: float = 1.0

    def takes(self, turn: int) -> float:
        """Seconds to expect in a round."""
        return self.seconds * (self.odds if turn else 1.0)

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.measure, self.case, self.system)))
