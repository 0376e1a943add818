"""The fence: no commit of ``db.session`` goes through for a claim that is lost."""

from __future__ import annotations

import threading
import typing as t
import uuid
import weakref

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from ..current import Attempt, current_attempt
from ..exceptions import ClaimLost, TaskStateError
from ..models.task import DONE, PENDING, PROCESSING
from ..sql import Sql
from . import settle
from .claim import COLUMNS, NO_ARGUMENTS, Claim
from .database import is_passing
from .handover import check_autocommit, innermost, note
from .outcome import Outcome
from .queue import Queue

# The fence of a commit that is not the task's last, and of one whose processor set the task's state
# itself: the row stays locked until that commit, so that take-over cannot come between.
HOLD = Sql("""
    SELECT state FROM {tasks} WHERE id = :id AND claims = :claims FOR NO KEY UPDATE
""")

# What a call from outside needs to know of a task that it ends.
HELD = Sql(
    """
    SELECT {claim}, state, parked FROM {tasks} WHERE id = :id FOR NO KEY UPDATE
    """,
    claim=COLUMNS,
)

LOST = (
    "The task is not as it was claimed: it was taken from this worker, or its processor has sent it"
    " back into the queue, deleted it, or changed its state, claims or id past the ORM. What the"
    " processor has not committed is rolled back."
)


#: The states of what has not ended.
LIVE = (PENDING, PROCESSING)

#: The connections that tasks' sessions use, and for which transaction.
_begun: weakref.WeakKeyDictionary[Connection, weakref.ref[SessionTransaction]] = (
    weakref.WeakKeyDictionary()
)


def hold(queue: Queue, connection: Connection, claim: Claim) -> str | None:
    """Lock a claimed task's row until the commit, and return its state; None if it is not this
    claim's any more."""
    wanted = {"id": claim.id, "claims": claim.claims}
    row = connection.execute(HOLD.on(queue.models), wanted).first()
    return None if row is None else str(row.state)


def held(
    queue: Queue, connection: Connection, task_id: uuid.UUID
) -> tuple[Claim, str, bool] | None:
    """Lock a task's row until the commit; return its last claim, its state, and whether it is
    parked."""
    wanted = {"id": task_id, "most": NO_ARGUMENTS}
    row = connection.execute(HELD.on(queue.models), wanted).first()
    return None if row is None else (Claim(*row[:-2]), row.state, row.parked)


def ended_in(session: Session, attempt: Attempt) -> bool:
    """Whether the session's open transaction holds the task's outcome."""
    transaction: t.Any = innermost(session)
    while transaction is not None and transaction is not attempt.ended_in:
        transaction = transaction.parent
    return transaction is not None


def commit(queue: Queue, session: Session, attempt: Attempt, outcome: Outcome) -> bool:
    """Commit what the processor wrote together with the outcome, if the claim still holds.

    :return: whether the outcome was written here; if not, the processor had ended its task itself.
    :raises ClaimLost: if the claim does not hold; nothing is committed.
    """
    attempt.completing = True
    session.flush()
    if attempt.claim.settled or ended_in(session, attempt):
        session.commit()  # under the guard of before_commit
        return False
    if not settle.write_one(queue.connection(session), queue.models, outcome):
        raise ClaimLost(LOST)
    attempt.ended_in = attempt.fenced_in = session.get_transaction()
    session.commit()
    return True


def guard(queue: Queue, session: Session, attempt: Attempt) -> None:
    """Lock the task's row for the session's commit.

    :raises ClaimLost: if the task is another worker's by now, or somebody else has ended it.
    :raises RuntimeError: as :func:`refuse_other_session` does.
    """
    session.flush()
    refuse_other_session(session, attempt)
    claim = attempt.claim
    if claim.settled:
        # The task has ended and this comes after it; unless it waits again, and is another's.
        found = held(queue, queue.connection(session), claim.id)
        if found is not None and found[0].claims != claim.claims:
            raise ClaimLost(LOST)
        return
    state = hold(queue, queue.connection(session), claim)
    if state is None or ended_in(session, attempt) == (state == PROCESSING):
        raise ClaimLost(LOST)


