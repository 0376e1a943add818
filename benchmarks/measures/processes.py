"""What a second process brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..sizes import Sizes
from ..step import Step
from ..system import System
from ..systems.ours import FlaskBeanQueue
from .throughput import throughput


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    for kind, number in (("nothing", sizes.nothing), ("wait", sizes.wait)):
        for processes in (1, 2):
            system = FlaskBeanQueue(f"processes {processes}", "--processes", str(processes))
            yield Step(
                "processes",
                kind,
                str(system),
                lambda system=system, kind=kind, number=number: throughput(
                    system, kind, number, 2 * sizes.box
                ),
                sizes.box + 1,
                rounds=2 if kind == "wait" else 1,
            )
