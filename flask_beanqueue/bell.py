"""The bell: what wakes the worker's loop."""

from __future__ import annotations

import contextlib
import selectors
import socket
import typing as t


class HasFileno(t.Protocol):
    """What a selector can watch."""

    def fileno(self) -> int: ...


class Bell:
    """A pair of sockets, open while the bell is a context: threads and signal handlers write into
    one end, the loop sleeps at the other."""

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

    def ring(self) -> None:
        """Wake the loop, or keep it from its next sleep. For any thread and signal handler."""
        if self._ends is not None:
            with contextlib.suppress(OSError):  # full: it will wake; closed: it has left
                self._ends[1].send(b"\0")

    def ring_if_asleep(self) -> None:
        """Wake the loop if it sleeps; otherwise it looks by itself before it does."""
        if self._asleep:
            self.ring()

    def wait(self, timeout: t.Callable[[], float], *others: HasFileno) -> bool:
        """Sleep until somebody rings, another thing is readable, or the time is over.

        :param timeout: answers after how many seconds that is.
        :return: whether one of the others is readable.
        """
        assert self._ends is not None
        near = self._ends[0]
        # First asleep, then the time: news between the two rings the bell.
        self._asleep = True
        with selectors.DefaultSelector() as selector:
            for each in (near, *others):
                selector.register(each, selectors.EVENT_READ)
            rung = [key.fileobj for key, _ in selector.select(timeout())]
        self._asleep = False
        if near in rung:
            rung.remove(near)
            with contextlib.suppress(BlockingIOError):
                near.recv(4096)
        return bool(rung)
