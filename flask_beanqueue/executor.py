"""The executor: one task, one app context, one outcome."""

from __future__ import annotations

import logging
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
from .processor import Processor

if t.TYPE_CHECKING:
    from .extension import BeanQueue


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
    except BaseException:
        # A teardown function of the app raised; the task has ended before it.
        log.exception("The app context of %s", claim.name, extra=claim.log_extra())
        return outcome
    finally:
        current_claim.reset(token)


def attempt(
    app: Flask,
    bq: BeanQueue,
    config: Config,
    claim: Claim,
    processor: Processor[t.Any, t.Any, t.Any],
) -> Outcome | None:
    """Perform the task, and turn whatever it raises into an outcome."""
    try:
        return perform(app, bq, config, claim, processor)
    except ClaimLost:
        rollback(bq)
        outcomes.lost(claim)
    except BaseException as error:  # sys.exit() in a task must not end its worker
        rollback(bq)
        if not claim.settled:
            task = make_task(bq, claim, attempts=claim.attempts + 1)
            return outcomes.failed(claim, error, processor, task)
        log.exception("%s raised after its end", claim.name, extra=claim.log_extra())
    return None


def perform(
    app: Flask,
    bq: BeanQueue,
    config: Config,
    claim: Claim,
    processor: Processor[t.Any, t.Any, t.Any],
) -> Outcome | None:
    """Call the processor and finish: in its transaction, if it opened one."""
    if signals.task_started.receivers:
        signals.send(signals.task_started, app, task=attach_task(bq, claim))
    injected = bq.injection(processor.injected)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s starts", claim.name, extra=claim.log_extra())
    result = processor.func(**injected, **claim.kwargs)
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
    if claim.settled or claim.fenced_in or set_by_processor(bq, session, claim):
        session.commit()  # under the guard of before_commit
        return
    connection = session.connection(bind_arguments={"mapper": bq.Task})
    if not outcomes.write(bq.queries, connection, [outcome]):
        raise ClaimLost
    claim.fenced_in = session.get_transaction()
    session.commit()
    outcomes.announce(app, outcome, lambda: make_task(bq, claim, outcome))


def set_by_processor(bq: BeanQueue, session: Session, claim: Claim) -> bool:
    """Whether the processor gave its task another state through the ORM."""
    task = session.identity_map.get(sa_orm.util.identity_key(bq.Task, claim.id))
    if task is None:
        return False
    return bool(sa.inspect(task).dict.get("state", PROCESSING) != PROCESSING)


def guard(bq: BeanQueue, session: Session, claim: Claim) -> None:
    """Lock the task's row for the session's commit.

    :raises ClaimLost: if the task is another worker's by now.
    """
    connection = session.connection(bind_arguments={"mapper": bq.Task})
    state = bq.queries.hold(connection, claim)
    set_here = claim.settled or set_by_processor(bq, session, claim)
    if state is None or (state != PROCESSING and not set_here):
        raise ClaimLost(
            f"Task {claim.id} was taken from this worker; what it wrote must not be committed."
        )
    if set_here:
        claim.fenced_in = session.get_transaction()


def listen_session(db: SQLAlchemy, bq: BeanQueue) -> None:
    """Watch the sessions of ``db`` for what processors do with them."""

    def after_begin(session: Session, transaction: t.Any, connection: t.Any) -> None:
        if (claim := current_claim.get(None)) is not None:
            claim.began = True

    def before_commit(session: Session) -> None:
        # A processor commits by itself: fence that commit, too. Releasing a savepoint commits
        # nothing; and where the outcome is written already, the fence has been passed.
        claim = current_claim.get(None)
        if claim is None or claim.fenced_in or session.in_nested_transaction():
            return
        if used(session, claim):
            guard(bq, session, claim)

    def after_commit(session: Session) -> None:
        claim = current_claim.get(None)
        if claim is not None and claim.fenced_in and not session.in_nested_transaction():
            claim.fenced_in = None
            claim.settled = True

    def after_soft_rollback(session: Session, previous: t.Any) -> None:
        claim = current_claim.get(None)
        if claim is None:
            return
        transaction = claim.fenced_in
        while transaction is not None:
            if transaction is previous:
                claim.fenced_in = None
            transaction = transaction.parent

    for listener in (after_begin, before_commit, after_commit, after_soft_rollback):
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
        kwargs=claim.kwargs,
        priority=claim.priority,
        claims=claim.claims,
        attempts=attempts,
        crashes=claim.crashes,
    )
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
