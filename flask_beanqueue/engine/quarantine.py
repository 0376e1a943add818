"""The quarantine: a task that was in a crash runs alone in its worker."""

from __future__ import annotations

import typing as t
import uuid

from sqlalchemy.engine import Connection

from .. import clock as time
from ..log import log
from ..models.make import Models
from ..sql import Sql
from .claim import COLUMNS, Claim, claim_nothing
from .cursor import STAYS
from .database import is_refusal, reason

#: Seconds for which others like it follow it, as long as the worker is alone with them.
TURN = 0.25
#: Seconds that it waits at first until nothing else is held; nothing is claimed meanwhile.
PATIENCE = 0.5
#: Longest such wait.
MOST_PATIENCE = 60.0
#: How many times that long the worker then leaves such tasks alone.
REST = 10

# One worker at a time is so occupied in a channel, however many tasks a crash left, so that the
# rest goes on meanwhile. OFFSET keeps the free channels by themselves: asked anew for each of the
# thousand tasks that a crash may leave, they would be asked a thousand times a thousand rows.
CLAIM_QUARANTINED = Sql(
    """
    UPDATE {tasks} SET state = 'PROCESSING', worker_id = :worker_id,
        claims = claims + 1, parked = false, started_at = now()
    WHERE ctid = ANY (ARRAY(
        SELECT picked.ctid
        FROM (
            SELECT wanted.channel
            FROM unnest(CAST(:channels AS text[])) AS wanted (channel)
            WHERE NOT EXISTS (
                SELECT FROM {tasks} AS t
                WHERE t.state = 'PROCESSING' AND t.crashes > 0
                  AND t.channel = wanted.channel AND NOT t.parked)
            OFFSET 0
        ) AS free
        CROSS JOIN LATERAL (
            SELECT t.ctid FROM {tasks} AS t
            WHERE t.state = 'PENDING' AND t.crashes > 0
              AND t.channel = free.channel AND t.scheduled_at <= now()
            ORDER BY t.scheduled_at, t.id LIMIT 1
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS picked
        LIMIT 1))
    RETURNING {claim}
    """,
    claim=COLUMNS,
)

# Whether there is one to claim.
ANY_QUARANTINED = Sql("""
    SELECT EXISTS (
        SELECT FROM (
            SELECT wanted.channel
            FROM unnest(CAST(:channels AS text[])) AS wanted (channel)
            WHERE NOT EXISTS (
                SELECT FROM {tasks} AS t
                WHERE t.state = 'PROCESSING' AND t.crashes > 0
                  AND t.channel = wanted.channel AND NOT t.parked)
            OFFSET 0
        ) AS free
        WHERE EXISTS (
            SELECT FROM {tasks} AS t
            WHERE t.state = 'PENDING' AND t.crashes > 0
              AND t.channel = free.channel AND t.scheduled_at <= now()))
""")


class Quarantine:
    """The task in quarantine that a worker holds, if any.

    It must not take others along if it crashes again, so it begins when the worker holds nothing
    else; a few more may then follow. If that takes too long it is given back, and the next one is
    waited for longer.

    :param channels: whose tasks.
    :param largest: bytes of arguments that a claim brings, at most.
    """

    def __init__(
        self, models: Models, worker_id: uuid.UUID, channels: t.Sequence[str], largest: int
    ) -> None:
        self._models = models
        self._worker_id = worker_id
        self._channels = list(channels)
        self._largest = largest
        self.claim: Claim | None = None
        self._runs = False
        #: Until when it waits, if it does.
        self.until = float("inf")
        self._patience = PATIENCE
        self._next = 0.0
        self._turn_until = 0.0
        #: Until when such tasks are left alone, for the database refuses one of them.
        self._rests_until = 0.0

    def any_waits(self, connection: Connection) -> bool:
        """Whether there is a task to claim."""
        wanted = {"channels": self._channels}
        return bool(connection.scalar(ANY_QUARANTINED.on(self._models), wanted))

    def take(self, connection: Connection) -> Claim | None:
        """Claim one due task that was in a crash, unless another such task of its channel runs.

        :raises sqlalchemy.exc.DBAPIError: if no task can be claimed.
        """
        if time.monotonic() < self._rests_until:
            return None
        wanted = {
            "worker_id": self._worker_id,
            "channels": self._channels,
            "most": self._largest,
        }
        try:
            row = connection.execute(CLAIM_QUARANTINED.on(self._models), wanted).first()
        except Exception as error:
            if not is_refusal(error):
                raise
            claim_nothing(connection, self._models)
            self._rests_until = time.monotonic() + STAYS
            log.error(
                "A task that was in a crash cannot be claimed, and others like it wait with it for"
                " %.0f s: %s",
                STAYS,
                reason(error),
            )
            return None
        if row is not None:
            self.claim = Claim(*row)
            self.until = time.monotonic() + self._patience
            return self.claim
        return None

    @property
    def may_follow(self) -> bool:
        """Whether another one may be claimed at once."""
        return self.claim is None and time.monotonic() < self._turn_until

    @property
    def welcome(self) -> bool:
        """Whether one may be claimed by a worker that holds other tasks, too."""
        return self.claim is None and time.monotonic() >= self._next

    @property
    def waits(self) -> bool:
        """Whether it waits until it is alone."""
        return self.claim is not None and self.until < float("inf")

    def begin(self) -> Claim:
        """Let it begin, for it is alone."""
        assert self.claim is not None
        self._runs = True
        self.until = float("inf")
        if self._turn_until == 0.0:
            self._turn_until = time.monotonic() + TURN
        return self.claim

    def end_turn(self) -> None:
        self._turn_until = 0.0

    def give_way(self) -> Claim | None:
        """Return the claim, to be given back, if it has waited for too long."""
        if time.monotonic() < self.until:
            return None
        self._next = time.monotonic() + REST * self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)
        self.until = float("inf")
        return self.claim

    def release(self) -> None:
        """Hold it no longer: it has come to an end, or been given back."""
        if self._runs:
            self._patience = PATIENCE
        self.claim, self._runs, self.until = None, False, float("inf")
