"""The take-over: what becomes of tasks that no living worker holds."""

from __future__ import annotations

import typing as t
import uuid

from sqlalchemy.engine import Connection

from ..models.make import Models
from ..sql import Sql, array
from . import outcome as outcomes
from .claim import COLUMNS, NO_ARGUMENTS, Claim
from .outcome import Outcome

#: Tasks that are taken over at once.
SIZE = 1000

# Every task that a worker should be doing and none is; a worker that is overdue has been declared
# dead by the heartbeat, and one that said goodbye may have had to leave something behind. Nothing
# is locked: of several workers that find a task, the fence lets one write what becomes of it. In
# the order of the ids, so that each is met once, also one that a trigger keeps as it is.
ORPHANS = Sql(
    """
    SELECT {claim}, EXISTS (
        SELECT FROM {workers} AS w WHERE w.id = t.worker_id AND w.state = 'SHUTDOWN')
    FROM {tasks} AS t
    WHERE state = 'PROCESSING' AND NOT parked
      AND CAST(t.id AS text) || '/' || t.claims <> ALL (CAST(:known AS text[]))
      AND NOT EXISTS (
        SELECT FROM {workers} AS w WHERE w.id = t.worker_id AND w.state = 'RUNNING')
      AND (CAST(:after AS uuid) IS NULL OR id > CAST(:after AS uuid))
    ORDER BY id LIMIT :limit
    """,
    claim=COLUMNS,
)

# What a worker holds as the database sees it: after a lost connection, a claim may have been
# committed whose answer never came.
MINE = Sql(
    """
    SELECT {claim} FROM {tasks}
    WHERE state = 'PROCESSING' AND NOT parked AND worker_id = :worker_id
    """,
    claim=COLUMNS,
)


class Orphans:
    """Finds tasks of dead workers, part by part.

    :param max_crashes: after how many crashes a task is FAILED.
    """

    def __init__(self, models: Models, max_crashes: int) -> None:
        self._models = models
        self._max_crashes = max_crashes
        #: The key of the task behind which the search goes on; None to begin with the first.
        self._after: str | None = None
        self._anew = False

    @property
    def is_through(self) -> bool:
        """Whether the last part was the last one."""
        return self._after is None and not self._anew

    def begin(self) -> None:
        """Begin with the first task again. For any thread."""
        self._anew = True

    def next_part(self, connection: Connection, known: t.Iterable[str]) -> list[Outcome]:
        """Return what becomes of the next tasks: they wait again, or fail if they were in too many
        crashes.

        :param known: tokens of claims to leave out.
        """
        if self._anew:
            self._anew, self._after = False, None
        wanted = {
            "after": self._after,
            "limit": SIZE,
            "known": array(known),
            "most": NO_ARGUMENTS,
        }
        found = []
        for *columns, left in connection.execute(ORPHANS.on(self._models), wanted):
            claim = Claim(*columns)
            if left:
                outcome = outcomes.given_back(claim)
            else:
                outcome = outcomes.crashed(claim, self._max_crashes)
            outcome.is_own = False
            found.append(outcome)
        self._after = found[-1].claim.key if len(found) == SIZE else None
        return found


def claims_of(connection: Connection, models: Models, worker_id: uuid.UUID) -> list[Claim]:
    """Return what a worker has claimed, as the database sees it."""
    wanted = {"worker_id": worker_id, "most": NO_ARGUMENTS}
    return [Claim(*row) for row in connection.execute(MINE.on(models), wanted)]
