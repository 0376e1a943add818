"""The fan-out: one LISTEN connection for a process and its children."""

from __future__ import annotations

import contextlib
import mmap

from ..engine.listener import Source
from ..engine.wakeup import Wakeup


class Fanout:
    """A source that passes all its news on to child processes, by ringing a wake-up in each.

    In PostgreSQL, each backend that LISTENs costs every NOTIFY in the database: whoever commits
    signals all of them. So there is one for all children. All are woken, for who has a free thread
    is not known here; they claim with SKIP LOCKED.

    It must be made before the children are, and they use nothing of it but their subscriptions.

    :param source: where the news comes from.
    :param children: how many children there are at a time.
    """

    def __init__(self, source: Source, children: int) -> None:
        self._source = source
        self._wakeups = [Wakeup() for _ in range(children)]
        self._open = contextlib.ExitStack()
        for wakeup in self._wakeups:
            self._open.enter_context(wakeup)
        #: How often the source has begun or ceased to listen; odd while it listens. The children
        #: share this memory: a wake-up that a frozen one leaves full would take no message.
        self._turns = memoryview(mmap.mmap(-1, 8)).cast("Q")

    def subscription(self, child: int) -> Subscription:
        """What a child listens to, given its number from 0. One that takes another's place gets
        the same."""
        return Subscription(self._wakeups[child], self._turns)

    @property
    def listens(self) -> bool:
        return self._source.listens

    @property
    def next_try(self) -> float:
        return self._source.next_try

    def listen(self) -> bool:
        anew = self._source.listen()
        if anew:
            self._pass_on()
        return anew

    def fileno(self) -> int:
        return self._source.fileno()

    def drain(self) -> bool:
        news = self._source.drain()
        if news or not self.listens:
            self._pass_on()
        return news

    def _pass_on(self) -> None:
        if self._turns[0] % 2 != self.listens:
            self._turns[0] += 1
        for wakeup in self._wakeups:
            wakeup.ring()

    def close(self) -> None:
        self._source.close()
        self._open.close()


class Subscription:
    """A source whose news comes from the parent process.

    :param wakeup: rung by the parent.
    :param turns: how often the parent has begun or ceased to listen; odd while it listens.
    """

    #: The parent tries, and rings.
    next_try = float("inf")

    def __init__(self, wakeup: Wakeup, turns: memoryview[int]) -> None:
        self._wakeup = wakeup
        self._turns = turns
        #: Since when it has listened without a gap; 0 if it does not.
        self._turn = 0

    @property
    def listens(self) -> bool:
        return self._turn > 0

    def listen(self) -> bool:
        turn = self._turns[0]
        if self.listens or turn % 2 == 0:
            return False
        self._turn = turn
        return True

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def drain(self) -> bool:
        rung = self._wakeup.drain()
        if self._turns[0] != self._turn:
            self._turn = 0  # even if the parent listens again: there was a gap
        return rung

    def close(self) -> None:
        """Close nothing: it is the parent's."""
