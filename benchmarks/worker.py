"""The worker of a system, while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

from .tally import Sum, tally

#: Seconds that a worker may take to start its first task.
START = 30.0
#: Seconds that it may take to end.
END = 8.0
#: Seconds between two looks at what the tasks have told.
GLANCE = 0.01


class Worker:
    """Processes that do tasks; at the end they are ended in good order, or after a while in any."""

    def __init__(self, *processes: subprocess.Popen[bytes]) -> None:
        self.processes = processes

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait(self, until: Callable[[], bool], seconds: float = START) -> bool:
        """Wait for something, and tell whether it came.

        :raises RuntimeError: if the worker leaves before that.
        """
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                return False
            if any(process.poll() is not None for process in self.processes):
                if until():  # it was the last thing that it did
                    return True
                raise RuntimeError("The worker has left before its tasks were done.")
            time.sleep(GLANCE)
        return True

    def work(
        self, number: int, seconds: float, glance: Callable[[Sum], None] = lambda told: None
    ) -> Sum:
        """Let tasks be done, so many or so long, and return what they told then.

        :param seconds: from the first task on.
        :param glance: is shown what the tasks have told, again and again.
        :raises RuntimeError: if the worker does not begin.
        """
        told = tally().sum()

        def over() -> bool:
            nonlocal told
            told = tally().sum()
            glance(told)
            late = told.done > 0 and time.monotonic() - told.first > seconds
            return told.done >= number or late

        if not self.wait(lambda: over() or told.done > 0):
            raise RuntimeError(f"The worker began nothing within {START:g} s.")
        if self.wait(over, seconds + START) and told.done >= number:
            return told
        return told._replace(last=time.monotonic())  # also who stands still takes that time
