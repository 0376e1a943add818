"""The watch over workers: starts those again that end, as a process manager does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

from ..processes import Process

#: Seconds after which a worker that has ended is started again.
RESTART_AFTER = 0.1
#: Seconds that workers have to leave.
LEAVES_WITHIN = 60.0


class Watch:
    """:param start: starts a worker, given its number.
    :param number: how many there are.
    """

    def __init__(self, start: Callable[[int], Process], number: int) -> None:
        self._start = start
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.workers = [start(each) for each in range(number)]
        #: What those that have ended said.
        self.outputs: list[str] = []
        #: With which codes they ended by themselves.
        self.codes: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(RESTART_AFTER):
            with self._lock:
                for number, worker in enumerate(self.workers):
                    if (code := worker.code) is not None and not self._over.is_set():
                        self._note(worker, code)
                        self.workers[number] = self._start(number)

    def _note(self, worker: Process, code: int) -> None:
        self.codes.append(code)
        worker.clean_up()
        self.outputs.append(worker.output)

    def stop(self) -> list[int]:
        """Let all workers leave, and return their exit codes."""
        self._over.set()
        self._thread.join()
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.thaw()
                worker.send(signal.SIGTERM)
        codes = []
        for worker in self.workers:
            try:
                codes.append(worker.wait(LEAVES_WITHIN))
            except AssertionError:
                codes.append(-signal.SIGKILL)
            worker.clean_up()
            self.outputs.append(worker.output)
        return codes
