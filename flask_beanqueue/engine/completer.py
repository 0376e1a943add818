"""The completer: keeps outcomes until they are written, and writes them many at a time."""

from __future__ import annotations

import traceback
import typing as t

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from .. import clock as time
from ..log import log
from ..models.task import PROCESSING
from ..sql import Sql
from . import announce, settle
from . import outcome as outcomes
from .claim import Claim
from .database import is_limit, is_refusal, is_timeout, reason
from .outcome import Outcome
from .queue import Queue

#: Seconds that a statement waits for a row that somebody else has locked.
LOCK_TIMEOUT = 0.1
#: Seconds after which such rows are tried again.
LOCKED_AGAIN = 1.0
#: Seconds after which the rest is written another time, so that the loop sees to other things.
WRITE_FOR = 0.1
#: Characters of results and tracebacks that go into one statement, if there is more than one
#: outcome. PostgreSQL closes a connection that sends a gigabyte.
LARGEST_PART = 2**26

# Which rows somebody else has locked, without waiting for them.
LOCKED = Sql("""
    WITH unlocked AS MATERIALIZED (
        SELECT id FROM {tasks} WHERE id = ANY (CAST(:ids AS uuid[]))
        FOR NO KEY UPDATE SKIP LOCKED)
    SELECT CAST(id AS text) FROM {tasks} WHERE id = ANY (CAST(:ids AS uuid[]))
      AND id NOT IN (SELECT id FROM unlocked)
""")

# Of the tasks that are no longer a worker's, those that somebody has cancelled.
CANCELLED = Sql("""
    SELECT CAST(id AS text) FROM {tasks}
    WHERE id = ANY (CAST(:ids AS uuid[])) AND state = 'CANCELLED'
""")


