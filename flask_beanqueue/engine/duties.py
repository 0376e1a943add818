"""Duties: what the loop does every so often, beside its tasks."""

from __future__ import annotations

import typing as t

from sqlalchemy.engine import Connection

from .. import clock as time


class Duty:
    """Something that the loop does from time to time.

    :param run: does it, and returns after how many seconds it is due again.
    :param retry_after: seconds until then if it raises.
    :param at: when it is due first, by the monotonic clock.
    """

    def __init__(
        self,
        run: t.Callable[[Connection], float],
        *,
        retry_after: float = 5.0,
        at: float = 0.0,
    ) -> None:
        self._run = run
        self._retry_after = retry_after
        self._soon = False
        self.at = at

    def soon(self) -> None:
        """Let it be due at once, also if it is being done at the moment. For any thread."""
        self._soon = True
        self.at = 0.0

    def do(self, connection: Connection) -> None:
        self._soon = False
        self.at = time.monotonic() + self._retry_after
        try:
            self.at = time.monotonic() + self._run(connection)
        finally:
            if self._soon:
                self.at = 0.0
