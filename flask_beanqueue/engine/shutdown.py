"""Signals and forks: which signals make processes leave, and what a forked child is without."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import traceback
import types
import typing as t

Handlers = t.Mapping[int, t.Callable[[int, types.FrameType | None], t.Any]]

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


#: For each call of :func:`handle`, the handlers and the wake-up file that were there before.
_replaced: list[tuple[dict[int, t.Any], int]] = []


def handle(handlers: Handlers, wakes: int = -1) -> None:
    """Handle signals from now on. A child that is forked gets back what was there before.

    :param handlers: by the numbers of the signals.
    :param wakes: a file that each signal with a handler writes to: Python calls the handler of one
        that comes just before a sleep only when the sleep is over.
    """
    _replaced.append(
        ({number: signal.getsignal(number) for number in handlers}, signal.set_wakeup_fd(-1))
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)


def put_back() -> None:
    """Undo the last call of :func:`handle`."""
    handlers, wakes = _replaced[-1]
    for number, handler in handlers.items():
        # None: by something that is not Python.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(wakes)
    _replaced.pop()


@contextlib.contextmanager
def handling(handlers: Handlers, wakes: int) -> t.Iterator[None]:
    """Handle signals meanwhile, as :func:`handle` does."""
    handle(handlers, wakes)
    try:
        yield
    finally:
        put_back()


#: By thread that forks, its mask of signals; None if the queue handles none.
_masks = threading.local()


def _before_fork() -> None:
    # A signal that reached the child while it still has these handlers would be lost.
    held = signal.valid_signals()
    _masks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, held) if _replaced else None


def _after_fork() -> None:
    if _masks.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.mask)


def _after_fork_in_child() -> None:
    while _replaced:
        put_back()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


def flush() -> None:
    """Write what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be closed
            stream.flush()


def leave() -> t.NoReturn:
    """End a forked child as a script ends, after what is raised at the moment; but without what the
    process that it was forked from would do at its end."""
    error = sys.exception()
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    elif error is not None and not isinstance(error, SystemExit):
        traceback.print_exc()
    flush()
    os._exit(code or 0)


def end_on_signals() -> None:
    """In a process that will work: let signals end it well before and after the worker's own
    handlers, when there is nothing to lose."""
    handle(dict.fromkeys(heeded(), lambda *_: os._exit(0)))


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
        handle(dict.fromkeys(heeded(), self.stop))

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
