"""Stuck tasks: those that keep a worker from beginning any other."""

from __future__ import annotations

import datetime
import typing as t

from sqlalchemy.engine import Connection

from .. import clock as time
from ..log import log
from .threads import Threads


class Stuck:
    """Names tasks that have run for long, if nothing else can begin because of them.

    :param after: seconds that are long.
    :param worker_name: what the log calls the worker.
    :param occupied: tells whether a task runs beside which nothing may begin.
    """

    def __init__(
        self, threads: Threads, after: float, worker_name: str, occupied: t.Callable[[], bool]
    ) -> None:
        self._threads = threads
        self._after = after
        self._worker_name = worker_name
        self._occupied = occupied
        #: Tokens of the claims that have been named.
        self._named: set[str] = set()

    def look(self, connection: Connection) -> float:
        """Name them, each once; return after how many seconds to look again."""
        now, began = time.monotonic(), self._threads.began
        newest = max(began.values(), default=now)
        if newest + self._after > now:
            return newest + self._after - now
        if len(began) < self._threads.size and not self._occupied():
            return self._after
        for claim, at in began.items():
            if claim.token not in self._named:
                since = datetime.datetime.now() - datetime.timedelta(seconds=now - at)
                log.warning(
                    "%s has run since %s, and worker %s begins no other task until one of its own"
                    " ends",
                    claim.label,
                    since.isoformat(" ", "seconds"),
                    self._worker_name,
                    extra=claim.log_extra(),
                )
        self._named = {claim.token for claim in began}
        return self._after
