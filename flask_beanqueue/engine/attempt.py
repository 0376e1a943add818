"""The attempt: one task, one app context, one outcome."""

from __future__ import annotations

import collections
import logging
import os
import typing as t

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection, Engine

from .. import clock as time
from .. import signals
from ..codec import LARGEST, decode
from ..config import Config
from ..current import Attempt
from ..exceptions import ClaimLost
from ..log import log
from ..processor import AnyProcessor
from ..registry import Registry
from ..sql import Sql
from . import fence
from . import outcome as outcomes
from .announce import announce, log_failure
from .claim import Claim
from .database import is_interruption, is_read_only, reason
from .outcome import Outcome
from .queue import Queue
from .shutdown import leave

#: Interruptions within so many seconds count as one outage; the loop tries again within 2.
TOGETHER = 3.0

#: Counts forks: a child sees another number than its parent.
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


# The arguments of a claim that is without. NULL if they are larger than any task's may be.
ARGUMENTS = Sql("""
    SELECT CASE WHEN octet_length(CAST(kwargs AS text)) <= :largest THEN CAST(kwargs AS text) END
    FROM {tasks} WHERE id = :id AND claims = :claims
""")


class Executor:
    """Runs claimed tasks.

    :param app: the app in whose contexts they run.
    :param registry: where their processors are found.
    :param engine: where arguments are read that were too large to come with their claims.
    """

    def __init__(
        self, app: Flask, queue: Queue, registry: Registry, config: Config, engine: Engine
    ) -> None:
        self.app = app
        self.queue = queue
        self.registry = registry
        self.config = config
        self.engine = engine
        #: When tasks were interrupted last, or the loop, and which ones.
        self._interrupted: collections.deque[tuple[float, str]] = collections.deque(maxlen=16)

    def execute(self, claim: Claim) -> Outcome | None:
        """Run the processor of a claimed task in an app context of its own.

        If it used ``db.session``, its effects and its completion are committed together, here. It
        raises nothing.

        :return: the outcome that is still to be written; None if there is none left.
        """
        processor = self.registry.get(claim.module, claim.func_name)
        if processor is None:
            return outcomes.unknown(claim, len(self.registry), self.config.UNKNOWN_GRACE)
        attempt = Attempt(claim, self.app)
        outcome: Outcome | None = None
        decided = 0  # the id of the exception that is an outcome already
        try:
            with attempt, self.app.app_context():
                try:
                    outcome = self._perform(attempt, processor)
                except BaseException as error:  # sys.exit() in a task must not end its worker
                    outcome = self._decide(attempt, processor, error)
                    decided = id(error)
                    raise  # to tell it to what the app runs at the end of its contexts
        except BaseException as error:
            if id(error) != decided:
                # A function that the app runs around its contexts raised: before the processor, or
                # after.
                if outcome is None and not claim.settled:
                    return outcomes.failed(claim, error)
                log.exception("The app context of %s", claim.label, extra=claim.log_extra())
        return outcome

    def _decide(
        self, attempt: Attempt, processor: AnyProcessor, error: BaseException
    ) -> Outcome | None:
        """Roll back, turn what a task has raised into an outcome, within its app context, and log
        that."""
        claim = attempt.claim
        # A session that is read-only may stay so when the database is no longer.
        self._rollback(discard=any(map(is_read_only, attempt.losses)))
        if claim.settled:
            log.exception("%s raised after its end", claim.label, extra=claim.log_extra())
            return None
        if is_interruption(error, attempt.losses):
            outcome = outcomes.interrupted(claim, error, alone=self._is_alone(claim))
            self._interrupted.append((time.monotonic(), claim.key))
        elif isinstance(error, ClaimLost):
            # The fence tells whether that is so, and then there is nothing to log. If the task is
            # still this worker's, the processor has deleted its row or changed it past the ORM.
            return outcomes.failed(claim, error)
        else:
            outcome = outcomes.failed(
                claim,
                error,
                processor,
                lambda: self.queue.task_after(claim, attempts=claim.attempts + 1),
                attempt,
            )
        if outcome.exception is not None:
            log_failure(outcome)
        return outcome

    def _is_alone(self, claim: Claim) -> bool:
        """Whether neither the loop nor another task was interrupted lately."""
        since = time.monotonic() - TOGETHER
        return not any(at > since and key != claim.key for at, key in list(self._interrupted))

    def note_trouble(self) -> None:
        """The worker's loop cannot use the database."""
        self._interrupted.append((time.monotonic(), ""))

    def _perform(self, attempt: Attempt, processor: AnyProcessor) -> Outcome | None:
        """Call the processor and finish: in its transaction, if it opened one."""
        claim = attempt.claim
        fence.watch(self.queue)
        started = signals.task_started
        if not signals.send(started, self.app, lambda: {"task": self.queue.attach_task(claim)}):
            self._rollback()  # the processor shall not inherit a broken transaction
        try:
            kwargs = self._arguments(claim)
        except MemoryError as error:  # others of this worker may hold what there was
            attempt.losses += (error,)
            raise
        injected = self.queue.injection(processor.injected)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s starts", claim.label, extra=claim.log_extra())
        forks = _forks
        try:
            result = processor.func(**injected, **kwargs)
        finally:
            if _forks != forks:
                leave()  # the processor forked, and this is the child: it must not commit
        if (savepoint := injected.get("savepoint")) is not None and savepoint.is_active:
            savepoint.commit()
        if processor.auto_complete:
            outcome = outcomes.succeeded(claim, result, event=self.config.SUCCESS_EVENTS)
        else:
            outcome = outcomes.parked(claim, result)
        sessions = self.queue.db.session
        # Asking for the session would make one, also for a task that never had any.
        used = sessions.registry.has() and sessions().in_transaction()
        # A large result is not held until others are written: they might be many.
        if used or len(outcome.result or "") > self.config.largest_held:
            if fence.commit(self.queue, sessions(), attempt, outcome):
                announce(self.app, self.queue, outcome)
            return None
        return None if claim.settled else outcome

    def _arguments(self, claim: Claim) -> dict[str, t.Any]:
        """Return the task's arguments. Those that were too large to come with the claim are read
        here, and not kept.

        :raises ValueError: if they cannot be had.
        """
        text = claim.arguments
        if text is None:
            session = self.queue.db.session
            try:
                # Not from the pool, which may have no more than one connection for each thread.
                if session.registry.has() and session().in_transaction():
                    text = self._read_arguments(self.queue.connection(session()), claim)
                else:  # without a transaction for a task that uses none
                    with self.engine.connect() as connection:
                        connection.execution_options(isolation_level="AUTOCOMMIT")
                        text = self._read_arguments(connection, claim)
            except sa.exc.DBAPIError as error:
                raise ValueError(f"the task's kwargs cannot be read: {reason(error)}") from error
        return decode(text)

    def _read_arguments(self, connection: Connection, claim: Claim) -> str:
        wanted = {"id": claim.key, "claims": claim.claims, "largest": LARGEST}
        text = connection.scalar(ARGUMENTS.on(self.queue.models), wanted)
        if text is None:
            raise ValueError(f"the task's kwargs take more than {LARGEST} bytes as text")
        return str(text)

    def _rollback(self, *, discard: bool = False) -> None:
        """Roll the session back.

        :param discard: whether its connections are closed and not used again.
        """
        session = self.queue.db.session
        if not session.registry.has():
            return
        try:
            if discard:
                session().invalidate()
            else:
                session.rollback()
        except Exception:
            # The connection is gone, and the transaction with it.
            session.close()