def refuse_other_session(session: Session, attempt: Attempt) -> None:
    """Refuse to wait for a lock that the processor itself holds.

    :raises RuntimeError: if another session has changed the task's row and is not through yet.
    """
    other = attempt.changed_in
    if other is not None and other.is_active and other is not session.get_transaction():
        raise RuntimeError(
            f"{attempt.claim.label} has changed its own task in another session, which is not"
            " committed yet and keeps the row locked, so this session cannot be checked against the"
            " claim. Commit the other session first, or use one session (one app context) for both."
        )


def take_state(queue: Queue, connection: Connection, attempt: Attempt, task: t.Any) -> None:
    """Let a processor set its task's state: it must still be its own to set, and is an attempt.

    :raises ClaimLost: if the task is another worker's by now, or somebody else has ended it.
    """
    session, claim = sa.inspect(task).session, attempt.claim
    state = hold(queue, connection, claim)
    ended = claim.settled or ended_in(session, attempt)
    if state is None or (state != PROCESSING and not ended):
        raise ClaimLost(LOST)
    if claim.settled:
        return
    over = task.state != PROCESSING  # otherwise the processor has taken back what it set before
    task.attempts = claim.attempts + over
    set_finished_at(task)
    attempt.ended_in = innermost(session) if over else None


def change_state(queue: Queue, connection: Connection, task: t.Any) -> None:
    """Somebody else sets a task's state, perhaps in an object that is older than the row: that may
    end what waits or runs, and nothing else.

    :raises TaskStateError: if it would change how the task has ended.
    """
    inspected = sa.inspect(task)
    found = held(queue, connection, inspected.identity[0])
    if found is None:
        return  # it is deleted, and the UPDATE will say so
    _, state, _ = found
    known = next(iter(inspected.attrs.state.history.deleted or ()), state)
    is_over = state not in LIVE
    if task.state == state:
        return
    if is_over:
        fine = task.state == PENDING and known == state != DONE
    else:
        fine = task.state not in LIVE or known == state
    if not fine:
        if state == DONE:
            advice = "What is done stays done: to do it again, enqueue a new task."
        elif is_over and known == state:
            advice = "What has ended stays as it ended, unless it is set to PENDING to run again."
        else:
            advice = f"It was {known} when it was read: db.session.refresh(task), and decide again."
        raise TaskStateError(
            f"Task {task.id} is {state} and cannot be made {task.state}. {advice}", state
        )
    set_finished_at(task)


def set_finished_at(task: t.Any) -> None:
    task.finished_at = None if task.state in LIVE else sa.func.clock_timestamp()


def listen_states(queue: Queue) -> None:
    """See to it that tasks which the ORM writes keep the states in which they have ended."""

    def before_update(mapper: t.Any, connection: Connection, task: t.Any) -> None:
        # A state that was loaded says nothing: somebody else may have set it.
        inspected = sa.inspect(task)
        sets_state = inspected.attrs.state.history.has_changes()
        attempt = current_attempt()
        if attempt is None or attempt.claim.id != inspected.identity[0]:
            if sets_state:
                change_state(queue, connection, task)
        elif inspected.session.is_modified(task):
            refuse_other_session(inspected.session, attempt)
            if sets_state:
                take_state(queue, connection, attempt, task)
            attempt.changed_in = inspected.session.get_transaction()

    sa.event.listen(queue.Task, "before_update", before_update, propagate=True)


#: What makes the sessions that are watched. (SQLAlchemy knows listeners by the id of what they
#: listen to, which another object may have when that is gone.)
_watched: weakref.WeakSet[t.Any] = weakref.WeakSet()
_watching = threading.Lock()


def watch(queue: Queue) -> t.Any:
    """Watch what processors do with the sessions of ``db.session``, and return it. It is watched
    where it is used, for the app may exchange it at any time.

    :raises RuntimeError: if nobody can tell which sessions it makes.
    """
    sessions: t.Any = queue.db.session
    if sessions is queue.watched:
        return sessions
    factory = sessions.session_factory if isinstance(sessions, scoped_session) else None
    if not isinstance(factory, sessionmaker):
        raise RuntimeError(
            f"The queue cannot watch what a processor commits in {sessions!r}, which is in the"
            " place of db.session: write db.session = scoped_session(sessionmaker(…))."
        )
    with _watching:
        if factory not in _watched:
            for listener in (after_begin, before_commit, after_commit):
                sa.event.listen(sessions, listener.__name__, listener)
            _watched.add(factory)
    queue.watched = sessions
    return sessions


