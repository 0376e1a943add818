"""The database's errors: what they mean for a worker, and what is said of them."""

from __future__ import annotations

import re
import typing as t

import sqlalchemy as sa

#: What a worker's loop survives. The driver raises a MemoryError if it cannot hold an answer.
TROUBLE = (sa.exc.DBAPIError, sa.exc.TimeoutError, MemoryError)

#: How the SQLSTATEs of passing trouble begin, which is nobody's fault: of the connection, of a
#: transaction that may only read or is to be tried again, of what has run out, of an operator, of
#: the system.
PASSING = ("08", "25", "40", "53", "57P", "58", "F0")
#: Those that are passing trouble for a task, too, wherever it meets them; and those that are if it
#: meets them in its completion, which is the queue's. Others may come of what the task does.
PASSING_IN_TASKS = ("08", "25006", "53", "57P", "58", "F0")
PASSING_IN_COMPLETIONS = ("40", "54000")
#: A transaction may only read: as any does at present, or since the task wanted it to.
READ_ONLY = "25006"
#: A transaction has failed, and is gone on with.
FAILED_TRANSACTION = "25P02"
#: Those by which PostgreSQL refuses a statement, whatever the values: it does not fit the tables,
#: or a right is missing. They may also come from within a trigger, which meets some values only.
MISFITS = ("0A", "3F", "42")
#: Those by which it refuses to hand over a value: it cannot be converted, or is too long as text.
OF_VALUES = ("22", "54", "XX")
#: Those that no other connection changes; a prepared statement of another's is there on one only.
HOPELESS, DUPLICATE_STATEMENT = ("3F", "42"), "42P05"
#: Something is full, or too large.
LIMIT = "54000"
#: A lock was waited for, or the statement worked on, for as long as somebody allows.
TIMEOUTS = {"55P03", "57014"}

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


