"""The database's errors, and what they mean for a worker."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa

#: What a worker's loop survives.
TROUBLE = (sa.exc.DBAPIError, sa.exc.TimeoutError)


def sqlstate(error: sa.exc.DBAPIError) -> str:
    """The five characters by which PostgreSQL calls an error, with psycopg2 and psycopg 3."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or ""


def is_refusal(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses what it was given, and would do so again: a value, a
    constraint, a trigger, a limit."""
    if error.connection_invalidated:
        return False
    kinds = (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.InternalError)
    return isinstance(error, kinds) or sqlstate(error).startswith("54")


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
    while cause is not None:
        if any(getattr(cause, "orig", None) is loss for loss in losses):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
