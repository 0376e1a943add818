"""The suspect: a task that was in a crash, and therefore runs alone."""

from __future__ import annotations

from . import clock as time
from .claim import Claim

#: Seconds for which others like it follow it, as long as the worker is alone with them.
TURN = 0.25
#: Seconds that it waits at first until nothing else is held; nothing is claimed meanwhile.
PATIENCE = 0.5
#: Longest such wait.
MOST_PATIENCE = 60.0
#: How many times that long the worker then leaves suspects alone.
REST = 10


class Suspect:
    """The suspect that a worker holds, if any.

    It must not take others along if it crashes again, so it begins when the worker holds nothing
    else; a few more may then follow. If that takes too long it is given back, and the next one is
    waited for longer.
    """

    def __init__(self) -> None:
        self.claim: Claim | None = None
        self._runs = False
        #: Until when it waits, if it does.
        self.until = float("inf")
        self._patience = PATIENCE
        self._next = 0.0
        self._turn_until = 0.0

    @property
    def may_follow(self) -> bool:
        """Whether another one may be claimed at once."""
        return self.claim is None and time.monotonic() < self._turn_until

    @property
    def welcome(self) -> bool:
        """Whether one may be claimed by a worker that holds other tasks, too."""
        return self.claim is None and time.monotonic() >= self._next

    @property
    def waits(self) -> bool:
        """Whether it waits until it is alone."""
        return self.claim is not None and self.until < float("inf")

    def took(self, claim: Claim) -> None:
        """It has been claimed."""
        self.claim = claim
        self.until = time.monotonic() + self._patience

    def begins(self) -> Claim:
        """It is alone, and begins."""
        assert self.claim is not None
        self._runs = True
        self.until = float("inf")
        if self._turn_until == 0.0:
            self._turn_until = time.monotonic() + TURN
        return self.claim

    def ends_turn(self) -> None:
        self._turn_until = 0.0

    def gives_way(self) -> Claim | None:
        """Return the claim, to be given back, if it has waited for too long."""
        if time.monotonic() < self.until:
            return None
        self._next = time.monotonic() + REST * self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)
        self.until = float("inf")
        return self.claim

    def released(self) -> None:
        """It has come to an end, or been given back."""
        if self._runs:
            self._patience = PATIENCE
        self.claim, self._runs, self.until = None, False, float("inf")
