"""The executor: one task, one app context, one outcome."""

from __future__ import annotations

import contextlib
import logging
import os
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session
from werkzeug.local import LocalProxy

from . import outcome as outcomes
from . import signals
from .claim import Claim, ClaimLost, current_claim
from .config import Config
from .log import log
from .models import PROCESSING
from .outcome import Outcome
from .processor import AnyProcessor

if t.TYPE_CHECKING:
    from .extension import BeanQueue

LOST = (
    "The task is not as it was claimed: it was taken from this worker, or its processor has deleted"
    " it or changed its state, claims or id past the ORM. What the processor wrote is rolled back."
)
#: Claims after which a lost connection is taken for the task's own doing.
INTERRUPTIONS = 20


def execute(app: Flask, bq: BeanQueue, config: Config, claim: Claim) -> Outcome | None:
    """Run the processor of a claimed task in an app context of its own.

    If it used ``db.session``, its effects and its completion are committed together, here.

    :return: the outcome that is still to be written; None if there is none left.
    """
    processor = bq.registry.get(claim.module, claim.func_name)
    if processor is None:
        return outcomes.unknown(claim, len(bq.registry), config.UNKNOWN_GRACE)
    token = current_claim.set(claim)
    outcome: Outcome | None = None
    try:
        with app.app_context():
            outcome = attempt(app, bq, config, claim, processor)
        return outcome
    except BaseException as error:
        # A function that the app runs around its contexts raised: before the processor, or after.
        log.exception("The app context of %s", claim.label, extra=claim.log_extra())
        if outcome is None and not claim.settled:
            return outcomes.failed(claim, error)
        return outcome
    finally:
        current_claim.reset(token)


def attempt(
    app: Flask,
    bq: BeanQueue,
    config: Config,
    claim: Claim,
    processor: AnyProcessor,
) -> Outcome | None:
    """Perform the task, and turn whatever it raises into an outcome."""
    try:
        return perform(app, bq, config, claim, processor)
    except BaseException as error:  # sys.exit() in a task must not end its worker
        rollback(bq)
        if claim.settled:
            log.exception("%s raised after its end", claim.label, extra=claim.log_extra())
            return None
        if is_interruption(error) and claim.claims < INTERRUPTIONS:
            return outcomes.interrupted(claim, error)
        if isinstance(error, ClaimLost):
            # The fence tells whether that is so. If the task is still this worker's, the processor
            # has deleted its row or changed it past the ORM.
            return outcomes.failed(claim, error)
        task = make_task(bq, claim, attempts=claim.attempts + 1)
        return outcomes.failed(claim, error, processor, task)


def is_interruption(error: BaseException) -> bool:
    """Whether the database went away, which is no fault of the task."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    cannot_connect = isinstance(error, sa.exc.OperationalError) and error.statement is None
    return error.connection_invalidated or cannot_connect


def perform(
    app: Flask,
    bq: BeanQueue,
    config: Config,
    claim: Claim,
    processor: AnyProcessor,
) -> Outcome | None:
    """Call the processor and finish: in its transaction, if it opened one."""
    started = signals.task_started
    if started.receivers and not signals.send(started, app, task=attach_task(bq, claim)):
        rollback(bq)  # the processor shall not inherit a broken transaction
    injected = bq.injection(processor.injected)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s starts", claim.label, extra=claim.log_extra())
    process = os.getpid()
    try:
        result = processor.func(**injected, **claim.kwargs)
    finally:
        if os.getpid() != process:
            os._exit(0)  # the processor forked, and this is the child: it must not commit
    if (savepoint := injected.get("savepoint")) is not None and savepoint.is_active:
        savepoint.commit()
    if processor.auto_complete:
        outcome = outcomes.succeeded(claim, result, event=config.SUCCESS_EVENTS)
    else:
        outcome = outcomes.parked(claim, result)
    # Asking for the session would make one, also for a task that never had any.
    if bq.db.session.registry.has() and used(session := bq.db.session(), claim):
        finish(app, bq, session, outcome)
        return None
    return None if claim.settled else outcome


def used(session: Session, claim: Claim) -> bool:
    """Whether a transaction of the session has something to commit."""
    pending = session.new or session.dirty or session.deleted
    return bool(pending) or (claim.began and session.in_transaction())


def finish(app: Flask, bq: BeanQueue, session: Session, outcome: Outcome) -> None:
    """Commit what the processor wrote together with the outcome, if the claim still holds."""
    claim = outcome.claim
    session.flush()
    if claim.settled or ended_in(session, claim):
        session.commit()  # under the guard of before_commit
        return
    connection = session.connection(bind_arguments={"mapper": bq.Task})
    if not outcomes.write(bq.queries, connection, [outcome]):
        raise ClaimLost(LOST)
    claim.ended_in = claim.fenced_in = session.get_transaction()
    session.commit()
    outcomes.announce(app, outcome, lambda: make_task(bq, claim, outcome))


def ended_in(session: Session, claim: Claim) -> bool:
    """Whether the session's open transaction holds the task's outcome."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    while transaction is not None and transaction is not claim.ended_in:
        transaction = transaction.parent
    return transaction is not None