def is_refusal(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses what it was given, and may do so again: whatever is no passing
    trouble, by its code. What has none is the driver's own."""
    code = sqlstate(error)
    return bool(code) and not error.connection_invalidated and not code.startswith(PASSING)


def is_misfit(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses a statement as such, or a trigger's."""
    return is_refusal(error) and sqlstate(error).startswith(MISFITS)


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


def may_be_of_values(error: sa.exc.DBAPIError) -> bool:
    """Whether the database may have refused to hand over a value that it holds."""
    return is_refusal(error) and sqlstate(error).startswith(OF_VALUES)


def is_timeout(error: sa.exc.DBAPIError) -> bool:
    """Whether it took too long, which is no fault of what was given."""
    return sqlstate(error) in TIMEOUTS


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

    :param losses: what the driver raised when that happened.
    """
    if losses and (isinstance(error, sa.exc.PendingRollbackError) or is_of_failed(error)):
        return True  # the processor went on in the lost transaction
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))  # an exception may be its own cause
        if any(getattr(cause, "orig", None) is loss for loss in losses):
            return True
        # Not by its truth, which may be an exception's own.
        cause = cause.__context__ if cause.__cause__ is None else cause.__cause__
    return False


# What is said of them.


def name_of(error: BaseException) -> str:
    """What an exception's class is called, whatever its metaclass makes of that."""
    return t.cast(str, type.__dict__["__name__"].__get__(type(error)))


def is_of_database(error: BaseException) -> bool:
    """Whether an error is the database's, the driver's, or SQLAlchemy's about one of theirs."""
    kinds = sa.exc.StatementError, sa.exc.PendingRollbackError
    try:
        return isinstance(error, kinds) or hasattr(error, "diag")
    except Exception:  # a property of an exception of the app's
        return False


def text_of(error: BaseException, says: t.Callable[[t.Any], str] = str) -> str:
    """What an exception says, whatever its own methods do."""
    try:
        return str.__str__(says(error))  # whose class may be one of its own
    except BaseException as unprintable:
        return f"(its message cannot be read: {name_of(unprintable)})"


def reason(error: BaseException) -> str:
    """An error of the database in one line, without the values that it shows: its DETAIL may hold
    a whole row, such as a task with its arguments. Of others, what they say."""
    return text_of(error, brief)


def brief(error: t.Any) -> str:
    if not is_of_database(error):
        return " ".join(str(error).split())
    orig = getattr(error, "orig", None)
    cause = error if orig is None else orig
    diag = getattr(cause, "diag", None)  # empty where there was no connection yet
    code = getattr(diag, "sqlstate", None) or ""
    if code.startswith(ABOUT_A_VALUE):
        # Its message quotes the value, each language in its own way. The driver's class has the
        # name that PostgreSQL has for the code.
        return f"{WORD.sub(' ', name_of(cause)).lower()} ({code})"
    text = getattr(diag, "message_primary", None) or str(cause)
    if isinstance(error, sa.exc.StatementError) and not isinstance(error, sa.exc.DBAPIError):
        text = QUOTED.sub("…", text)  # SQLAlchemy itself refuses a value
    # What a PendingRollbackError says next is all of another error.
    return " ".join(text.partition(" Original exception was: ")[0].split())


def without_values(error: BaseException) -> BaseException:
    """An exception that says, as those behind and in it do, of the database's errors only what
    :func:`reason` does: a traceback would show all. They are copies, for the app may still look at
    its own.

    :return: the exception itself, if there is none of the database's.
    """
    errors: dict[int, BaseException] = {}
    found: list[BaseException | None] = [error]
    while found:
        each = found.pop()
        if each is None or id(each) in errors:  # an exception may be its own cause
            continue
        errors[id(each)] = each
        found += [each.__cause__, each.__context__]
        if isinstance(each, sa.exc.StatementError):
            found.append(each.orig)
        if isinstance(each, BaseExceptionGroup):
            found += each.exceptions
    if not any(is_of_database(each) for each in errors.values()):
        return error
    copies: dict[int, BaseException] = {}
    for each in errors.values():
        copy(each, copies)
    for key, each in errors.items():
        copied = copies[key]
        copied.__cause__ = copies.get(id(each.__cause__))
        copied.__context__ = copies.get(id(each.__context__))
        copied.__suppress_context__ = each.__suppress_context__
        copied.__traceback__ = each.__traceback__
        if isinstance(copied, sa.exc.StatementError):
            copied.orig = copies.get(id(copied.orig))
    return copies[id(error)]


def copy(error: BaseException, copies: dict[int, BaseException]) -> BaseException:
    """Copy an exception by itself, a group with what is in it; without values, if it is the
    database's.

    :param copies: those that have been made, by the id of what they are copies of.
    """
    if id(error) not in copies:
        inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        copied = [copy(each, copies) for each in inside]
        try:  # they may be of any kind
            copies[id(error)] = (
                copy_of_database(error) if is_of_database(error) else copy_of_app(error, copied)
            )
        except Exception:
            text = reason(error)
            copies[id(error)] = Exception(f"{name_of(error)}: {text}" if text else name_of(error))
    return copies[id(error)]


def copy_of_database(error: BaseException) -> BaseException:
    # Not by calling the class, whose ``__init__`` may do or want anything.
    copied = type(error).__new__(type(error), *error.args)
    copied.args = (reason(error),)
    if isinstance(error, sa.exc.SQLAlchemyError):  # the driver's keep the answer
        vars(copied).update(vars(error))
    if isinstance(copied, sa.exc.StatementError):
        copied.hide_parameters = True
    return copied


def copy_of_app(error: BaseException, inside: list[BaseException]) -> BaseException:
    """
    :raises Exception: if the copy does not say the same.
    """
    kind = type(error)
    if isinstance(error, BaseExceptionGroup):
        copied: BaseException = kind.__new__(kind, error.message, inside)
    else:
        copied = kind.__new__(kind, *error.args)
        builtin = next(each for each in kind.__mro__ if each.__module__ == "builtins")
        builtin.__init__(copied, *error.args)  # type: ignore[misc]
        copied.args = error.args
        if isinstance(error, OSError):  # which are not among the arguments
            copied.filename, copied.filename2 = error.filename, error.filename2  # type: ignore[attr-defined]
    vars(copied).update(vars(error))
    if str(copied) != str(error):
        raise ValueError("the copy says something else")
    return copied
