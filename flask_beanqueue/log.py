"""The package's logger."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import typing as t

from .errors import without_values


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises: a filter of the app's that does must not decide what becomes of a
    task, or end a worker."""

    def process(
        self, msg: object, kwargs: t.MutableMapping[str, t.Any]
    ) -> tuple[object, t.MutableMapping[str, t.Any]]:
        return msg, kwargs  # with the caller's own ``extra``

    def log(self, level: int, msg: object, *args: object, **kwargs: t.Any) -> None:
        try:
            if not self.isEnabledFor(level):
                return
            if kwargs.get("exc_info") and (error := sys.exc_info()[1]) is not None:
                kwargs["exc_info"] = without_values(error)
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except BaseException as problem:  # one that is logged may raise anything as it is formatted
            if logging.raiseExceptions:  # as handlers do it
                with contextlib.suppress(BaseException):
                    traceback.print_exception(without_values(problem))


log = Log(logging.getLogger("flask_beanqueue"))
