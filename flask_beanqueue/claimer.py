"""The claimer: how a worker claims, and steps over what the database does not let it claim."""

from __future__ import annotations

import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import clock as time
from .claim import Claim
from .errors import is_refusal, reason
from .log import log
from .marks import STAYS, Marks
from .queue import Queue


class Claimer:
    """Claims tasks; one that the database does not let be claimed holds up no other.

    :param channels: whose tasks.
    :param marks: where to start.
    :param batch_size: how many tasks are claimed at once, at most.
    :param largest: bytes of arguments that a claim brings, at most.
    """

    def __init__(
        self, queue: Queue, channels: t.Sequence[str], marks: Marks, batch_size: int, largest: int
    ) -> None:
        self._queue = queue
        self._channels = channels
        self._marks = marks
        self._batch_size = batch_size
        self._largest = largest
        #: How many tasks to claim at once: half as many after a claim that failed, for whatever
        #: reason, and twice as many after one that did not.
        self._most = batch_size
        #: Until when tasks that were in a crash are left alone, for one of them is refused.
        self._suspects_rest_until = 0.0

    def at_once(self, wanted: int) -> int:
        """How many of so many tasks to claim with one statement."""
        return min(wanted, self._most)

    def claim(self, connection: Connection, worker_id: uuid.UUID, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if the database refuses to let one of them be claimed.
        The next calls then find out which one it is, and step over it.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        queries, levels = self._queue.queries, self._marks.turn()
        try:
            claims = queries.claim(connection, worker_id, levels, limit, self._largest)
        except Exception as error:  # perhaps since the answer takes more memory than there is
            self._most = max(limit // 2, 1)
            self._check(connection, error)
            front = queries.next(connection, levels) if limit == 1 else None
            if front is not None and self._marks.step_over(front):
                log.error(
                    "Task %s cannot be claimed, and is tried again in %.0f s, with all that comes"
                    " before it in its channel and priority: %s",
                    front.id,
                    STAYS,
                    reason(error),
                )
            return None
        if claims:
            self._most = min(2 * self._most, self._batch_size)
        return claims

    def claim_suspect(self, connection: Connection, worker_id: uuid.UUID) -> Claim | None:
        """Claim one task that was in a crash, if there is one.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        if time.monotonic() < self._suspects_rest_until:
            return None
        queries = self._queue.queries
        try:
            return queries.claim_suspect(connection, worker_id, self._channels, self._largest)
        except Exception as error:
            self._check(connection, error)
            self._suspects_rest_until = time.monotonic() + STAYS
            log.error(
                "A task that was in a crash cannot be claimed, and others like it wait with it for"
                " %.0f s: %s",
                STAYS,
                reason(error),
            )
            return None

    def _check(self, connection: Connection, error: Exception) -> None:
        """Raise an error of a claim if it would meet any."""
        if not isinstance(error, sa.exc.DBAPIError) or not is_refusal(error):
            raise error
        self._queue.queries.check_claims(connection)
