"""The signals that make processes leave: which of them count, and how they are passed on."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import types
import typing as t

#: The signals that make a process leave, each with another one. A terminal that is closed sends
#: SIGHUP, perhaps twice: its shell does so, too.
OTHER: dict[int, int] = {
    signal.SIGTERM: signal.SIGINT,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
}


def heeded() -> list[int]:
    """Those of them that this process heeds: not SIGHUP if it was started with nohup."""
    return [
        number
        for number in OTHER
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


class Summons:
    """Tells which signals count: the first of all, and one that comes again, which means at once.

    Ctrl-C reaches a whole process group, and a parent may send SIGTERM on top of it; that is one
    summons and no impatience. A signal may interrupt the handler of another, so it is counted with
    what nothing can interrupt.
    """

    def __init__(self) -> None:
        self._all = itertools.count()
        self._each = {number: itertools.count() for number in OTHER}

    def count(self, number: int) -> tuple[bool, bool]:
        """Count a signal; tell whether it is the first of all, and whether it comes again."""
        first, again = next(self._all) == 0, next(self._each[number]) > 0
        return first, again and number != signal.SIGHUP


def end_on_signals() -> None:
    """In a process that will work: let signals end it well before and after the worker's own
    handlers, when there is nothing to lose."""
    for number in heeded():
        signal.signal(number, lambda *_: os._exit(0))


class Relay:
    """Passes on the signals that make processes leave: all, or those that come again.

    They may have a signal already: a terminal sends it to a whole group, systemd to all processes
    of a unit. The same one again would make them leave at once. So they get the other one, and get
    it again only when ours comes again.

    :param pids: the processes, as they come and go.
    """

    def __init__(self, pids: t.Collection[int]) -> None:
        self._pids = pids
        self._summons = Summons()
        self.stopping = False

    def listen(self) -> None:
        """From now on, pass on what comes."""
        for number in heeded():
            signal.signal(number, self.stop)

    @contextlib.contextmanager
    def held(self) -> t.Iterator[t.Collection[int]]:
        """Hold signals back while a process starts, so that none comes before its pid is known; the
        value is the mask that the process must have."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OTHER)
        try:
            yield mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def stop(self, number: int = signal.SIGINT, frame: types.FrameType | None = None) -> None:
        """Let the processes leave; called again for the same signal, at once."""
        self.stopping = True
        if any(self._summons.count(number)):
            for pid in list(self._pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, OTHER[number])
