"""The supervisor: several worker processes under one."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import typing as t
import uuid

from .. import clock as time
from .. import signals
from ..engine.listener import Source
from ..engine.shutdown import Handlers, Relay, end_on_signals, flush, handling, leave
from ..engine.wakeup import Wakeup
from ..log import log
from ..models.uuid7 import uuid7

#: Seconds after which a process counts as well started.
STEADY = 5.0
#: How often in a row each process, on average, fails to start until none counts as able to.
ATTEMPTS = 3
#: Seconds before the next start while processes end early one after the other, or cannot be forked.
PAUSE = 1.0
#: How many predecessors a process is told of.
REMEMBERED = 100


class Place(t.NamedTuple):
    """What a process is told when it is started."""

    #: Which of the processes it is, from 0.
    number: int
    #: What the database is to call its worker.
    worker_id: uuid.UUID
    #: Those that had the place before it, and did not leave in order. Nobody knows it sooner than
    #: their parent: they need not be waited for until their heartbeats are missed. Who came next
    #: may have died before it could say so of those before it, so it is said again.
    predecessors: tuple[uuid.UUID, ...]


class Supervisor:
    """Starts processes by fork, replaces those that end, and passes on the signals to leave.

    It must be used before the process has threads. If it is killed itself, its processes get
    SIGTERM.

    :param start: what a process does, given its place; its answer is the exit code.
    :param processes: how many.
    :param replaces: whether a process that ends well is replaced, too.
    :param source: what is to be listened to and drained for the processes.
    """

    def __init__(
        self,
        start: t.Callable[[Place], int],
        processes: int,
        *,
        replaces: bool = True,
        source: Source | None = None,
    ) -> None:
        self._start = start
        self._replaces = replaces
        self._source = source
        self._bell = Wakeup()
        self._processes = processes
        #: The numbers of processes that are to be started, and not before when.
        self._vacant = list(range(processes))
        self._start_at = 0.0
        self._children: dict[int, tuple[Place, float]] = {}
        #: By number, the workers that were there.
        self._dead: dict[int, tuple[uuid.UUID, ...]] = dict.fromkeys(range(processes), ())
        #: How many in a row have failed to start, and how many have ended early.
        self._failures = self._early = 0
        #: By number, whether its worker has started; shared with the processes.
        self._started = mmap.mmap(-1, processes)
        self._lifeline = os.pipe()
        self._relay = Relay(self._children)
        self._failed = False

    def run(self) -> int:
        """Run until all processes have left; the exit code is 0 if theirs were."""
        self._relay.listen()
        ring: Handlers = {signal.SIGCHLD: lambda *_: None}  # what has no handler rings no bell
        with self._bell, handling(ring, self._bell.wakes):
            self._listen()  # before the first starts, which says whether it polls
            while self._children or (self._vacant and not self._relay.stopping):
                self._fill()
                self._listen()
                self._wait()
                self._reap()
        for end in self._lifeline:
            os.close(end)
        return 1 if self._failed else 0

    def _listen(self) -> None:
        if self._source is not None and not self._relay.stopping:
            self._source.listen()

    def _wait(self) -> None:
        """Sleep until a signal, news, or the time comes to do something."""
        watched = [self._source] if self._source and self._source.fileno() >= 0 else []
        if self._bell.wait(self._timeout, *watched):
            for source in watched:
                source.drain()

    def _timeout(self) -> float | None:
        """Seconds until there is something to do without a signal and news."""
        until = [self._start_at] if self._vacant else []
        if self._source is not None and not self._source.listens:
            until.append(self._source.next_try)
        at = min(until, default=float("inf"))
        if self._relay.stopping or at == float("inf"):
            return None
        return max(at - time.monotonic(), 0.0)

    def _reap(self) -> None:
        for pid in list(self._children):  # and no others, which are the app's
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                place, since = self._children.pop(pid)
                self._ended(place, pid, time.monotonic() - since, os.waitstatus_to_exitcode(status))

    def _ended(self, place: Place, pid: int, lived: float, code: int) -> None:
        """Replace a process, unless it was to end or cannot start at all."""
        if self._relay.stopping:
            self._failed |= code != 0
            return
        if code == 0 and not self._replaces:
            return
        number = place.number
        how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
        # One that a signal has ended, or that had started, may have been ended by a task.
        fails = code > 0 and not self._started[number]
        self._failures = self._failures + 1 if fails else 0
        if self._failures >= ATTEMPTS * self._processes and not self._any_works:
            log.error("Worker process %d (%d) %s; none can start: giving up", number + 1, pid, how)
            self._failed = True
            self._relay.stop()
            return
        log.error("Worker process %d (%d) %s; a new one takes its place", number + 1, pid, how)
        self._dead[number] = (*place.predecessors, place.worker_id)[-REMEMBERED:]
        self._vacant.append(number)
        self._early = self._early + 1 if lived < STEADY else 0
        if self._early > 1:
            self._start_at = time.monotonic() + PAUSE

    @property
    def _any_works(self) -> bool:
        return any(self._started[place.number] for place, _ in self._children.values())

    def _fill(self) -> None:
        """Start the processes that are missing, if it is time."""
        if time.monotonic() >= self._start_at:
            vacant, self._vacant = self._vacant, []
            for number in vacant:
                self._fork(Place(number, uuid7(), self._dead[number]))

    def _fork(self, place: Place) -> None:
        with self._relay.held() as mask:
            if self._relay.stopping:
                return
            flush()  # otherwise the child would have it, too
            self._started[place.number] = False
            try:
                pid = os.fork()
            except OSError as error:  # there may be processes or memory again
                number = place.number
                log.error(
                    "Worker process %d cannot be started, and is tried again: %s", number + 1, error
                )
                self._vacant.append(number)
                self._start_at = time.monotonic() + PAUSE
                return
            if pid == 0:
                self._run_child(place, mask)
            self._children[pid] = place, time.monotonic()

    def _run_child(self, place: Place, mask: t.Collection[int]) -> t.NoReturn:
        try:
            end_on_signals()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(self._lifeline[1])
            threading.Thread(target=self._follow, daemon=True).start()
            signals.worker_started.connect(
                lambda *_, **__: self._started.__setitem__(place.number, True), weak=False
            )
            sys.exit(self._start(place))
        finally:
            leave()

    def _follow(self) -> None:
        """In a child: leave when the supervisor is gone, and its end of the pipe with it."""
        os.read(self._lifeline[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)
