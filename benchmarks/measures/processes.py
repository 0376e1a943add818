"""What a second process brings to tasks that wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from ..sizes import Sizes
from ..step import Step
from ..system import System
from ..systems.ours import FlaskBeanQueue
from .throughput import throughput


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    for processes in (1, 2):
        system = FlaskBeanQueue(f"processes {processes}", "--processes", str(processes))
        yield Step(
            "processes",
            "wait",
            str(system),
            partial(throughput, system, "wait", sizes.wait, 2 * sizes.box),
            sizes.box + 1,
            rounds=2,
        )
