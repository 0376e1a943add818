"""Worker processes as users start them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from .probe import Probe

#: What a worker says when it is ready.
READY = " known; "
#: Short, so that the tests need not wait long; and long enough for a machine under load.
HEARTBEAT = {"BQ_WORKER_HEARTBEAT_PERIOD": 0.2, "BQ_WORKER_HEARTBEAT_TIMEOUT": 1.5}
#: For a worker that is to go on after it was frozen for longer than that.
ZOMBIE = HEARTBEAT | {"BQ_WATCHDOG": "false"}


class Process:
    """A command whose output is kept, in a process group of its own.

    :param arguments: what comes after ``python``.
    :param prefix: what comes before it.
    :param strict: whether a warning is an error.
    """

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        prefix: Iterable[str] = (),
        strict: bool = True,
    ) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, *(["-W", "error"] if strict else []), *arguments],
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, once it has ended."""
        return self._process.poll()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_line(self, text: str, timeout: float = 60, *, times: int = 1) -> str:
        """Wait for a line of output that holds a text, and return it.

        :param times: how many such lines there have to be.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                lines = [line for line in self._lines if text in line]
                if len(lines) >= times:
                    return lines[-1]
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"{text!r} did not come in:\n{self.output}")
                self._changed.wait(min(left, 0.5))

    def freeze(self) -> None:
        """Stop the process, and wait until it has stopped."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def send_all(self, number: int) -> None:
        """Send a signal to the whole process group, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """kill -9"""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end, and return the exit code."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"The process does not end:\n{self.output}") from None
        self._reader.join(10)
        return code

    def stop(self) -> int:
        """SIGTERM, and wait for the end."""
        self.send(signal.SIGTERM)
        return self.wait()

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # what it has started may outlive it
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Processes:
    """Starts workers and other commands, and sees to it that none outlives its test."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._started: list[Process] = []

    def python(self, *arguments: str, **env: Any) -> Process:
        """Run a program in Python; keyword arguments are environment variables."""
        process = Process(
            *arguments,
            env={"DATABASE_URL": self._database_url} | {key: str(env[key]) for key in env},
        )
        self._started.append(process)
        return process

    def flask(self, *arguments: str, **env: Any) -> Process:
        """Run a ``flask`` command; keyword arguments are environment variables."""
        return self.python("-m", "flask", *arguments, **env)

    def worker(self, app: str, *arguments: str, **env: Any) -> Process:
        """Start a worker and wait until all its processes are ready."""
        process = self.flask("--app", app, "bq", "worker", *arguments, **env)
        number = arguments.index("--processes") + 1 if "--processes" in arguments else None
        process.wait_line(READY, times=1 if number is None else int(arguments[number]))
        return process

    def close(self) -> None:
        for process in self._started:
            process.clean_up()


def done_by_the_next(
    lose: Callable[[], None],
    start: Callable[[], Process],
    probe: Probe,
    message: str,
    processor: Any,
    **arguments: Any,
) -> Process:
    """See a task done by a second worker when the first one is lost in the middle of it.

    :param lose: freezes the first worker, or kills it.
    :param start: starts the second one, which is returned.
    :param message: what the task tells where the first one is lost.
    """
    with probe.paused(message, processor, **arguments):
        lose()
    second = start()
    probe.wait(f"{processor.__name__} DONE")  # without waiting for the first
    return second
