"""The package's logger."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import typing as t

from .errors import hide_values


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
