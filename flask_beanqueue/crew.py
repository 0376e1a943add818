"""The crew: the threads that run claimed tasks."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
import typing as t

from .claim import Claim
from .outcome import Outcome

#: Seconds within which a claimed task should start: how much is claimed ahead.
HORIZON = 0.1
#: Weight of the newest duration in their running mean.
NEWEST = 0.1


class Done(t.NamedTuple):
    """A task that a thread is through with."""

    at: float
    claim: Claim
    #: What is still to be written, if anything.
    outcome: Outcome | None


class Crew:
    """Threads that run tasks, with a queue of claims before them and one of outcomes behind.

    :param size: how many threads.
    :param perform: runs a task; it must not raise.
    :param on_news: called from the threads when there is something to do for whoever watches:
        nothing is left to begin, or the first of many tasks is done, or the last.
    :param many: how many tasks that is.
    """

    def __init__(
        self,
        size: int,
        perform: t.Callable[[Claim], Outcome | None],
        on_news: t.Callable[[], None],
        many: int,
    ) -> None:
        self.size = size
        self.done: collections.deque[Done] = collections.deque()
        self._perform = perform
        self._on_news = on_news
        self._many = many
        self._counting = threading.Lock()
        self._ready: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        #: By thread, when its task began.
        self._began: dict[int, float] = {}
        #: Seconds that a task takes.
        self._mean: float | None = None

    def start(self) -> None:
        for number in range(self.size):
            name = f"beanqueue-{number}"
            threading.Thread(target=self._run, args=(number,), name=name, daemon=True).start()

    def dismiss(self) -> None:
        """Let each thread end with the task that it is at."""
        for _ in range(self.size):
            self._ready.put(None)

    def add(self, claim: Claim) -> None:
        self._ready.put(claim)

    def take_back(self) -> list[Claim]:
        """Take back what no thread has begun."""
        claims = []
        with contextlib.suppress(queue.Empty):
            while (claim := self._ready.get_nowait()) is not None:
                claims.append(claim)
        return claims

    @property
    def waiting(self) -> int:
        """How many claims no thread has begun."""
        return self._ready.qsize()

    @property
    def running(self) -> int:
        return len(self._began)

    @property
    def wanted(self) -> int:
        """How many tasks more will start within the horizon, at the durations seen.

        Short tasks are wanted in hundreds, and again when half of them have begun; long ones only
        as threads get free.
        """
        now = time.monotonic()
        began = list(self._began.values())
        target = self.size - len(began)
        if self._mean is not None:
            # A thread that has been busy for longer may be so for a while.
            moving = self.size - sum(now - at > HORIZON for at in began)
            target = max(target, int(moving * HORIZON / max(self._mean, 1e-6)))
        # Twice as many as go into one statement: one lot is run while the next one is claimed.
        target = min(target, 2 * self._many)
        waiting = self.waiting
        return min(target - waiting, self._many) if 2 * waiting <= target else 0

    @property
    def stuck_for(self) -> float:
        """Seconds for which no thread has begun anything, since all are busy."""
        began = list(self._began.values())
        return time.monotonic() - max(began) if len(began) == self.size else 0.0

    def _run(self, number: int) -> None:
        while (claim := self._ready.get()) is not None:
            began = self._began[number] = time.monotonic()
            outcome = self._perform(claim)
            ended = time.monotonic()
            mean = ended - began if self._mean is None else self._mean
            self._mean = mean + NEWEST * (ended - began - mean)
            with self._counting:  # or two threads would pass a number that is news
                self.done.append(Done(ended, claim, outcome))
                count = len(self.done)
            del self._began[number]
            if self._ready.empty() or count in (1, self._many):
                self._on_news()
