"""The claimer: how a worker claims, also where the database lets it claim some tasks only."""

from __future__ import annotations

import functools
import time
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .claim import Claim
from .errors import is_refusal, reason
from .log import log
from .marks import Look, Marks
from .queue import Queue

#: Seconds for which a task that cannot be claimed is left out.
REFUSED_FOR = 60.0
#: How many are, at most: they are told to each claim. And how many of them are named in the log.
MOST_REFUSED, MOST_NAMED = 1000, 20
#: Finding out about more than that may take one twentieth of the time.
CROWD_SHARE = 20

Claimed = t.TypeVar("Claimed")


class Claimer:
    """Claims tasks; one that the database does not let be claimed holds up no other.

    :param channels: whose tasks.
    :param marks: where to start.
    :param batch_size: how many tasks are claimed at once, at most.
    :param given_up: tokens of claims whose tasks stay PROCESSING although they run no more.
    """

    def __init__(
        self,
        queue: Queue,
        channels: t.Sequence[str],
        marks: Marks,
        batch_size: int,
        given_up: t.Collection[str],
    ) -> None:
        self._queue = queue
        self._channels = channels
        self._marks = marks
        self._batch_size = batch_size
        self._given_up = given_up
        #: How many tasks to claim at once: half as many where one of them cannot be claimed, and
        #: twice as many where all can.
        self._most = batch_size
        #: The tasks that could not be claimed, and until when they are left out, by that time.
        self._refused: dict[str, float] = {}
        #: Those that may be such tasks.
        self._doubtful: set[str] = set()
        #: Not to claim again until then, by the monotonic clock.
        self.quiet_until = 0.0

    def at_once(self, wanted: int) -> int:
        """How many of so many tasks to claim with one statement."""
        return min(wanted, self._most)

    def claim(self, connection: Connection, worker_id: uuid.UUID, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if the database does not let one of them be claimed.
        The next calls then find out which one it is, and leave it out."""
        start = time.monotonic()
        queries, levels, refused = self._queue.queries, self._marks.turn(), self._left_out()
        try:
            claims = with_or_without_arguments(
                functools.partial(queries.claim, connection, worker_id, levels, limit, refused)
            )
        except sa.exc.DBAPIError as error:
            if not queries.check_refusal(connection, error):
                raise
            self._most = max(limit // 2, 1)
            if limit > 1:
                return None
            front = queries.next(connection, levels, refused)
            if front is None:
                return []  # another worker is trying it
            if self._leaves_out(connection, front.id, error, start):
                # There may be more of them than are left out.
                self._marks.step_over(front)
            return None
        self._most = min(2 * self._most, self._batch_size)
        return claims

    def claim_suspect(self, connection: Connection, worker_id: uuid.UUID) -> Claim | None:
        """Claim one task that was in a crash, if there is one and it can be had."""
        start = time.monotonic()
        queries = self._queue.queries
        wanted = self._channels, self._left_out(), self._given_up
        try:
            return with_or_without_arguments(
                functools.partial(queries.claim_suspect, connection, worker_id, *wanted)
            )
        except sa.exc.DBAPIError as error:
            if not queries.check_refusal(connection, error):
                raise
            if (key := queries.next_suspect(connection, *wanted)) is not None:
                self._leaves_out(connection, key, error, start)
                if not self.quiet_until:
                    self._marks.look_soon()  # for the next one
            return None

    def look(self, connection: Connection) -> Look:
        """Look from the front of the queue for what can be claimed."""
        return self._queue.queries.look(
            connection, self._channels, self._left_out(), self._given_up
        )

    def _left_out(self) -> list[str]:
        """The tasks to leave out now."""
        now = time.monotonic()
        while self._refused and now >= next(iter(self._refused.values())) + REFUSED_FOR:
            del self._refused[next(iter(self._refused))]  # it has not come again
        return [key for key, until in self._refused.items() if until > now]

    def _leaves_out(
        self, connection: Connection, key: str, error: sa.exc.DBAPIError, start: float
    ) -> bool:
        """Leave out a task that came first after a claim was refused, and tell whether.

        That must happen twice, for it may have been inserted between the claim and the look for
        what comes first. One that could not be claimed before is left out at once.

        :param start: when it began to be found out.
        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        self.quiet_until = 0.0
        known = key in self._refused
        if not known and key not in self._doubtful:
            self._doubtful.add(key)
            return False
        self._doubtful.clear()
        if not known:
            self._queue.queries.check_tables(connection)
            self._name(key, error)
        now = time.monotonic()
        self._refused.pop(key, None)
        if len(self._refused) == MOST_REFUSED:
            first = next(iter(self._refused))
            if self._refused.pop(first) > now:  # too early: it comes again, and so on for ever
                self.quiet_until = now + CROWD_SHARE * (now - start)
        self._refused[key] = now + REFUSED_FOR
        return True

    def _name(self, key: str, error: sa.exc.DBAPIError) -> None:
        """Say in the log that a task cannot be claimed, unless there are too many."""
        if len(self._refused) < MOST_NAMED:
            log.error("Task %s cannot be claimed: %s", key, reason(error))
        elif len(self._refused) == MOST_NAMED:
            log.error("More than %d tasks cannot be claimed: %s", MOST_NAMED, reason(error))


def with_or_without_arguments(claim: t.Callable[..., Claimed]) -> Claimed:
    """Claim with the tasks' arguments; if the database refuses, for it may be because of those,
    without them. Each task then reads its own."""
    try:
        return claim()
    except sa.exc.DBAPIError as error:
        if not is_refusal(error):
            raise
    return claim(arguments=False)
