"""The supervisor: several worker processes under one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
import types
import typing as t

from .log import log

#: The signals that make a process leave, each with the other one.
OTHER: dict[int, int] = {signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}
#: Seconds after which a process counts as well started.
STEADY = 5.0
#: Processes that may fail to start in a row, for each that there should be.
ATTEMPTS = 3


def end_on_signals() -> None:
    """In a process that will work: let signals end it well before and after the worker's own
    handlers, when there is nothing to lose."""
    for number in OTHER:
        signal.signal(number, lambda *_: os._exit(0))


def flush() -> None:
    """Write what was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be closed
            stream.flush()


class Relay:
    """Passes on the signals that make processes leave: all, or those that come again.

    They may have a signal already: a terminal sends it to a whole group, systemd to all processes
    of a unit. The same one again would make them leave at once. So they get the other one, and get
    it again only when ours comes again.

    :param pids: the processes, as they come and go.
    """

    def __init__(self, pids: t.Collection[int]) -> None:
        self._pids = pids
        self._seen: set[int] = set()
        self.stopping = False

    def listen(self) -> None:
        """From now on, pass on what comes."""
        for number in OTHER:
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
        if not self.stopping or number in self._seen:
            self.stopping = True
            for pid in list(self._pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, OTHER[number])
        self._seen.add(number)


class Supervisor:
    """Starts processes by fork, replaces those that end, and passes SIGTERM and SIGINT on.

    It must be used before the process has threads. If it is killed itself, its processes get
    SIGTERM.

    :param start: what a process does, given its number; its answer is the exit code.
    :param processes: how many.
    :param replaces: whether a process that ends well is replaced, too.
    """

    def __init__(
        self, start: t.Callable[[int], int], processes: int, *, replaces: bool = True
    ) -> None:
        self._start = start
        self._processes = processes
        self._replaces = replaces
        self._children: dict[int, tuple[int, float]] = {}
        self._lifeline = os.pipe()
        self._failures = 0
        self._relay = Relay(self._children)
        self._failed = False

    def run(self) -> int:
        """Run until all processes have left; the exit code is 0 if theirs were."""
        self._relay.listen()
        for index in range(self._processes):
            self._fork(index)
        while self._children:
            pid, status = os.wait()
            if pid in self._children:
                index, since = self._children.pop(pid)
                self._ended(index, pid, time.monotonic() - since, os.waitstatus_to_exitcode(status))
        for end in self._lifeline:
            os.close(end)
        return 1 if self._failed else 0

    def _ended(self, index: int, pid: int, lived: float, code: int) -> None:
        """Replace a process, unless it was to end or cannot start at all."""
        if self._relay.stopping:
            self._failed |= code != 0
            return
        if code == 0 and not self._replaces:
            return
        how = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
        # Who is killed has started: a task may have done it.
        self._failures = self._failures + 1 if code > 0 and lived < STEADY else 0
        if self._failures >= ATTEMPTS * self._processes:
            log.error("Worker process %d (%d) %s; none can start: giving up", index + 1, pid, how)
            self._failed = True
            self._relay.stop()
            return
        log.error("Worker process %d (%d) %s; a new one takes its place", index + 1, pid, how)
        if self._failures:
            time.sleep(1)
        self._fork(index)

    def _fork(self, index: int) -> None:
        with self._relay.held() as mask:
            if self._relay.stopping:
                return
            flush()  # or the child would have it, too
            pid = os.fork()
            if pid == 0:
                self._run_child(index, mask)
            self._children[pid] = index, time.monotonic()

    def _run_child(self, index: int, mask: t.Collection[int]) -> t.NoReturn:
        code = 1
        try:
            end_on_signals()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(self._lifeline[1])
            threading.Thread(target=self._follow, daemon=True).start()
            code = self._start(index)
        except BaseException:
            traceback.print_exc()
        finally:
            flush()
            os._exit(code)

    def _follow(self) -> None:
        """In a child: leave when the supervisor is gone, and its end of the pipe with it."""
        os.read(self._lifeline[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)
