"""RQ on Redis."""

from __future__ import annotations

import functools
import subprocess

from rq import Queue, SimpleWorker, Worker

from .. import tally
from ..plain import add_row
from ..redis import RedisSystem, client, url, write_row
from ..system import System, run


def nothing(number: int) -> None:
    tally.tick()


def write(number: int) -> None:
    write_row(number)
    tally.tick()


def session(number: int) -> None:
    add_row(number)
    tally.tick()


def mark(number: int) -> None:
    tally.mark(number)


TASKS = {"nothing": nothing, "write": write, "session": session, "mark": mark}


__all__ = ["SYSTEMS", "SimpleWorker", "Worker"]


class RQ(RedisSystem):
    """:param command: ``worker``, or ``worker-pool`` for several.
    :param arguments: Further arguments of its worker.
    """

    name = "RQ"

    def __init__(self, settings: str, command: str, *arguments: str) -> None:
        super().__init__(settings)
        self.command = command
        self.arguments = arguments

    @functools.cached_property
    def queue(self) -> Queue:
        return Queue("bench", connection=client())

    def fill(self, kind: str, number: int) -> None:
        for first in range(0, number, 1000):
            self.queue.enqueue_many(
                [
                    Queue.prepare_data(TASKS[kind], args=(each,))
                    for each in range(first, min(first + 1000, number))
                ]
            )

    def enqueue(self, kind: str, number: int) -> None:
        self.queue.enqueue_call(TASKS[kind], args=(number,))

    def start(self) -> subprocess.Popen[bytes]:
        return run("rq.cli", self.command, "--url", url(), *self.arguments, "bench")

    def left(self) -> int:
        return int(self.queue.count) + int(self.queue.started_job_registry.get_job_count())


#: The usual worker, which forks for each task. Named here, it has this module before it forks.
PRELOADED = ("--worker-class", f"{__name__}.Worker")
SIMPLE = ("--worker-class", f"{__name__}.SimpleWorker", "--quiet")

SYSTEMS: list[System] = [
    RQ("a process for each task", "worker", *PRELOADED),
    RQ("2 processes, no log", "worker-pool", "--num-workers", "2", *SIMPLE),
]
