"""Points at which a worker kills itself, at the worst moment there is."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import sqlalchemy as sa

#: By name: the event of the engine, what the statement begins with, and how likely it is.
POINTS = {
    "claim sent": ("before_cursor_execute", "UPDATE bq_tasks SET state = 'PROCESSING'", 0.05),
    "claim answered": ("after_cursor_execute", "UPDATE bq_tasks SET state = 'PROCESSING'", 0.05),
    "flush sent": ("before_cursor_execute", "WITH patience", 0.03),
    "flush answered": ("after_cursor_execute", "WITH patience", 0.03),
    "task": ("before_cursor_execute", "INSERT INTO shipment", 0.003),
    "completion": ("after_cursor_execute", "UPDATE bq_tasks SET state = 'DONE'", 0.003),
    "commit": ("commit", "", 0.003),
}


def install(engine: sa.Engine, point: str) -> None:
    """Let the process kill itself when it comes to a point, now and then.

    :param point: which; ``each`` for all in turn, one for each process.
    """
    if point == "each":
        point = random.choice(list(POINTS))
    event, beginning, likelihood = POINTS[point]

    def kill(*args: Any) -> None:
        said = " ".join(args[2].split()) if beginning else ""
        due = said.startswith(beginning) and random.random() < likelihood
        if due and not Path(os.environ["CHAOS_FOLDER"], "calm").exists():
            print(f"Killed at: {point}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    sa.event.listen(engine, event, kill)
