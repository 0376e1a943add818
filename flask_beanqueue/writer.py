"""The writer: which claims a worker holds, and how their outcomes get into the database."""

from __future__ import annotations

import collections
import itertools
import traceback
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from . import clock as time
from . import outcome as outcomes
from .claim import Claim
from .errors import is_limit, is_refusal, is_timeout, reason
from .log import log
from .models import DONE, PENDING, PROCESSING
from .outcome import Outcome
from .queue import Queue

#: Seconds that a statement waits for a row that somebody else has locked.
LOCK_TIMEOUT = 0.1
#: Seconds after which such rows are tried again.
LOCKED_AGAIN = 1.0
#: Tasks that are taken over at once.
TAKE_OVER_SIZE = 1000
#: Seconds after which the rest is written another time, so that the loop sees to other things.
WRITE_FOR = 0.1
#: Characters of results and tracebacks that go into one statement, if there is more than one
#: outcome. PostgreSQL closes the connection to who sends a gigabyte.
LARGEST_PART = 2**26


class Writer:
    """Holds every claim until its outcome is written, and writes outcomes many at a time.

    :param app: in whose contexts signals are sent, if anybody wants them.
    :param batch_size: how many outcomes go into one statement, at most.
    :param on_release: called when a claim is held no longer, with whether its task waits again.
    """

    def __init__(
        self,
        app: Flask,
        queue: Queue,
        batch_size: int,
        on_release: t.Callable[[Claim, bool], None],
    ) -> None:
        self._app = app
        self._queue = queue
        self._batch_size = batch_size
        self._on_release = on_release
        #: How many outcomes go into the next statement: half as many after one that failed, and
        #: twice as many after one that did not.
        self._most = batch_size
        #: Where the search for tasks of dead workers goes on; None if there is none.
        self._after: str | None = None
        #: Every claim whose outcome is not written yet.
        self.held: set[Claim] = set()
        #: Outcomes still to be written.
        self._backlog: dict[Claim, Outcome] = {}
        #: Those whose rows somebody else has locked, and when they are tried again.
        self._locked: dict[Claim, Outcome] = {}
        self._locked_until = 0.0
        #: Claims whose outcome may have been written although the answer was lost.
        self._unsure: set[Claim] = set()
        #: What is still to be tried where the database refuses an outcome.
        self._fallbacks: dict[Claim, t.Iterator[Outcome]] = {}
        #: How many tasks have run here, by the state that they got.
        self.ended: collections.Counter[str] = collections.Counter()

    @property
    def next_try(self) -> float:
        """When to write again: at once, or when rows that were locked are tried again."""
        if self._backlog:
            return 0.0
        return self._locked_until if self._locked else float("inf")

    def keeps(self, claim: Claim) -> bool:
        """Whether its outcome is known, and waits for a lock."""
        return claim in self._locked

    @property
    def free(self) -> int:
        """How many claims are held whose rows are not known to be locked."""
        return len(self.held) - sum(claim in self.held for claim in self._locked)

    @property
    def undecided(self) -> list[Claim]:
        """The claims that are held and of which no outcome is known."""
        return [
            claim for claim in self.held if claim not in self._backlog and claim not in self._locked
        ]

    @property
    def _in_hand(self) -> t.Iterable[Claim]:
        """The claims that are held, and those of others that are being taken over."""
        return itertools.chain(self.held, self._backlog, self._locked)

    def release(self, claim: Claim, *, waits: bool = False) -> None:
        """Hold a claim no longer: there is nothing left to write of it."""
        self._forget(claim)
        self._unsure.discard(claim)
        self._fallbacks.pop(claim, None)
        self.held.discard(claim)
        self._on_release(claim, waits)

    def add(self, outcome: Outcome) -> None:
        """Let an outcome be written with the next ones."""
        self._forget(outcome.claim)
        self._backlog[outcome.claim] = outcome

    def give_back(self, claims: t.Iterable[Claim]) -> None:
        """Let tasks wait again, uncounted."""
        for claim in claims:
            self.add(outcomes.given_back(claim))

    def abandon_locked(self) -> int:
        """Hold what is locked no longer, and return how many tasks that are: once this worker has
        gone, another one makes them wait again."""
        claims = list(self._locked)
        for claim in claims:
            self._forget(claim)
            self.held.discard(claim)
        return len(claims)

    def take_over(self, connection: Connection, max_crashes: int, *, anew: bool = False) -> bool:
        """Let tasks of dead workers wait again, or fail where they died too often: a part of them,
        and the next part with the next call.

        :param max_crashes: how often that is.
        :param anew: whether to begin with the first one.
        :return: whether that was all.
        """
        if anew:
            self._after = None
        if len(self._backlog) < TAKE_OVER_SIZE:
            known = {claim.token for claim in self._in_hand}
            orphans = self._queue.queries.orphans(connection, self._after, TAKE_OVER_SIZE, known)
            for claim, left in orphans:
                self.add(
                    outcomes.given_back(claim) if left else outcomes.crashed(claim, max_crashes)
                )
            self._after = orphans[-1][0].key if len(orphans) == TAKE_OVER_SIZE else None
        self.write(connection)
        return self._after is None and not self._backlog

    def give_back_strays(self, connection: Connection, worker_id: uuid.UUID) -> None:
        """Give back claims that were committed although the answer was lost with a connection."""
        known = {claim.token for claim in self._in_hand}
        mine = self._queue.queries.mine(connection, worker_id)
        strays = [claim for claim in mine if claim.token not in known]
        self.held.update(strays)
        self.give_back(strays)

    def write(self, connection: Connection) -> None:
        """Write what there is to write, or as much as there is time for. What fails stays to be
        written.

        Nobody's lock holds this up: outcomes of rows that somebody else has locked are kept for
        later.
        """
        until = time.monotonic() + WRITE_FOR
        if self._locked and time.monotonic() >= self._locked_until:
            for outcome in self._unlocked(connection, list(self._locked.values())):
                self.add(outcome)
        while self._backlog and time.monotonic() < until:
            waiting = list(self._backlog.values())
            # One kind at a time goes into one statement, of which nothing is left if it fails.
            plain = [each for each in waiting if each.is_plain]
            self._write_part(connection, first_part(plain or waiting, self._most))

    def _write_part(self, connection: Connection, part: list[Outcome]) -> None:
        """Write outcomes together. If the database refuses one of them, fewer go together, until it
        is alone."""
        plain = part[0].is_plain
        try:
            written = outcomes.write(
                self._queue.queries, connection, part, lock_timeout=LOCK_TIMEOUT
            )
        except sa.exc.DBAPIError as error:
            self._unsure |= {outcome.claim for outcome in part}
            if not is_timeout(error) and not is_refusal(error):
                raise
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
            self._queue.queries.check_outcomes(connection, plain=plain)
            self._fall_back(part[0], error)
            return
        self._most = min(2 * self._most, self._batch_size)
        if plain:
            self.ended[DONE] += len(written)
        else:
            for outcome in written:
                self.ended[outcome.state] += outcome.attempts
        told = not plain or outcomes.tells_success()
        for outcome in written:
            self.release(outcome.claim, waits=outcome.state == PENDING)
            if told:
                self._announce(outcome)
        if plain:
            return  # the rest has moved, and stays to be written
        claims = {outcome.claim for outcome in written}
        lost = [outcome for outcome in part if outcome.claim not in claims]
        keys = [outcome.claim.key for outcome in lost]
        cancelled = self._queue.queries.cancelled(connection, keys) if lost else ()
        for outcome in lost:
            if outcome.claim in self.held and outcome.claim not in self._unsure:
                outcomes.lost(outcome, cancelled=outcome.claim.key in cancelled)
            self.release(outcome.claim)

    def _fall_back(self, outcome: Outcome, error: sa.exc.DBAPIError) -> None:
        """Let something else be written in place of an outcome that the database refuses."""
        claim = outcome.claim
        log.error("%s: its outcome is refused: %s", claim.label, reason(error))
        fallbacks = self._fallbacks.setdefault(claim, outcomes.fallbacks(outcome, error))
        if (instead := next(fallbacks, None)) is not None:
            self.add(instead)
            return
        log.error("%s stays %s: nothing can be written of it", claim.label, PROCESSING)
        self.release(claim)

    def _unlocked(self, connection: Connection, part: list[Outcome]) -> list[Outcome]:
        """Return those whose rows nobody has locked, and keep the others for later."""
        keys = self._queue.queries.locked(connection, [outcome.claim.key for outcome in part])
        self._keep(
            [outcome for outcome in part if outcome.claim.key in keys],
            "another transaction keeps its row locked",
        )
        return [outcome for outcome in part if outcome.claim.key not in keys]

    def _keep(self, part: list[Outcome], why: str) -> None:
        """Keep what cannot be written now for later."""
        for outcome in part:
            claim = outcome.claim
            if not outcome.kept:
                log.warning(
                    "%s cannot be ended yet: %s",
                    claim.label,
                    why,
                    extra=claim.log_extra(),
                )
            outcome.kept = True
            self._forget(claim)
            self._locked[claim] = outcome
        self._locked_until = time.monotonic() + LOCKED_AGAIN

    def _forget(self, claim: Claim) -> None:
        self._backlog.pop(claim, None)
        self._locked.pop(claim, None)

    def _announce(self, outcome: Outcome) -> None:
        """Log a written outcome and send its signal."""
        try:
            outcomes.announce(self._app, self._queue, outcome)
        except Exception:
            # Of a filter of the app's logging: printed, as logging itself does with a handler's.
            traceback.print_exc()


def first_part(waiting: t.Iterable[Outcome], most: int) -> list[Outcome]:
    """The first outcomes that go into one statement.

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