class Completer:
    """Writes outcomes, and keeps those that cannot be written now.

    :param app: in whose contexts signals are sent, if anybody wants them.
    :param batch_size: how many outcomes go into one statement, at most.
    """

    def __init__(self, app: Flask, queue: Queue, batch_size: int) -> None:
        self._app = app
        self._queue = queue
        self._batch_size = batch_size
        #: How many outcomes go into the next statement: half as many after one that failed, and
        #: twice as many after one that did not.
        self._most = batch_size
        #: Outcomes still to be written.
        self.backlog: dict[Claim, Outcome] = {}
        #: Those whose rows somebody else has locked, and when they are tried again.
        self.locked: dict[Claim, Outcome] = {}
        self._locked_until = 0.0
        #: Claims whose outcome may have been written although the answer was lost.
        self._unsure: set[Claim] = set()
        #: What is still to be tried if the database refuses an outcome.
        self._fallbacks: dict[Claim, t.Iterator[Outcome]] = {}
        #: Outcomes of which there is nothing left to write, until the loop takes them.
        self._released: list[Outcome] = []

    @property
    def next_try(self) -> float:
        """When to write again: at once, or when rows that were locked are tried again."""
        if self.backlog:
            return 0.0
        return self._locked_until if self.locked else float("inf")

    def keeps(self, claim: Claim) -> bool:
        """Whether a claim's outcome is known, and not written yet."""
        return claim in self.backlog or claim in self.locked

    def add(self, outcome: Outcome) -> None:
        """Let an outcome be written with the next ones."""
        self._take_out(outcome.claim)
        self.backlog[outcome.claim] = outcome

    def forget(self, claim: Claim) -> None:
        """Let nothing be written of a claim: what became of it is in the database already."""
        self._take_out(claim)
        self._unsure.discard(claim)
        self._fallbacks.pop(claim, None)

    def take_released(self) -> list[Outcome]:
        """Return the outcomes that were written, or given up, since this was last asked."""
        released, self._released = self._released, []
        return released

    def abandon_locked(self) -> list[Claim]:
        """Forget what is locked, and return the claims: once this worker has gone, another one
        makes their tasks wait again."""
        claims = list(self.locked)
        self.locked.clear()
        return claims

    def write(self, connection: Connection) -> None:
        """Write what there is to write, or as much as there is time for. What fails stays to be
        written.

        Nobody's lock holds this up: outcomes of rows that somebody else has locked are kept for
        later.
        """
        until = time.monotonic() + WRITE_FOR
        if self.locked and time.monotonic() >= self._locked_until:
            for outcome in self._unlocked(connection, list(self.locked.values())):
                self.add(outcome)
        while self.backlog and time.monotonic() < until:
            waiting = list(self.backlog.values())
            # One kind at a time goes into one statement, of which nothing is left if it fails.
            plain = [each for each in waiting if each.is_plain]
            self._write_part(connection, first_part(plain or waiting, self._most))

    def _write_part(self, connection: Connection, part: list[Outcome]) -> None:
        """Write outcomes together. If the database refuses one of them, fewer go together, until it
        is alone."""
        plain = part[0].is_plain
        try:
            written = settle.write(connection, self._queue.models, part, lock_timeout=LOCK_TIMEOUT)
        except sa.exc.DBAPIError as error:
            self._unsure |= {outcome.claim for outcome in part}
            if not is_timeout(error) and not is_refusal(error):
                raise
            self._divide(connection, part, error)
            return
        self._most = min(2 * self._most, self._batch_size)
        told = not plain or announce.tells_success()
        for outcome in written:
            outcome.written = True
            self._release(outcome)
            if told:
                self._announce(outcome)
        if not plain:  # of plain ones, the rest has moved, and stays to be written
            self._lose(connection, [outcome for outcome in part if not outcome.written])

    def _divide(
        self, connection: Connection, part: list[Outcome], error: sa.exc.DBAPIError
    ) -> None:
        """Find out what to do about outcomes that could not be written together.

        :raises sqlalchemy.exc.DBAPIError: if no outcome could be written now.
        """
        if is_timeout(error) and len(self._unlocked(connection, part)) < len(part):
            return
        if is_limit(error) and (notifying := [each for each in part if each.notifies]):
            log.warning("Tasks wait again without a NOTIFY: %s", reason(error))
            for outcome in notifying:
                outcome.notify = False
            return
        self._most = max(len(part) // 2, 1)
        if len(part) > 1:
            return
        if is_timeout(error):  # a trigger of the app's own wants some other lock, say
            self._keep(part, reason(error))
            return
        # What would refuse any outcome is no fault of this one.
        settle.check(connection, self._queue.models, plain=part[0].is_plain)
        self._fall_back(part[0], error)

    def _fall_back(self, outcome: Outcome, error: sa.exc.DBAPIError) -> None:
        """Let something else be written in place of an outcome that the database refuses."""
        claim = outcome.claim
        log.error("%s: its outcome is refused: %s", claim.label, reason(error))
        fallbacks = self._fallbacks.setdefault(claim, outcomes.fallbacks(outcome, error))
        if (instead := next(fallbacks, None)) is not None:
            self.add(instead)
            return
        log.error("%s stays %s: nothing can be written of it", claim.label, PROCESSING)
        self._release(outcome)

    def _lose(self, connection: Connection, lost: list[Outcome]) -> None:
        """Let go of outcomes whose claims are no longer this worker's."""
        if not lost:
            return
        keys = [outcome.claim.key for outcome in lost]
        statement = CANCELLED.on(self._queue.models)
        cancelled = set(connection.scalars(statement, {"ids": keys}).all())
        for outcome in lost:
            if outcome.is_own and outcome.claim not in self._unsure:
                announce.lost(outcome, cancelled=outcome.claim.key in cancelled)
            self._release(outcome)

    def _unlocked(self, connection: Connection, part: list[Outcome]) -> list[Outcome]:
        """Return those whose rows nobody has locked, and keep the others for later."""
        keys = [outcome.claim.key for outcome in part]
        locked = set(connection.scalars(LOCKED.on(self._queue.models), {"ids": keys}).all())
        self._keep(
            [outcome for outcome in part if outcome.claim.key in locked],
            "another transaction keeps its row locked",
        )
        return [outcome for outcome in part if outcome.claim.key not in locked]

    def _keep(self, part: list[Outcome], why: str) -> None:
        """Keep what cannot be written now for later."""
        for outcome in part:
            claim = outcome.claim
            if not outcome.kept:
                extra = claim.log_extra()
                log.warning("%s cannot be ended yet: %s", claim.label, why, extra=extra)
            outcome.kept = True
            self._take_out(claim)
            self.locked[claim] = outcome
        self._locked_until = time.monotonic() + LOCKED_AGAIN

    def _release(self, outcome: Outcome) -> None:
        self.forget(outcome.claim)
        self._released.append(outcome)

    def _take_out(self, claim: Claim) -> None:
        self.backlog.pop(claim, None)
        self.locked.pop(claim, None)

    def _announce(self, outcome: Outcome) -> None:
        try:
            announce.announce(self._app, self._queue, outcome)
        except Exception:
            # Of a filter of the app's logging: printed, as logging itself does with a handler's.
            traceback.print_exc()


def first_part(waiting: t.Iterable[Outcome], most: int) -> list[Outcome]:
    """Return the first outcomes that go into one statement.

    :param most: how many.
    """
    part: list[Outcome] = []
    size = 0
    for outcome in waiting:
        size += len(outcome.result or "") + len(outcome.traceback or "")
        if part and (len(part) == most or size > LARGEST_PART):
            break
        part.append(outcome)
    return part
