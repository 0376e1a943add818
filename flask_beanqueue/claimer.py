"""The claimer: how a worker claims, also where the database lets it claim some tasks only."""

from __future__ import annotations

import functools
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from . import clock as time
from .claim import Claim
from .errors import is_misfit, is_refusal, may_be_of_values, reason
from .log import log
from .marks import Look, Marks
from .queries import Unchanged
from .queue import Queue

#: Seconds for which a task that cannot be claimed is left out.
REFUSED_FOR = 60.0
#: How many are, at most: they are told to each claim. And how many of them are named in the log.
MOST_REFUSED, MOST_NAMED = 200, 20
#: Seconds between two looks for what would keep all tasks from being claimed, at least.
CHECK_AFTER = 1.0

Claimed = t.TypeVar("Claimed")


class Claimer:
    """Claims tasks; one that the database does not let be claimed holds up no other.

    :param channels: whose tasks.
    :param marks: where to start.
    :param batch_size: how many tasks are claimed at once, at most.
    :param largest: bytes of arguments that a claim brings, at most.
    :param given_up: tokens of claims whose tasks stay PROCESSING although they run no more.
    """

    def __init__(
        self,
        queue: Queue,
        channels: t.Sequence[str],
        marks: Marks,
        batch_size: int,
        largest: int,
        given_up: t.Collection[str],
    ) -> None:
        self._queue = queue
        self._channels = channels
        self._marks = marks
        self._batch_size = batch_size
        self._largest = largest
        self._given_up = given_up
        #: How many tasks to claim at once: half as many after a claim that failed, for whatever
        #: reason, and twice as many after one that did not.
        self._most = batch_size
        self._refused = Refused()
        self._refused_suspects = Refused()
        self._next_check = 0.0

    def at_once(self, wanted: int) -> int:
        """How many of so many tasks to claim with one statement."""
        return min(wanted, self._most)

    def claim(self, connection: Connection, worker_id: uuid.UUID, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if there may be more than were had, for the database
        does not let one of them be claimed. The next calls then find out which one it is, and leave
        it out.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        start = time.monotonic()
        queries, levels, refused = self._queue.queries, self._marks.turn(), self._refused.keys()
        claim = functools.partial(queries.claim, connection, worker_id, levels)
        try:
            claims, error = self._try(connection, claim, limit, refused)
        except Exception:  # perhaps since the answer takes more memory than there is
            self._most = max(limit // 2, 1)
            raise
        if error is not None:
            self._most = max(limit // 2, 1)
            if limit > 1:
                return None
        elif claims or not self._marks.fruitless:
            if claims:
                self._most = min(2 * self._most, self._batch_size)
            return claims
        front = queries.next(connection, levels, refused)
        if front is None:
            return []  # another worker is trying it
        claims, error = self._try(connection, claim, 1, alone=front.id)
        if error is None:
            return claims  # it was another one; or another worker has it now
        self._most = 1
        self._marks.found_out()
        if self._refused.has_room(front.id):
            self._refused.add(front.id, error)
        elif (until := self._marks.step_over(front, time.monotonic() - start)) is not None:
            log.error(
                "Too many tasks of channel %r cannot be claimed; what comes before them waits for"
                " %.0f s or more: %s",
                front.channel,
                until - time.monotonic(),
                reason(error),
            )
        return None

    def claim_suspect(self, connection: Connection, worker_id: uuid.UUID) -> Claim | None:
        """Claim one task that was in a crash, if there is one and it can be had.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        queries = self._queue.queries
        wanted = self._channels, self._refused_suspects.keys(), self._given_up
        claim = functools.partial(queries.claim_suspect, connection, worker_id, *wanted)
        claimed, _ = self._try(connection, claim)
        if claimed is not None:
            return claimed
        if (key := queries.next_suspect(connection, *wanted)) is None:
            return None
        claimed, error = self._try(connection, claim, alone=key)
        if error is not None:
            if self._refused_suspects.has_room(key):
                self._marks.look_soon()  # for the next one
            self._refused_suspects.add(key, error)
        return claimed

    def look(self, connection: Connection) -> Look:
        """Look from the front of the queue for what can be claimed."""
        refused = [*self._refused.keys(), *self._refused_suspects.keys()]
        return self._queue.queries.look(connection, self._channels, refused, self._given_up)

    def _try(
        self, connection: Connection, claim: t.Callable[..., Claimed], *args: t.Any, **kwargs: t.Any
    ) -> tuple[Claimed | None, Exception | None]:
        """Claim, and return what was claimed, or why the database does not let it be.

        Arguments may be stored that PostgreSQL cannot write as text. Then none are read with the
        claims, and each task meets its own.

        :raises sqlalchemy.exc.DBAPIError: if it would refuse any claim, or it is no refusal.
        """
        try:
            try:
                return claim(*args, most=self._largest, **kwargs), None
            except sa.exc.DBAPIError as error:
                if not may_be_of_values(error):
                    raise
                return claim(*args, most=-1, **kwargs), None
        except sa.exc.DBAPIError as error:
            if not is_refusal(error):
                raise
            if time.monotonic() >= self._next_check:
                queries = self._queue.queries
                (queries.check_tables if is_misfit(error) else queries.check_claims)(connection)
                self._next_check = time.monotonic() + CHECK_AFTER
            return None, error
        except Unchanged as unchanged:
            return None, unchanged


class Refused:
    """The tasks that cannot be claimed, which are left out for a while."""

    def __init__(self) -> None:
        #: Each with the time until which it is.
        self._until: dict[str, float] = {}

    def keys(self) -> list[str]:
        """Those that are left out now."""
        now = time.monotonic()
        while self._until and now >= next(iter(self._until.values())) + REFUSED_FOR:
            del self._until[next(iter(self._until))]  # it has not come again
        return [key for key, until in self._until.items() if until > now]

    def has_room(self, key: str) -> bool:
        """Whether a task can be left out beside the others."""
        return key in self._until or len(self._until) < MOST_REFUSED

    def add(self, key: str, error: Exception) -> None:
        """Leave out a task, and the first one no more if there is no room."""
        if not self.has_room(key):
            del self._until[next(iter(self._until))]
        if key not in self._until:
            if len(self._until) < MOST_NAMED:
                log.error(
                    "Task %s cannot be claimed, and is tried again in %.0f s: %s",
                    key,
                    REFUSED_FOR,
                    reason(error),
                )
            elif len(self._until) == MOST_NAMED:
                log.error("More than %d tasks cannot be claimed: %s", MOST_NAMED, reason(error))
        self._until.pop(key, None)
        self._until[key] = time.monotonic() + REFUSED_FOR
