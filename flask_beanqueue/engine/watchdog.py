"""The watchdog: ends a process in which no thread gets a turn."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import typing as t

from ..log import log

#: Turns that its thread has within the timeout.
TURNS = 5


class Watchdog(threading.Thread):
    """A thread that puts off the end of the process for as long as it gets its turns.

    A regular expression that takes for ever, or a C function that keeps Python's lock, stops all
    threads: no heartbeat is sent, and no handler of a signal is called. So the end comes from a
    timer in C, that of faulthandler, which writes where each thread is and leaves with exit code 1.
    It waits for no query, so it does not mistake an outage of the database for a hang. When a
    process was stopped for longer than the timeout (SIGSTOP, a frozen container), the end may come
    as soon as it goes on, unless the thread is faster.

    There is one such timer in a process, and so one watchdog. What a task forks has none; it ends
    with ``os._exit`` (``shutdown.leave``), and so does not wait for the timer's thread, as Python
    does at its end.

    :param timeout: seconds without a turn.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(name="beanqueue-watchdog", daemon=True)
        self._timeout = timeout
        self._stopped = threading.Event()

    def __enter__(self) -> None:
        self.arm()
        self.start()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        while not self._stopped.wait(self._timeout / TURNS):
            self.arm()

    def arm(self) -> None:
        faulthandler.dump_traceback_later(self._timeout, file=log_file(), exit=True)


def log_file() -> int:
    """Return the descriptor of the file that the queue's log goes to, or else of stderr."""
    logger: logging.Logger | None = log
    while logger is not None:
        for handler in logger.handlers:
            if (number := descriptor(getattr(handler, "stream", None))) is not None:
                return number
        logger = logger.parent if logger.propagate else None
    number = descriptor(sys.stderr)
    return 2 if number is None else number


def descriptor(stream: t.Any) -> int | None:
    """Return the descriptor of a stream; None if it has none."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or not of a file
        return int(stream.fileno())
    return None
