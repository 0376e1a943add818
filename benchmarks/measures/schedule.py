"""How late tasks run that are scheduled for a time."""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Iterator, Sequence

from .. import app as bench
from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System
from ..systems.ours import FlaskBeanQueue
from ..tally import tally
from ..worker import Worker
from .wakeup import arrival, spread, warm_up


def lateness(system: FlaskBeanQueue, number: int, within: float) -> Figures:
    """Seconds from when tasks are due to their first lines.

    :param within: seconds over which they are spread at random, beginning in half a second.
    """
    system.clean()
    tally().clear()
    with Worker(system.start()) as worker:
        warm_up(system, worker)
        offset = time.time() - time.monotonic()
        start = time.time() + 0.5
        due = {each: start + random.uniform(0, within) for each in range(1, number + 1)}
        with system.app.app_context():
            for each, moment in due.items():
                scheduled = datetime.datetime.fromtimestamp(moment, datetime.UTC)
                bench.mark.using(scheduled_at=scheduled).enqueue(number=each)
            bench.db.session.commit()
        return spread([arrival(worker, each) + offset - due[each] for each in due])


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    system = FlaskBeanQueue()
    yield Step(
        "schedule",
        "",
        str(system),
        lambda: lateness(system, sizes.due, sizes.due_within),
        sizes.due_within + 2,
        rounds=2,
    )
