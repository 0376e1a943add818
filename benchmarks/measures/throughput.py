"""How many tasks a system does in a second."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import click

from ..system import System
from ..tally import tally

#: Seconds that a worker may take to start its first task.
START = 60.0


def throughput(system: System, kind: str, number: int, seconds: float) -> float:
    """Tasks a second, from the first one to the last, or to when the time is over."""
    system.clean()
    system.fill(kind, number)
    tally().clear()
    process = system.start()
    try:
        begun = time.monotonic()
        while (told := tally().sum()).count < number:
            now = time.monotonic()
            if told.count and now - told.first > seconds:
                break
            if process.poll() is not None or (not told.count and now - begun > START):
                raise click.ClickException(f"The worker of {system} does not work.")
            time.sleep(0.05)
    finally:
        stop(process)
    # What it had begun, it has ended: nothing else would be a fair count.
    left, began = system.left(), tally().sum().count
    if left is not None and left + began != number:
        click.echo(f"{system}: {number} tasks, {began} begun, {left} left", err=True)
    return told.rate


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a worker in good order, or after a while in any."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
