"""The database's errors: what they mean for a worker, and what is said of them."""

from __future__ import annotations

import contextlib
import inspect
import re
import traceback
import typing as t

import sqlalchemy as sa

#: What a worker's loop survives. The driver raises a MemoryError if it cannot hold an answer.
SURVIVABLE = (sa.exc.DBAPIError, sa.exc.TimeoutError, MemoryError)

#: How the SQLSTATEs of passing trouble begin, which is nobody's fault: of the connection, of a
#: transaction that may only read or is to be tried again, of what has run out, of an operator, of
#: the system.
PASSING = ("08", "25", "40", "53", "57P", "58", "F0")
#: Those that are passing trouble for a task, too, wherever it meets them; and those that are if it
#: meets them in its completion, which is the queue's. Others may come of what the task does.
PASSING_IN_TASKS = ("08", "25006", "53", "57P", "58", "F0")
PASSING_IN_COMPLETIONS = ("40", "54000")
#: A letter cannot be converted into the database's encoding, or out of the client's.
LETTERS = ("22P05", "22021")
#: A transaction may only read.
READ_ONLY = "25006"
#: A transaction has failed, and is gone on with.
FAILED_TRANSACTION = "25P02"
#: Those that no other connection changes; a prepared statement of another's is there on one only.
HOPELESS, DUPLICATE_STATEMENT = ("3F", "42"), "42P05"
#: Something is full, or too large.
LIMIT = "54000"
#: A lock was waited for, or the statement worked on, for as long as somebody allows.
TIMEOUTS = {"55P03", "57014"}

#: The code of generators and coroutines, whose frames may go on after an exception.
SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

#: The class of SQLSTATE of errors about a value.
ABOUT_A_VALUE = "22"
#: Where a word begins in the name of a class.
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")
#: What SQLAlchemy quotes, from the first quotation mark to the last: the value may hold some, too.
QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """The five characters by which PostgreSQL calls an error, with psycopg2 and psycopg 3."""
    return sqlstate_of(error.orig)


def sqlstate_of(error: t.Any) -> str:
    """The same, for an error of the driver's."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or ""


def is_refusal(error: Exception) -> bool:
    """Whether the database refuses what it was given, and may do so again: whatever is no passing
    trouble, by its code. What has none is the driver's own."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    code = sqlstate(error)
    return bool(code) and not error.connection_invalidated and not code.startswith(PASSING)


def is_hopeless(error: sa.exc.DBAPIError) -> bool:
    """Whether it cannot help to try again on another connection: PostgreSQL says that the statement
    does not fit the tables, or that a right is missing; or the driver takes no such URL.

    By SQLSTATE, for the drivers' classes differ: psycopg 3 has triggers' own errors and a lost
    prepared statement (26000) among its ProgrammingErrors.
    """
    if error.connection_invalidated:
        return False
    code = sqlstate(error)
    if not code:
        return isinstance(error, sa.exc.ProgrammingError)
    return code.startswith(HOPELESS) and code != DUPLICATE_STATEMENT


def is_timeout(error: sa.exc.DBAPIError) -> bool:
    """Whether it took too long, which is no fault of what was given."""
    return sqlstate(error) in TIMEOUTS


def is_of_letters(error: sa.exc.DBAPIError) -> bool:
    """Whether a text has a letter that the database's encoding lacks."""
    return sqlstate(error) in LETTERS


def is_read_only(error: t.Any) -> bool:
    """Whether an error of the driver's says that the transaction may only read."""
    return sqlstate_of(error) == READ_ONLY


def is_of_failed(error: BaseException) -> bool:
    """Whether a statement was refused because an earlier one of its transaction had failed."""
    return isinstance(error, sa.exc.DBAPIError) and sqlstate(error) == FAILED_TRANSACTION


def is_limit(error: sa.exc.DBAPIError) -> bool:
    """Whether something is full or too large; the queue of notifications, for example."""
    return sqlstate(error) == LIMIT


def is_passing(error: sa.exc.DBAPIError, *, completing: bool) -> bool:
    """Whether an error that a task meets is passing trouble, which is no fault of the task.

    :param completing: whether it meets it in its completion.
    """
    code = sqlstate(error)
    if not code:
        return type(error) is sa.exc.DatabaseError  # the client's: it is out of memory, say
    return code.startswith(PASSING_IN_TASKS) or (
        completing and code.startswith(PASSING_IN_COMPLETIONS)
    )


def is_interruption(error: BaseException, losses: t.Collection[BaseException]) -> bool:
    """Whether an error comes from passing trouble, such as a lost connection.

    :param losses: what was raised when that happened.
    """
    if losses and (isinstance(error, sa.exc.PendingRollbackError) or is_of_failed(error)):
        return True  # the processor went on in the lost transaction
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))  # an exception may be its own cause
        if any(loss is cause or loss is getattr(cause, "orig", None) for loss in losses):
            return True
        # Not by its truth, which may be an exception's own.
        cause = cause.__context__ if cause.__cause__ is None else cause.__cause__
    return False


def clear_frames(error: BaseException) -> None:
    """Let go of the variables of all frames of an exception, and of those behind it and in it."""
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        if (each := found.pop()) is None or id(each) in seen:  # one may be its own cause
            continue
        seen.add(id(each))
        for frame, _ in traceback.walk_tb(each.__traceback__):
            # A generator may have caught it and be in use; to clear its frame would close it.
            if not frame.f_code.co_flags & SUSPENDABLE:
                with contextlib.suppress(RuntimeError):  # it is at work still
                    frame.clear()
        found += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions


# What is said of them.


def text_of(error: BaseException) -> str:
    """Return what an error says. Of the database's, that is one line without the values that they
    show: the DETAIL may hold a whole row, such as a task with its arguments."""
    try:
        of_database = isinstance(error, (sa.exc.StatementError, sa.exc.PendingRollbackError))
        return brief(error) if of_database or hasattr(error, "diag") else str(error)
    except Exception as problem:  # of a ``__str__`` of the app's own
        return f"(its message cannot be read: {type(problem).__name__})"


def reason(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return " ".join(text_of(error).split())


def brief(error: t.Any) -> str:
    orig = getattr(error, "orig", None)
    cause = error if orig is None else orig
    diag = getattr(cause, "diag", None)  # empty where there was no connection yet
    code = getattr(diag, "sqlstate", None) or ""
    if code.startswith(ABOUT_A_VALUE):
        # Its message quotes the value, each language in its own way. The driver's class has the
        # name that PostgreSQL has for the code.
        return f"{WORD.sub(' ', type(cause).__name__).lower()} ({code})"
    text = getattr(diag, "message_primary", None) or str(cause)
    if isinstance(error, sa.exc.StatementError) and not isinstance(error, sa.exc.DBAPIError):
        text = QUOTED.sub("…", text)  # SQLAlchemy itself refuses a value
    # What a PendingRollbackError says next is all of another error.
    return " ".join(text.partition(" Original exception was: ")[0].split())
