"""The package's logger."""

from __future__ import annotations

import logging
import traceback
import typing as t


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises: a filter of the app's that does must not decide what becomes of a
    task, or end a worker."""

    def process(
        self, msg: object, kwargs: t.MutableMapping[str, t.Any]
    ) -> tuple[object, t.MutableMapping[str, t.Any]]:
        return msg, kwargs  # with the caller's own ``extra``

    def log(self, level: int, msg: object, *args: object, **kwargs: t.Any) -> None:
        try:
            super().log(level, msg, *args, stacklevel=2, **kwargs)
        except Exception:
            if logging.raiseExceptions:  # as handlers do it
                traceback.print_exc()


log = Log(logging.getLogger("flask_beanqueue"))


def reason(error: BaseException) -> str:
    """An error of the database in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