def guard(bq: BeanQueue, session: Session, claim: Claim) -> None:
    """Lock the task's row for the session's commit.

    :raises ClaimLost: if the task is another worker's by now, or somebody else has ended it.
    """
    session.flush()
    connection = session.connection(bind_arguments={"mapper": bq.Task})
    state = bq.queries.hold(connection, claim)
    ended = claim.settled or ended_in(session, claim)
    if state is None or ended == (state == PROCESSING):
        raise ClaimLost(LOST)


def listen_session(db: SQLAlchemy, bq: BeanQueue) -> None:
    """Watch the sessions of ``db`` for what processors do with them."""

    def after_begin(session: Session, transaction: t.Any, connection: t.Any) -> None:
        if (claim := current_claim.get(None)) is not None:
            claim.began = True

    def before_flush(session: Session, context: t.Any, instances: t.Any) -> None:
        # A processor may end its task by setting its state. A state that was loaded says nothing:
        # somebody else may have set it.
        if (claim := current_claim.get(None)) is None:
            return
        task = session.identity_map.get(sa_orm.util.identity_key(bq.Task, claim.id))
        if task is not None and sa.inspect(task).attrs.state.history.has_changes():
            here = session.get_nested_transaction() or session.get_transaction()
            claim.ended_in = None if task.state == PROCESSING else here

    def before_commit(session: Session) -> None:
        # A processor commits by itself: fence that commit, too.
        if (claim := current_claim.get(None)) is None:
            return
        if (savepoint := session.get_nested_transaction()) is not None:
            # Its release commits nothing, but hands over what it holds.
            session.flush()
            if claim.ended_in is savepoint:
                claim.ended_in = savepoint.parent
        elif session.get_transaction() is not claim.fenced_in and used(session, claim):
            guard(bq, session, claim)

    def after_commit(session: Session) -> None:
        claim = current_claim.get(None)
        if claim is not None and not session.in_nested_transaction() and ended_in(session, claim):
            claim.settled = True

    for listener in (after_begin, before_flush, before_commit, after_commit):
        sa.event.listen(db.session, listener.__name__, listener)


def rollback(bq: BeanQueue) -> None:
    if not bq.db.session.registry.has():
        return
    try:
        bq.db.session.rollback()
    except Exception:
        # The connection is gone, and the transaction with it.
        bq.db.session.close()


def make_task(
    bq: BeanQueue, claim: Claim, outcome: Outcome | None = None, attempts: int | None = None
) -> t.Any:
    """Make the ``bq.Task`` of a claim without asking the database, in no session."""
    if attempts is None:
        attempts = claim.attempts + (outcome.attempts if outcome else 0)
    task = bq.Task(
        id=claim.id,
        state=PROCESSING if outcome is None else outcome.state,
        channel=claim.channel,
        module=claim.module,
        func_name=claim.func_name,
        priority=claim.priority,
        claims=claim.claims,
        attempts=attempts,
        crashes=claim.crashes,
    )
    with contextlib.suppress(ValueError):
        task.kwargs = claim.kwargs
    if outcome is not None:
        task.error_message = outcome.error_message
    sa_orm.make_transient_to_detached(task)
    return task


def attach_task(bq: BeanQueue, claim: Claim) -> t.Any:
    """Return the ``bq.Task`` of a claim in ``db.session``; what the claim did not bring loads
    itself when it is asked for."""
    session = bq.db.session()
    task = session.identity_map.get(sa_orm.util.identity_key(bq.Task, claim.id))
    if task is None:
        task = make_task(bq, claim)
        session.add(task)
    return task


def _current_task() -> t.Any:
    claim = current_claim.get(None)
    if claim is None:
        raise RuntimeError(
            "Working outside of a task. current_task is there while a worker runs a processor."
        )
    return attach_task(current_app.extensions["beanqueue"], claim)


#: The ``bq.Task`` that is being done, anywhere below its processor.
current_task: t.Any = LocalProxy(_current_task)
