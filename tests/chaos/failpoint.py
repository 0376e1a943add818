"""Points at which a worker kills itself, at the worst moment there is."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import sqlalchemy as sa

CLAIM = "UPDATE ONLY bq_tasks SET state = 'PROCESSING'"
FINISH = "UPDATE ONLY bq_tasks SET state = 'DONE'"

#: By name: the event of the engine, what the statement begins with, and how likely it is.
POINTS = {
    "claim sent": ("before_cursor_execute", CLAIM, 0.05),
    "claim answered": ("after_cursor_execute", CLAIM, 0.05),
    "flush sent": ("before_cursor_execute", "WITH patience", 0.03),
    "flush answered": ("after_cursor_execute", "WITH patience", 0.03),
    "task": ("before_cursor_execute", "INSERT INTO shipment", 0.003),
    "completion": ("after_cursor_execute", FINISH, 0.003),
    "commit": ("commit", "", 0.003),
}


def install(engine: sa.Engine, point: str) -> None:
    """Let the process kill itself when it comes to a point, now and then.

    :param point: which; ``each`` for all in turn, one for each process.
    """
    folder = Path(os.environ["CHAOS_FOLDER"])
    if point == "each":
        point = next_point(folder)
    event, beginning, likelihood = POINTS[point]

    def kill(*args: Any) -> None:
        said = " ".join(args[2].split()) if beginning else ""
        due = said.startswith(beginning) and random.random() < likelihood
        if due and not (folder / "calm").exists():
            print(f"Killed at: {point}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    sa.event.listen(engine, event, kill)


def next_point(folder: Path) -> str:
    """The point whose turn it is, whichever processes ask.

    :param folder: where it is noted how many have asked.
    """
    with (folder / "turns").open("ab", buffering=0) as turns:
        turns.write(b".")  # at the end, and nobody else there
        turn = turns.tell() - 1
    return list(POINTS)[turn % len(POINTS)]