def queue_of(attempt: Attempt) -> Queue:
    return t.cast(Queue, attempt.app.extensions["beanqueue"])


# What sessions tell.


def after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # What a processor's session does must wait for the fence.
    if (attempt := current_attempt()) is None or transaction.nested:
        return
    if connection.engine.pool is queue_of(attempt).bind(session).engine.pool:
        check_autocommit(connection)
        _begun[connection] = weakref.ref(transaction)


def before_commit(session: Session) -> None:
    # A processor commits by itself: fence that commit, too.
    if (attempt := current_attempt()) is None:
        return
    if session.in_nested_transaction():
        session.flush()  # the release of a savepoint commits nothing
    elif session.get_transaction() is attempt.fenced_in:
        pass  # the fence has been written
    else:
        guard(queue_of(attempt), session, attempt)


def after_commit(session: Session) -> None:
    if (attempt := current_attempt()) is None:
        return
    if (savepoint := session.get_nested_transaction()) is not None:
        # It hands over what it holds. A savepoint around it that is released with it comes next,
        # and says so only here.
        if attempt.ended_in is savepoint:
            attempt.ended_in = savepoint.parent
    elif ended_in(session, attempt):
        attempt.claim.settled = True
        # Otherwise the attempt would keep all that they hold.
        attempt.ended_in = attempt.fenced_in = attempt.changed_in = None


def listen_engine(engine: Engine) -> None:
    """Tell apart the trouble that tasks have with the queue's own database from any other, and
    commit none of their sessions' connections past the session."""

    def handle_error(context: sa.engine.ExceptionContext) -> None:
        if (attempt := current_attempt()) is None:
            return
        lost = context.is_disconnect or context.connection is None  # or never had
        error = context.sqlalchemy_exception
        if lost or (
            isinstance(error, sa.exc.DBAPIError)
            and is_passing(error, completing=attempt.completing)
        ):
            attempt.losses += (context.original_exception,)

    def commit(connection: Connection) -> None:
        transaction = begun() if (begun := _begun.get(connection)) is not None else None
        if transaction is not None and transaction.is_active:  # the session is not committing
            raise RuntimeError(
                "Nobody can tell whether the task is still this worker's where a connection of"
                " db.session is committed past the session. Write db.session.commit(), or use a"
                " connection of your own: with db.engine.begin() as connection."
            )

    for listener in (handle_error, commit):
        sa.event.listen(engine, listener.__name__, listener)


def end(queue: Queue, task_id: uuid.UUID, decide: t.Callable[[Claim], Outcome]) -> None:
    """End a parked task, or the one that runs here, in ``db.session``.

    :raises LookupError: if there is no such task.
    :raises TaskStateError: if the task has ended already, or another processor is at it.
    """
    session: Session = queue.db.session()
    session.flush()
    connection = queue.connection(session)
    own = current_attempt()
    if own is not None and own.claim.id != task_id:
        own = None
    if own is not None:
        refuse_other_session(session, own)
    found = held(queue, connection, task_id)
    if found is None:
        raise LookupError(f"There is no task {task_id}.")
    claim, state, parked = found
    if own is not None:
        claim = own.claim  # with its own number of claims: it may be lost by now
        own.changed_in = session.get_transaction()
    elif state == PROCESSING and not parked:
        raise TaskStateError(
            f"Task {task_id} is still with its worker. It can be ended once its processor has"
            " returned; a webhook that came early has to come again.",
            state,
        )
    if state != PROCESSING:
        raise TaskStateError(f"Task {task_id} is {state}; only a running one can be ended.", state)
    outcome = decide(claim)
    outcome.attempts = int(own is not None)  # a parked task's attempt is counted
    outcome.was_parked = own is None
    if not settle.write_one(connection, queue.models, outcome):
        raise TaskStateError(f"Task {task_id} was taken from this worker.", state)
    if own is not None:
        own.ended_in = innermost(session)
    note(session, f"the end of the task {claim.name}")
    if (task := queue.known_task(session, task_id)) is not None:
        session.expire(task)
