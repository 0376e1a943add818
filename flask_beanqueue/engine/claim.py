"""The claim: what a worker holds of a task, and the statement that takes it."""

from __future__ import annotations

import dataclasses
import typing as t
import uuid

from sqlalchemy.engine import Connection

from ..log import log
from ..models.make import Models
from ..sql import Sql
from .cursor import STAYS, Cursor, Level
from .database import is_refusal, reason

# A claim's columns, in the order of its fields. The arguments come as far as they take up to
# ``:most`` bytes. As text they may take a thousand times as many as they are stored in; but what is
# stored in more is not read for that. Times come as whole microseconds since 1970, as exact as
# PostgreSQL has them: the text of a floating-point number depends on settings. A double has whole
# numbers up to 2**53, or 285 years; what lies before or after becomes the first or the last number.
COLUMNS = """CAST(ctid AS text), CAST(id AS text), claims, channel, module, func_name,
    CASE WHEN pg_column_size(kwargs) <= :most AND octet_length(CAST(kwargs AS text)) <= :most
        THEN CAST(kwargs AS text) END,
    priority,
    CAST(LEAST(GREATEST(extract(epoch FROM scheduled_at) * 1000000,
        -9007199254740992), 9007199254740992) AS bigint),
    attempts, crashes, interruptions,
    CASE WHEN unknown_since IS NOT NULL THEN
        CAST(extract(epoch FROM now()) * 1000000 AS bigint)
        - CAST(LEAST(GREATEST(extract(epoch FROM unknown_since) * 1000000,
            -9007199254740992), 9007199254740992) AS bigint) END"""
#: What ``:most`` is if no arguments are wanted.
NO_ARGUMENTS = -1

# A claim is one statement in autocommit: one round trip, and no transaction that a frozen worker
# could hold open. The inner part walks the levels in turn and stops at the limit; LATERAL gives
# each level both ends of its range in the index, so that neither what was claimed earlier (dead
# entries before the cursor) nor what is scheduled for later is read. NO KEY: rows that an open
# transaction refers to by foreign key are not skipped. The rows are found again by ctid, which
# costs no index. Tasks that were in a crash are left to quarantine. A row that was touched between
# the two parts comes back as nothing, so zero rows do not prove an empty queue.
CLAIM = Sql(
    """
    UPDATE {tasks} SET state = 'PROCESSING', worker_id = :worker_id,
        claims = claims + 1, parked = false, started_at = now()
    WHERE ctid = ANY (ARRAY(
        SELECT picked.ctid
        FROM unnest(
            CAST(:channels AS text[]), CAST(:priorities AS int[]),
            CAST(:ats AS bigint[]), CAST(:ids AS uuid[])
        ) AS level (channel, priority, at, id)
        CROSS JOIN LATERAL (
            SELECT t.ctid FROM {tasks} AS t
            WHERE t.state = 'PENDING'
              AND t.channel = level.channel AND t.priority = level.priority
              AND (t.scheduled_at, t.id) > (
                CASE WHEN level.at < -9007199254740992 THEN '-infinity'
                    ELSE timestamptz 'epoch' + level.at * interval '1 microsecond' END, level.id)
              AND t.scheduled_at <= now() AND t.crashes < 1
            ORDER BY t.scheduled_at, t.id LIMIT :limit
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS picked
        LIMIT :limit))
    RETURNING {claim}
    """,
    claim=COLUMNS,
)

# What such a claim takes first of a level, to step over what cannot be claimed.
FIRST = Sql("""
    SELECT CAST(LEAST(GREATEST(extract(epoch FROM scheduled_at) * 1000000,
        -9007199254740992), 9007199254740992) AS bigint) AS at, CAST(id AS text) AS id
    FROM {tasks}
    WHERE state = 'PENDING' AND channel = :channel AND priority = :priority
      AND (scheduled_at, id) > (
        CASE WHEN CAST(:at AS bigint) < -9007199254740992 THEN '-infinity'
            ELSE timestamptz 'epoch' + CAST(:at AS bigint) * interval '1 microsecond' END,
        CAST(:id AS uuid))
      AND scheduled_at <= now() AND crashes < 1
    ORDER BY scheduled_at, id LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED
""")


