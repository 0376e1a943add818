"""What tasks tell of themselves: how many have begun, since when, and when each one was.

A file that all processes map into memory, so that telling costs a task less than a microsecond and
disturbs no system, whatever it stores its tasks in. The clock is one that all processes of a
machine share.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from typing import NamedTuple

#: Threads that can tell, in all processes together; some systems fork for each task.
SLOTS = 1 << 16
#: Tasks that can tell when they were.
TIMES = 1 << 20

# The file is an array of words, which are written whole, so that nobody reads half of one.
_WORD = 8
# A slot has three: how many, when the first was, when the last.
_SLOT = 3
_TIMES_AT = _SLOT * SLOTS
_SIZE = _WORD * (_TIMES_AT + TIMES)


class Sum(NamedTuple):
    """What all tasks have told."""

    done: int
    first: float
    last: float

    @property
    def rate(self) -> float:
        """Tasks a second, from the first one to the last, or to the end of the time."""
        return (self.done - 1) / (self.last - self.first) if self.done > 1 else 0.0


class Tally:
    """The file, in a process that reads it or in one that runs tasks."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        if os.fstat(self._file).st_size < _SIZE:
            os.ftruncate(self._file, _SIZE)
        words = memoryview(mmap.mmap(self._file, _SIZE))
        self._counts, self._times = words.cast("q"), words.cast("d")
        self._own = threading.local()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._own = threading.local()

    def clear(self) -> None:
        """Begin anew. Only while no tasks run: they keep their places."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, _SIZE)

    def tick(self, count: int = 1) -> None:
        """A task runs, or so many have run; with 0, the clock starts before the first one."""
        now = time.monotonic()
        own = self._own.__dict__
        if not own:
            own.update(at=self._place(), count=0)
            self._times[own["at"] + 1] = now
        own["count"] += count
        self._times[own["at"] + 2] = now
        self._counts[own["at"]] = own["count"]

    def mark(self, number: int) -> None:
        """The task of this number runs."""
        self._times[_TIMES_AT + number] = time.monotonic()

    def sum(self) -> Sum:
        """Add up what the tasks have told."""
        slots = range(_SLOT, _SLOT * (self._used + 1), _SLOT)
        told = [(self._counts[at], self._times[at + 1], self._times[at + 2]) for at in slots]
        told = [each for each in told if each[0]]
        if not told:
            return Sum(0, 0.0, 0.0)
        counts, firsts, lasts = zip(*told, strict=True)
        return Sum(sum(counts), min(firsts), max(lasts))

    def time_of(self, number: int) -> float | None:
        """When the task of this number ran, on the monotonic clock."""
        return self._times[_TIMES_AT + number] or None

    @property
    def _used(self) -> int:
        return self._counts[0]

    def _place(self) -> int:
        """A place of one's own; the first one counts them."""
        # A thread's own opening of the file: locks of the same opening do not exclude each other.
        with open(self._path, "r+b") as own:
            fcntl.flock(own, fcntl.LOCK_EX)
            used = self._used + 1
            if used >= SLOTS:
                raise RuntimeError("Too many threads tell.")
            self._counts[0] = used
        return _SLOT * used


_tally: Tally | None = None


def tally() -> Tally:
    """The tally of this run, which the environment names."""
    global _tally
    if _tally is None:
        _tally = Tally(os.environ["BENCH_TALLY"])
    return _tally


def tick(count: int = 1) -> None:
    """A task runs, or so many have run."""
    tally().tick(count)


def mark(number: int) -> None:
    """The task of this number runs."""
    tally().mark(number)
