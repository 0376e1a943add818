"""The claimer: how a worker claims, also where the database lets it claim some tasks only."""

from __future__ import annotations

import functools
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .claim import Claim
from .errors import is_refusal, reason
from .log import log
from .marks import Level, Marks
from .queue import Queue

Claimed = t.TypeVar("Claimed")


class Claimer:
    """Claims tasks; one that the database does not let be claimed holds up no other.

    :param channels: whose tasks.
    :param marks: where to start.
    """

    def __init__(self, queue: Queue, channels: t.Sequence[str], marks: Marks) -> None:
        self._queue = queue
        self._channels = channels
        self._marks = marks
        #: How many tasks to claim one by one, for one of them cannot be claimed.
        self._singly = 0
        #: What has been said of that.
        self._refused: set[str] = set()

    def at_once(self, wanted: int) -> int:
        """How many of so many tasks to claim with one statement."""
        return min(wanted, 1) if self._singly > 0 else wanted

    def claim(self, connection: Connection, worker_id: uuid.UUID, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if the database does not let one of them be claimed.
        The next call then finds out which one it is, or passes over it."""
        self._singly = max(self._singly - 1, 0)
        levels = self._marks.turn()
        try:
            return with_or_without_arguments(
                functools.partial(self._queue.queries.claim, connection, worker_id, levels, limit)
            )
        except sa.exc.DBAPIError as error:
            if not self._queue.queries.refuses(connection, error):
                raise
            if limit > 1:
                self._singly = limit
            else:
                self._pass_over(connection, levels, error)
            return None

    def claim_suspect(self, connection: Connection, worker_id: uuid.UUID) -> Claim | None:
        """Claim one task that was in a crash, if there is one and it can be had."""
        try:
            return with_or_without_arguments(
                functools.partial(
                    self._queue.queries.claim_suspect, connection, worker_id, self._channels
                )
            )
        except sa.exc.DBAPIError as error:
            if not self._queue.queries.refuses(connection, error):
                raise
            self._log_refused("A task that was in a crash", error)
            return None

    def _pass_over(
        self, connection: Connection, levels: t.Sequence[Level], error: sa.exc.DBAPIError
    ) -> None:
        """Pass over the one task whose claim was refused."""
        front = self._queue.queries.next(connection, levels)
        if front is None:
            raise error
        self._marks.step_over(front)
        self._log_refused(f"Task {front.id}", error)

    def _log_refused(self, what: str, error: sa.exc.DBAPIError) -> None:
        if what not in self._refused:
            self._refused.add(what)
            log.error("%s cannot be claimed: %s", what, reason(error))


def with_or_without_arguments(claim: t.Callable[..., Claimed]) -> Claimed:
    """Claim with the tasks' arguments; if the database refuses, for it may be because of those,
    without them. Each task then reads its own."""
    try:
        return claim()
    except sa.exc.DBAPIError as error:
        if not is_refusal(error):
            raise
    return claim(arguments=False)
