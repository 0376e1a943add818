"""The executor: one task, one app context, one outcome."""

from __future__ import annotations

import collections
import logging
import os

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Engine

from . import arguments, fence, signals
from . import clock as time
from . import outcome as outcomes
from .claim import Claim, ClaimLost, running
from .config import Config
from .errors import READ_ONLY, is_interruption, reason, sqlstate_of
from .log import log
from .outcome import Outcome
from .processor import AnyProcessor
from .queue import Queue
from .registry import Registry
from .shutdown import leave

#: Seconds for which tasks of one worker go through the same. The loop tries again after 2, at most.
TOGETHER = 3.0

#: How often the process has become another one.
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


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
        #: When tasks were interrupted last, or the loop, which ones, and with which SQLSTATEs.
        self._interrupted: collections.deque[tuple[float, str, set[str]]] = collections.deque(
            maxlen=16
        )

    def execute(self, claim: Claim) -> Outcome | None:
        """Run the processor of a claimed task in an app context of its own.

        If it used ``db.session``, its effects and its completion are committed together, here. It
        raises nothing.

        :return: the outcome that is still to be written; None if there is none left.
        """
        processor = self.registry.get(claim.module, claim.func_name)
        if processor is None:
            return outcomes.unknown(claim, len(self.registry), self.config.UNKNOWN_GRACE)
        outcome: Outcome | None = None
        told = 0
        try:
            with running(claim, self.app), self.app.app_context():
                try:
                    outcome = self._perform(claim, processor)
                except BaseException as error:  # sys.exit() in a task must not end its worker
                    outcome = self._decide(claim, processor, error)
                    told = id(error)
                    raise  # to tell it to what the app runs at the end of its contexts
        except BaseException as error:
            if id(error) != told:
                # A function that the app runs around its contexts raised: before the processor, or
                # after.
                if outcome is None and not claim.settled:
                    return outcomes.failed(claim, error)
                log.exception("The app context of %s", claim.label, extra=claim.log_extra())
        return outcome

    def _decide(
        self, claim: Claim, processor: AnyProcessor, error: BaseException
    ) -> Outcome | None:
        """Roll back, turn what a task has raised into an outcome, within its app context, and log
        that."""
        self._rollback()
        if claim.settled:
            log.exception("%s raised after its end", claim.label, extra=claim.log_extra())
            return None
        interrupted = is_interruption(error, claim.losses)
        if interrupted:
            codes = {sqlstate_of(loss) for loss in claim.losses}
            self._interrupted.append((time.monotonic(), claim.key, codes))
        if interrupted and not self._chose_read_only(claim):
            outcome = outcomes.interrupted(claim, error, alone=self._is_alone(claim))
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
            )
        if outcome.exception is not None:
            outcomes.log_failure(outcome)
        return outcome

    def _chose_read_only(self, claim: Claim) -> bool:
        """Whether it was the task itself that made its transaction one that may only read: nobody
        else met that, and others may write."""
        if not any(sqlstate_of(loss) == READ_ONLY for loss in claim.losses):
            return False
        if not self._is_alone(claim, READ_ONLY):
            return False
        try:
            connection = self.queue.connection(self.queue.db.session())
            return not self.queue.queries.is_read_only(connection)
        except sa.exc.DBAPIError:
            return False
        finally:
            self._rollback()

    def _is_alone(self, claim: Claim, code: str | None = None) -> bool:
        """Whether neither the loop nor another task was interrupted lately.

        :param code: the SQLSTATE that is asked about; all, if there is none.
        """
        since = time.monotonic() - TOGETHER
        return not any(
            at > since and key != claim.key and (code is None or not key or code in codes)
            for at, key, codes in list(self._interrupted)
        )

    def note_trouble(self) -> None:
        """The worker's loop cannot use the database."""
        self._interrupted.append((time.monotonic(), "", set()))

    def _perform(self, claim: Claim, processor: AnyProcessor) -> Outcome | None:
        """Call the processor and finish: in its transaction, if it opened one."""
        sessions = fence.watch(self.queue)
        started = signals.task_started
        if not signals.send(started, self.app, lambda: {"task": self.queue.attach_task(claim)}):
            self._rollback()  # the processor shall not inherit a broken transaction
        if claim.arguments is None:
            self._read_arguments(claim)
        injected = self.queue.injection(processor.injected)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s starts", claim.label, extra=claim.log_extra())
        forks = _forks
        try:
            result = processor.func(**injected, **claim.kwargs)
        finally:
            if _forks != forks:
                leave()  # the processor forked, and this is the child: it must not commit
        if self.queue.db.session is not sessions:
            sessions.remove()
            raise RuntimeError(
                "db.session was exchanged while the task ran, so what it wrote may be in the one or"
                " in the other. Exchange it before workers start."
            )
        if (savepoint := injected.get("savepoint")) is not None and savepoint.is_active:
            savepoint.commit()
        if processor.auto_complete:
            outcome = outcomes.succeeded(claim, result, event=self.config.SUCCESS_EVENTS)
        else:
            outcome = outcomes.parked(claim, result)
        # Asking for the session would make one, also for a task that never had any.
        used = sessions.registry.has() and sessions().in_transaction()
        # A large result is not held until others are written: they might be many.
        if used or len(outcome.result or "") > self.config.largest_held:
            if fence.commit(self.queue, sessions(), outcome):
                outcomes.announce(self.app, self.queue, outcome)
            return None
        return None if claim.settled else outcome

    def _read_arguments(self, claim: Claim) -> None:
        """Read the arguments that were too large to come with the claim.

        They are read in autocommit: a task that does not use the session gets no transaction by it.
        """
        try:
            with self.engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                claim.arguments = self.queue.queries.arguments(connection, claim, arguments.LARGEST)
        except sa.exc.DBAPIError as error:
            raise ValueError(f"the task's kwargs cannot be read: {reason(error)}") from error
        if claim.arguments is None:
            raise ValueError(f"the task's kwargs take more than {arguments.LARGEST} bytes as text")

    def _rollback(self) -> None:
        session = self.queue.db.session
        if not session.registry.has():
            return
        try:
            session.rollback()
        except Exception:
            # The connection is gone, and the transaction with it.
            session.close()
