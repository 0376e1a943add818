"""The database's errors, and what they mean for a worker."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa

#: What a worker's loop survives.
TROUBLE = (sa.exc.DBAPIError, sa.exc.TimeoutError)

#: Classes of SQLSTATE by which PostgreSQL refuses a value, or what a constraint or a trigger does
#: not let pass; and what a damaged row answers.
REFUSALS = {"21", "22", "23", "27", "2F", "38", "39", "44", "54", "P0", "XX"}
#: Those by which it refuses a statement, whatever the values: it does not fit the tables, or a
#: right is missing. They may also come from within a trigger, which meets some values only.
MISFITS = {"0A", "42"}


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """The five characters by which PostgreSQL calls an error, with psycopg2 and psycopg 3."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or ""


def is_refusal(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses what it was given, and would do so again. A database that is
    read-only or full does not: it may change its mind."""
    return not error.connection_invalidated and sqlstate(error)[:2] in REFUSALS


def is_misfit(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses a statement as such, or a trigger's."""
    return not error.connection_invalidated and sqlstate(error)[:2] in MISFITS


def is_lock_timeout(error: sa.exc.DBAPIError) -> bool:
    """Whether somebody else keeps a lock for longer than was to be waited."""
    return sqlstate(error) == "55P03"


def is_interruption(error: BaseException, losses: t.Collection[BaseException]) -> bool:
    """Whether an error comes from a connection that was lost, which is no fault of the task.

    :param losses: what the driver raised when that happened.
    """
    if losses and isinstance(error, sa.exc.PendingRollbackError):
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
