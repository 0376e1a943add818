"""The supervisor: several worker processes under one."""

from __future__ import annotations

import os
import signal
import time
import traceback
import types
import typing as t

from .log import log

#: Seconds that a process must have lived to be replaced at once when it dies.
STEADY = 5.0


class Supervisor:
    """Starts processes by fork, replaces those that die, and passes SIGTERM and SIGINT on.

    It must be used before the process has threads.

    :param start: what a process does, given its number; its answer is the exit code.
    :param processes: how many.
    """

    def __init__(self, start: t.Callable[[int], int], processes: int) -> None:
        self._start = start
        self._processes = processes
        self._children: dict[int, tuple[int, float]] = {}
        self._stopping = False
        self._failed = False

    def run(self) -> int:
        """Run until all processes have left; the exit code is 0 if theirs were."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for index in range(self._processes):
            self._fork(index)
        while self._children:
            pid, status = os.wait()
            if pid not in self._children:
                continue
            index, since = self._children.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                continue
            if self._stopping:
                self._failed = True
                continue
            log.error(
                "Worker process %d (%d) %s; a new one takes its place",
                index + 1,
                pid,
                f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}",
            )
            if time.monotonic() - since < STEADY:
                time.sleep(1)  # perhaps it cannot start at all
            if not self._stopping:
                self._fork(index)
        return 1 if self._failed else 0

    def _fork(self, index: int) -> None:
        # A signal between the fork and the child's own handlers must end the child.
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for number in signals:
                    signal.signal(number, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                code = self._start(index)
            except KeyboardInterrupt:
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self._children[pid] = index, time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _stop(self, number: int, frame: types.FrameType | None) -> None:
        self._stopping = True
        for pid in self._children:
            os.kill(pid, signal.SIGTERM)
