"""The wake-up: what a loop sleeps on, that of a worker or a supervisor."""

from __future__ import annotations

import contextlib
import selectors
import socket
import typing as t


class HasFileno(t.Protocol):
    """What a selector can watch."""

    def fileno(self) -> int: ...


class Wakeup:
    """A pair of sockets, open while this is a context: threads, signal handlers and a parent
    process write into one end, the loop sleeps at the other."""

    def __init__(self) -> None:
        self._asleep = False
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> None:
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)

    def __exit__(self, *error: object) -> None:
        for end in self._ends or ():
            end.close()

    def fileno(self) -> int:
        assert self._ends is not None
        return self._ends[0].fileno()

    @property
    def wakes(self) -> int:
        """A file that rings when it is written to, for :func:`shutdown.handle`."""
        assert self._ends is not None
        return self._ends[1].fileno()

    def ring(self) -> None:
        """Wake the loop, or keep it from its next sleep. For any thread and signal handler."""
        if self._ends is not None:
            with contextlib.suppress(OSError):  # full: it will wake; closed: it has left
                self._ends[1].send(b"\0")

    def ring_if_asleep(self) -> None:
        """Wake the loop if it sleeps; otherwise it looks by itself before it does."""
        if self._asleep:
            self._asleep = False
            self.ring()

    def drain(self) -> bool:
        """Take what was rung, and tell whether it was."""
        assert self._ends is not None
        with contextlib.suppress(BlockingIOError):
            return bool(self._ends[0].recv(4096))
        return False

    def wait(self, timeout: t.Callable[[], float | None], *others: HasFileno) -> bool:
        """Sleep until somebody rings, another thing is readable, or the time is over.

        :param timeout: answers after how many seconds that is; never, if with None.
        :return: whether one of the others is readable.
        """
        # First asleep, then the time: news between the two wakes it.
        self._asleep = True
        # With poll(2), to register takes no system call, for each of which Python's lock is given
        # away.
        with selectors.PollSelector() as selector:
            for each in (self, *others):
                selector.register(each, selectors.EVENT_READ)
            rung = [key.fileobj for key, _ in selector.select(timeout())]
        self._asleep = False
        if self in rung:
            rung.remove(self)
            self.drain()
        return bool(rung)
