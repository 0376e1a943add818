"""The threads that run claimed tasks."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import typing as t

from .. import clock as time
from ..log import log
from .claim import Claim
from .outcome import Outcome, describe, failed, given_back

#: Seconds within which a claimed task should start: how much is claimed ahead.
HORIZON = 0.1
#: Weight of the newest duration in their running mean: little, or a thread that had to wait for
#: Python's lock, which takes a hundred times as long as a short task, would count for much.
NEWEST = 0.02


class Done(t.NamedTuple):
    """An outcome that is still to be written, and since when."""

    at: float
    outcome: Outcome


class Threads:
    """Threads that run tasks, with a queue of claims before them and one of outcomes behind.

    :param size: how many threads.
    :param perform: runs a task; it must not raise.
    :param on_news: called from the threads when there is something to do for whoever watches:
        the first outcome is there, or as many as are written at once, or claims run short.
    :param on_loss: called from a thread that ends although nobody has dismissed it.
    :param many: how many outcomes that is.
    """

    def __init__(
        self,
        size: int,
        perform: t.Callable[[Claim], Outcome | None],
        on_news: t.Callable[[], None],
        on_loss: t.Callable[[], None],
        many: int,
    ) -> None:
        self.size = size
        self.done: collections.deque[Done] = collections.deque()
        #: Claims of tasks of which nothing is left to write. Here and there, one may come twice.
        self.through: collections.deque[Claim] = collections.deque()
        self._perform = perform
        self._on_news = on_news
        self._on_loss = on_loss
        self._many = many
        self._ready: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        #: How many claims had been added at which time, of those that no thread may have begun.
        self._added: collections.deque[tuple[float, int]] = collections.deque()
        self._added_in_all = 0
        #: How many outcomes, and how few waiting claims, are news.
        self._news_at, self._low = 1, 0
        #: When each claim began whose task runs.
        self._began: dict[Claim, float] = {}
        #: Seconds that a task takes.
        self._mean: float | None = None

    def start(self) -> None:
        for number in range(self.size):
            name = f"beanqueue-{number}"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def dismiss(self) -> None:
        """Let each thread end with the task that it is at."""
        for _ in range(self.size):
            self._ready.put(None)

    def add(self, claims: t.Collection[Claim]) -> None:
        self._added_in_all += len(claims)
        self._added.append((time.monotonic(), self._added_in_all))
        for claim in claims:
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
    def began(self) -> dict[Claim, float]:
        """The claims whose tasks run, each with when it began by the monotonic clock."""
        return self._began.copy()

    @property
    def wanted(self) -> int:
        """How many tasks more to claim.

        Short tasks are wanted in hundreds, and again when half of them have begun; long ones only
        as threads get free.
        """
        target, waiting = self._target(), self.waiting
        return min(target - waiting, self._many) if 2 * waiting <= target else 0

    def _target(self) -> int:
        """How many tasks will start within the horizon, at the durations seen."""
        now = time.monotonic()
        began = list(self._began.values())
        target = self.size - len(began)
        if self._mean is not None:
            # A thread that has been busy for longer may be so for a while.
            moving = self.size - sum(now - at > HORIZON for at in began)
            target = max(target, int(moving * HORIZON / max(self._mean, 1e-6)))
        # Twice as many as go into one statement: one lot is run while the next one is claimed.
        return min(target, 2 * self._many)

    def watch(self) -> None:
        """Say what is news to whoever goes to sleep now.

        Nothing is counted for it by the threads: a lock that they took for each short task would
        be waited for so often that Python's own lock went to and fro with every task.
        """
        self._news_at = self._many if self.done else 1
        half = self._target() // 2
        self._low = half if self.waiting > half else 0

    @property
    def waited_for(self) -> float:
        """Seconds for which the first of the waiting claims has waited."""
        begun = self._added_in_all - self.waiting
        while self._added and self._added[0][1] <= begun:
            self._added.popleft()
        return time.monotonic() - self._added[0][0] if self._added else 0.0

    def _run(self) -> None:
        try:
            while not self._take_turns():
                pass
        except BaseException:  # of whatever kind: there is one thread less, and perhaps a claim
            self._on_loss()
            raise

    def _take_turns(self) -> bool:
        """Run tasks until dismissed, or until something is raised between them.

        The timeouts of some libraries raise in a thread from without, and may do so when the
        processor has returned, at any of the calls here. What was in hand then is not lost: a task
        that has not begun is given back, and an outcome is handed over, perhaps a second time.

        :return: whether dismissed.
        """
        claim: Claim | None = None
        outcome: Outcome | None = None
        try:
            # Not ``claim = get()``: an exception that comes while a thread waits in a call is
            # raised when that has returned, and what it returned is gone. Nothing is raised
            # between an iterator's step and its variable.
            for claim in iter(self._ready.get, None):
                began = self._began[claim] = time.monotonic()
                outcome = self._perform(claim)
                ended = time.monotonic()
                mean = ended - began if self._mean is None else self._mean
                self._mean = mean + NEWEST * (ended - began - mean)
                del self._began[claim]
                if outcome is None:
                    self.through.append(claim)
                else:
                    self.done.append(Done(ended, outcome))
                claim = outcome = None
                if len(self.done) >= self._news_at or self.waiting <= self._low:
                    self._on_news()
            return True
        except BaseException as error:
            if claim is not None:
                begun = self._began.pop(claim, None) is not None
                if outcome is None and not claim.settled:
                    outcome = failed(claim, error) if begun else given_back(claim)
                if outcome is None:
                    self.through.append(claim)
                else:
                    self.done.append(Done(time.monotonic(), outcome))
            log.error(
                "A thread goes on after what was raised between its tasks: %s",
                describe(error),
            )
            self._on_news()
            return False
