"""The claimer: how a worker claims, also where the database lets it claim some tasks only."""

from __future__ import annotations

import functools
import time
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .claim import Claim
from .errors import may_be_of_values, reason
from .log import log
from .marks import Look, Marks
from .queue import Queue

#: Seconds for which a task that cannot be claimed is left out.
REFUSED_FOR = 60.0
#: How many are, at most: they are told to each claim. And how many of them are named in the log.
MOST_REFUSED, MOST_NAMED = 200, 20
#: Seconds between two looks for what would keep all tasks from being claimed, at least.
CHECK_AFTER = 1.0
#: What is said of a task that stays as it is although nothing is raised.
UNCHANGED = "its row stays as it is; does a trigger return NULL?"

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
        #: The task that may be one more.
        self._doubtful: str | None = None
        self._next_check = 0.0

    def at_once(self, wanted: int) -> int:
        """How many of so many tasks to claim with one statement."""
        return min(wanted, self._most)

    def claim(self, connection: Connection, worker_id: uuid.UUID, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if the database does not let one of them be claimed.
        The next calls then find out which one it is, and leave it out."""
        queries, levels, refused = self._queue.queries, self._marks.turn(), self._left_out()
        error = None
        try:
            claims = with_or_without_arguments(
                functools.partial(queries.claim, connection, worker_id, levels, limit, refused)
            )
        except sa.exc.DBAPIError as refusal:
            if not queries.check_refusal(connection, refusal):
                raise
            error = refusal
            self._most = max(limit // 2, 1)
            if limit > 1:
                return None
        else:
            if claims:
                self._most = min(2 * self._most, self._batch_size)
            if claims or not self._marks.fruitless:
                return claims
        front = queries.next(connection, levels, refused)
        if front is None:
            return []  # another worker is trying it
        others = self._doubtful is not None
        if self._is_refused(connection, front.id, error):
            self._marks.next_turn()
            if self._has_room(front.id):
                self._leave_out(front.id, error)
            elif self._marks.step_over(front):
                log.error(
                    "Too many tasks of channel %r cannot be claimed; what is to be done before"
                    " them waits for a minute: %s",
                    front.channel,
                    UNCHANGED if error is None else reason(error),
                )
        elif error is None and others:
            return []  # what comes first changes: other workers claim it
        return None

    def claim_suspect(self, connection: Connection, worker_id: uuid.UUID) -> Claim | None:
        """Claim one task that was in a crash, if there is one and it can be had."""
        queries = self._queue.queries
        wanted = self._channels, self._left_out(), self._given_up
        error = None
        try:
            claim = with_or_without_arguments(
                functools.partial(queries.claim_suspect, connection, worker_id, *wanted)
            )
        except sa.exc.DBAPIError as refusal:
            if not queries.check_refusal(connection, refusal):
                raise
            error = refusal
        else:
            if claim is not None:
                return claim
        if (key := queries.next_suspect(connection, *wanted)) is not None:
            if self._has_room(key):
                self._marks.look_soon()  # for the next one
            if self._is_refused(connection, key, error):
                self._leave_out(key, error)
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

    def _has_room(self, key: str) -> bool:
        """Whether a task can be left out beside the others."""
        return key in self._refused or len(self._refused) < MOST_REFUSED

    def _is_refused(
        self, connection: Connection, key: str, error: sa.exc.DBAPIError | None
    ) -> bool:
        """Whether it is a certain task that cannot be claimed, for it came first after a claim had
        failed.

        That must happen twice, for it may have been inserted between the claim and the look for
        what comes first; of one that could not be claimed before, it is known.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        if key != self._doubtful and key not in self._refused:
            self._doubtful = key
            return False
        self._doubtful = None
        if error is not None and time.monotonic() >= self._next_check:
            self._queue.queries.check_tables(connection)
            self._next_check = time.monotonic() + CHECK_AFTER
        return True

    def _leave_out(self, key: str, error: sa.exc.DBAPIError | None) -> None:
        """Leave out a task that cannot be claimed, the first one no more if there is no room."""
        if not self._has_room(key):
            del self._refused[next(iter(self._refused))]
        if key not in self._refused:
            why = UNCHANGED if error is None else reason(error)
            if len(self._refused) < MOST_NAMED:
                log.error("Task %s cannot be claimed: %s", key, why)
            elif len(self._refused) == MOST_NAMED:
                log.error("More than %d tasks cannot be claimed: %s", MOST_NAMED, why)
        self._refused.pop(key, None)
        self._refused[key] = time.monotonic() + REFUSED_FOR


def with_or_without_arguments(claim: t.Callable[..., Claimed]) -> Claimed:
    """Claim with the tasks' arguments; if the database refuses, and it may be because of those,
    without them. Each task then reads its own."""
    try:
        return claim()
    except sa.exc.DBAPIError as error:
        if not may_be_of_values(error):
            raise
    return claim(arguments=False)
