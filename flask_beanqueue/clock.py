"""The clock that loops go by. Nobody can set it, nor freeze it."""

from __future__ import annotations

from time import CLOCK_MONOTONIC, clock_gettime


def monotonic() -> float:
    """Return seconds of a clock that only goes forward.

    Not ``time.monotonic``, which tests that freeze time replace (freezegun does, in all modules):
    a loop that waits for a frozen clock would wait for ever.
    """
    return clock_gettime(CLOCK_MONOTONIC)
