"""The signals that make processes leave: what they mean, and how they are passed on."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import types
import typing as t

#: They make a process leave. A terminal that is closed sends SIGHUP.
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


def heeded() -> list[int]:
    """List those that this process heeds: not SIGHUP if it was started with nohup."""
    return [
        number
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


class Impatience:
    """Tells which signals mean at once: SIGQUIT, and SIGINT when it comes again.

    A terminal or a process manager sends a signal to all processes of a group, and a parent passes
    SIGTERM on as well: however often that comes, it means no more than the first.
    """

    def __init__(self) -> None:
        # A signal may interrupt the handler of another; nothing interrupts a step of this.
        self._interrupts = itertools.count()

    def grows(self, number: int) -> bool:
        """Count a signal, and tell whether it means at once."""
        if number == signal.SIGINT:
            return next(self._interrupts) > 0
        return number == signal.SIGQUIT


def end_on_signals() -> None:
    """In a process that will work: let signals end it well before and after the worker's own
    handlers, when there is nothing to lose."""
    for number in heeded():
        signal.signal(number, lambda *_: os._exit(0))


class Relay:
    """Passes the signals to leave on to other processes: as SIGTERM, or as SIGQUIT for at once.

    :param pids: the processes, as they come and go.
    """

    def __init__(self, pids: t.Collection[int]) -> None:
        self._pids = pids
        self._impatience = Impatience()
        self.stopping = False

    def listen(self) -> None:
        """From now on, pass on what comes."""
        for number in heeded():
            signal.signal(number, self.stop)

    @contextlib.contextmanager
    def held(self) -> t.Iterator[t.Collection[int]]:
        """Hold signals back while a process starts, so that none comes before its pid is known; the
        value is the mask that the process must have."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def stop(self, number: int = signal.SIGTERM, frame: types.FrameType | None = None) -> None:
        """Let the processes leave: in order, or at once if that is meant."""
        self.stopping = True
        passed_on = signal.SIGQUIT if self._impatience.grows(number) else signal.SIGTERM
        for pid in list(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, passed_on)
