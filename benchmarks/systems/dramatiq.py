"""Dramatiq on Redis: threads in processes, each task acknowledged after it ran."""

from __future__ import annotations

import subprocess

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from .. import tally
from ..plain import add_row
from ..redis import RedisSystem, client, url, write_row
from ..system import System, run

broker = RedisBroker(url=url())
dramatiq.set_broker(broker)


@dramatiq.actor
def nothing(number: int) -> None:
    tally.tick()


@dramatiq.actor
def write(number: int) -> None:
    write_row(number)
    tally.tick()


@dramatiq.actor
def session(number: int) -> None:
    add_row(number)
    tally.tick()


@dramatiq.actor
def mark(number: int) -> None:
    tally.mark(number)


ACTORS = {"nothing": nothing, "write": write, "session": session, "mark": mark}


class Dramatiq(RedisSystem):
    """:param prefetch: how many tasks each process holds; 0 for what it does by default."""

    name = "Dramatiq"

    def __init__(self, settings: str, *, processes: int, threads: int, prefetch: int = 0) -> None:
        super().__init__(settings)
        self.processes = processes
        self.threads = threads
        self.prefetch = prefetch

    def fill(self, kind: str, number: int) -> None:
        for each in range(number):
            ACTORS[kind].send(each)

    def enqueue(self, kind: str, number: int) -> None:
        ACTORS[kind].send(number)

    def start(self) -> subprocess.Popen[bytes]:
        return run(
            "dramatiq",
            *("--processes", str(self.processes), "--threads", str(self.threads), __name__),
            dramatiq_queue_prefetch=str(self.prefetch),
        )

    def left(self) -> int:
        with client() as connection:
            return int(connection.hlen("dramatiq:default.msgs"))


SYSTEMS: list[System] = [
    Dramatiq("2 processes, 8 threads each", processes=2, threads=8),
    Dramatiq("2 processes, 4 threads each, prefetch 1000", processes=2, threads=4, prefetch=1000),
]