@dataclasses.dataclass(slots=True, eq=False)
class Claim:
    """One claim of one task: the row's columns as the claim returned them."""

    #: Where the row lies. It moves when the row is written, so it is a hint and never a proof.
    ctid: str
    #: The row's id as text: in and out of a UUID it would take longer than the whole rest.
    key: str
    #: How often the row has been claimed, this time included: the fence.
    claims: int
    channel: str
    module: str
    func_name: str
    #: The arguments as JSON. The thread that runs the task decodes them: raw SQL may have written
    #: what Python cannot read. None if they are too large for the claim to bring them.
    arguments: str | None
    priority: int
    #: Microseconds since 1970; together with the id, the place in the queue.
    scheduled_at: int
    attempts: int
    crashes: int
    interruptions: int
    #: Microseconds for which workers have met this task without knowing its processor.
    unknown_for: int | None
    #: What became of the task is committed: there is nothing left to write.
    settled: bool = False

    @property
    def id(self) -> uuid.UUID:
        return uuid.UUID(self.key)

    @property
    def token(self) -> str:
        """Identify this claim, also among those of the same task."""
        return f"{self.key}/{self.claims}"

    @property
    def name(self) -> str:
        """Return the processor's name for people: a row may hold what would look like a line of the
        log."""
        name = f"{self.module}.{self.func_name}"
        return name if name.isprintable() else repr(name)

    @property
    def label(self) -> str:
        """Return what log messages call the task."""
        return f"{self.name} {self.key}"

    def log_extra(self) -> dict[str, str]:
        return {"task_id": self.key, "task_name": self.name, "task_channel": self.channel}


class Claimer:
    """Claims tasks; one that the database does not let be claimed holds up no other.

    :param cursor: where to start.
    :param batch_size: how many tasks are claimed at once, at most.
    :param largest: bytes of arguments that a claim brings, at most.
    """

    def __init__(
        self, models: Models, worker_id: uuid.UUID, cursor: Cursor, batch_size: int, largest: int
    ) -> None:
        self._models = models
        self._worker_id = worker_id
        self._cursor = cursor
        self._batch_size = batch_size
        self._largest = largest
        #: How many tasks to claim at once: half as many after a claim that failed, for whatever
        #: reason, and twice as many after one that did not.
        self._most = batch_size

    def at_once(self, wanted: int) -> int:
        """Return how many of so many tasks to claim with one statement."""
        return min(wanted, self._most)

    def claim(self, connection: Connection, limit: int) -> list[Claim] | None:
        """Claim up to ``limit`` tasks; None if the database refuses to let one of them be claimed.
        The next calls then find out which one it is, and step over it.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        levels = self._cursor.turn()
        try:
            claims = claim_tasks(
                connection, self._models, self._worker_id, levels, limit, self._largest
            )
        except Exception as error:  # perhaps since the answer takes more memory than there is
            self._most = max(limit // 2, 1)
            if not is_refusal(error):
                raise  # no later: the frames of an exception that is handed on hold the answer
            claim_nothing(connection, self._models)
            if limit == 1:
                self._step_over(connection, levels, error)
            return None
        if claims:
            self._most = min(2 * self._most, self._batch_size)
        return claims

    def _step_over(
        self, connection: Connection, levels: t.Iterable[Level], error: Exception
    ) -> None:
        for level in levels:
            wanted = {
                "channel": level.channel,
                "priority": level.priority,
                "at": level.at,
                "id": level.id,
            }
            if (first := connection.execute(FIRST.on(self._models), wanted).first()) is not None:
                if self._cursor.step_over(level, (first.at, first.id)):
                    log.error(
                        "Task %s cannot be claimed, and is tried again in %.0f s, with all that"
                        " comes before it in its channel and priority: %s",
                        first.id,
                        STAYS,
                        reason(error),
                    )
                return


def claim_tasks(
    connection: Connection,
    models: Models,
    worker_id: uuid.UUID,
    levels: t.Sequence[Level],
    limit: int,
    most: int = 8_000,
) -> list[Claim]:
    """Claim up to ``limit`` due tasks behind the cursor's levels, in the queue's order.

    :param most: bytes of the arguments that a claim may bring; larger ones it is without.
    """
    wanted = {
        "worker_id": worker_id,
        "channels": [level.channel for level in levels],
        "priorities": [level.priority for level in levels],
        "ats": [level.at for level in levels],
        "ids": [level.id for level in levels],
        "limit": limit,
        "most": most,
    }
    rows = connection.execute(CLAIM.on(models), wanted).all()  # with which the answer is let go of
    claims = [Claim(*row) for row in rows]
    claims.sort(key=lambda claim: (claim.priority, claim.scheduled_at, claim.key))
    return claims


def claim_nothing(connection: Connection, models: Models) -> None:
    """See whether tasks can be claimed, whichever they are; claim none.

    :raises sqlalchemy.exc.DBAPIError: if not.
    """
    claim_tasks(connection, models, uuid.UUID(int=0), [], 0)
