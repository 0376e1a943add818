"""The package's logger."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import traceback
import typing as t

import sqlalchemy as sa

#: What an error quotes, from the first quotation mark to the last: the value may hold some, too.
QUOTED = re.compile(r"""(["']).*\1""", re.DOTALL)


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises: a filter of the app's that does must not decide what becomes of a
    task, or end a worker."""

    def process(
        self, msg: object, kwargs: t.MutableMapping[str, t.Any]
    ) -> tuple[object, t.MutableMapping[str, t.Any]]:
        return msg, kwargs  # with the caller's own ``extra``

    def log(self, level: int, msg: object, *args: object, **kwargs: t.Any) -> None:
        try:
            if kwargs.get("exc_info"):
                hide_values(sys.exc_info()[1])
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except BaseException as error:  # one that is logged may raise anything as it is formatted
            if logging.raiseExceptions:  # as handlers do it
                with contextlib.suppress(BaseException):
                    hide_values(error)
                    traceback.print_exc()


log = Log(logging.getLogger("flask_beanqueue"))


def is_of_database(error: BaseException) -> bool:
    """Whether an error is the database's, the driver's, or SQLAlchemy's about one of theirs."""
    kinds = sa.exc.StatementError, sa.exc.PendingRollbackError
    return isinstance(error, kinds) or hasattr(error, "diag")


def reason(error: BaseException) -> str:
    """An error of the database in one line, without the values that it shows: its DETAIL may hold
    a whole row, such as a task with its arguments."""
    cause = getattr(error, "orig", None) or error
    diag = getattr(cause, "diag", None)  # empty where there was no connection yet
    text = getattr(diag, "message_primary", None) or str(cause)
    refused = isinstance(error, sa.exc.StatementError) and not isinstance(error, sa.exc.DBAPIError)
    if refused or (getattr(diag, "sqlstate", None) or "").startswith("22"):
        text = QUOTED.sub("…", text)  # it is about a value
    # What a PendingRollbackError says next is all of another error.
    return " ".join(text.partition(" Original exception was: ")[0].split())


def hide_values(error: BaseException | None) -> None:
    """Let an exception, and those behind and in it, say of the database's errors only what
    :func:`reason` does: a traceback would show all."""
    errors, seen = [error], set[int]()
    while errors:
        each = errors.pop()
        if each is None or id(each) in seen:  # an exception may be its own cause
            continue
        seen.add(id(each))
        errors += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            errors += each.exceptions
        with contextlib.suppress(Exception):  # it may be of any kind
            if is_of_database(each):
                text = reason(each)
                if isinstance(each, sa.exc.StatementError):
                    each.hide_parameters = True
                    if each.orig is not None:
                        each.orig.args = (text,)
                each.args = (text,)
