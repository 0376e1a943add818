"""The benchmarks run and say what they measured; how much that is depends on the machine."""

from __future__ import annotations

import re

import pytest

from .processes import Processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(processes: Processes, name: str, *arguments: str) -> list[str]:
    """Run a benchmark to its end, and return the lines that it prints."""
    benchmark = processes.python("-m", f"benchmarks.{name}", *arguments)
    assert benchmark.wait(240) == 0, benchmark.output
    return benchmark.output.splitlines()


def one(lines: list[str], pattern: str) -> re.Match[str]:
    """The one line that is as it should be."""
    [found] = filter(None, (re.fullmatch(pattern, line.rstrip()) for line in lines))
    return found


THROUGHPUT = [
    "nothing: bare loop, batch 100",
    "nothing: bare loop, batch 500",
    *(f"nothing: worker, {threads} thread(s)" for threads in (1, 4)),
    *(
        f"one row: {system}, {threads} thread(s)"
        for threads in (1, 4, 8)
        for system in ("session loop", "worker")
    ),
]


def test_throughput_has_a_rate_for_each_system(processes: Processes) -> None:
    lines = run(processes, "throughput", "--rounds", "2", "--scale", "0.005")
    one(lines, r"PostgreSQL \d+.*, fsync \w+, synchronous_commit \w+")
    one(lines, "100 tasks that do nothing, 25 that write a row; 2 rounds")
    for system in THROUGHPUT:
        share = r" +\d+\.\d\d of its loop" if "worker" in system else ""
        one(lines, rf"{re.escape(system)} +[\d,]+/s{share}")
    assert sum("/s" in line for line in lines) == len(THROUGHPUT)


def test_wakeup_has_a_median_and_a_p99_for_both_listeners(processes: Processes) -> None:
    lines = run(processes, "wakeup", "--number", "3")
    for listener in ("bare listener", "worker"):
        figure = r" +\d+\.\d\d ms"
        one(lines, rf"{listener} +median{figure} +p99{figure} +\(3 commits, .*\)")


def test_idle_has_the_statements_the_time_and_the_memory(processes: Processes) -> None:
    """Also where there was no statement: heartbeats are seconds apart."""
    lines = run(processes, "idle", "--seconds", "0")
    line = r"idle for 0 s: \d+ statements, \d+ ms of processor time, memory \d+\.\d MB [+-]\d+ kB"
    one(lines, line)
