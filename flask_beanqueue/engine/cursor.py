"""The cursor: where each part of the queue was claimed last, and when to look at it again."""

from __future__ import annotations

import dataclasses
import typing as t
import uuid

from sqlalchemy.engine import Connection

from .. import clock as time
from ..models.make import Models
from ..sql import Sql

if t.TYPE_CHECKING:
    from .claim import Claim

#: Before every id.
NIL = str(uuid.UUID(int=0))
#: Before every time, in microseconds since 1970; claims take all before -2**53 for one.
FRONT = -(2**53) - 1

#: A look from the front may take one twentieth of the time, and comes after a second at most.
LOOK_SHARE = 20
LOOK_WITHIN = 1.0
#: Until then, claims that may find nothing may take a quarter of the time, and come after so many
#: seconds at least.
CLAIM_SHARE = 4
CLAIM_AFTER = 0.005
#: Seconds between two looks of a worker that finds enough behind its cursor, at least.
LOOK_BUSY = 0.25
#: Looks that in a row find what is due and cannot be had.
IN_VAIN = 8
#: Seconds for which the cursor of a level stays behind tasks that the database refuses.
STAYS = 60.0
#: Levels that are kept in mind although nothing waits there.
MANY_LEVELS = 100

# The look from the front: the first waiting row of each channel and priority, by hopping through
# the index from one to the next (a loose index scan), and when the next task falls due. It wades
# through the dead entries that the claims left, so it is not for every turn.
LOOK = Sql("""
    SELECT front.channel, front.priority,
        CAST(LEAST(GREATEST(extract(epoch FROM front.scheduled_at) * 1000000,
            -9007199254740992), 9007199254740992) AS bigint) AS at,
        CAST(front.id AS text) AS id, front.scheduled_at <= now() AS is_due,
        CAST(LEAST(extract(epoch FROM next.scheduled_at) - extract(epoch FROM now()), 1000000)
            * 1000000 AS bigint) AS next_due
    FROM unnest(CAST(:channels AS text[])) AS wanted (channel)
    CROSS JOIN LATERAL (
        WITH RECURSIVE front AS (
            (SELECT channel, priority, scheduled_at, id FROM {tasks}
             WHERE state = 'PENDING' AND channel = wanted.channel
             ORDER BY priority, scheduled_at, id LIMIT 1)
            UNION ALL
            SELECT later.* FROM front CROSS JOIN LATERAL (
                SELECT channel, priority, scheduled_at, id FROM {tasks}
                WHERE state = 'PENDING' AND channel = wanted.channel
                  AND priority > front.priority
                ORDER BY priority, scheduled_at, id LIMIT 1
            ) AS later
        )
        SELECT * FROM front
    ) AS front
    LEFT JOIN LATERAL (
        SELECT scheduled_at FROM {tasks}
        WHERE state = 'PENDING' AND channel = front.channel AND priority = front.priority
          AND scheduled_at > now()
        ORDER BY scheduled_at LIMIT 1
    ) AS next ON true
""")

#: A place in a level: microseconds since 1970, and an id as text, which sorts as PostgreSQL sorts
#: UUIDs.
Place = tuple[int, str]


@dataclasses.dataclass(slots=True)
class Level:
    """One channel and priority, and the place in its queue where the last claim stopped."""

    channel: str
    priority: int
    at: int = FRONT
    id: str = NIL
    #: Where the cursor was before it went back to the front.
    passed: Place | None = None
    #: The last task that the database refused, and until when the cursor stays behind it.
    refused: Place | None = None
    stays_until: float = 0.0

    @property
    def place(self) -> Place:
        return self.at, self.id

    @place.setter
    def place(self, place: Place) -> None:
        self.at, self.id = place

    def go_back(self, front: Place) -> None:
        """Let the next claim start at a task that the cursor has passed."""
        self.passed = max(self.place, self.passed or self.place)
        self.place = (front[0] - 1, NIL)

    def step_over(self, refused: Place, now: float) -> bool:
        """Go on behind a task that the database refuses, and stay there for a while.

        :return: whether it is the first such task for a while.
        """
        first = now >= self.stays_until
        # As long as one comes right after the other. Later ones put nothing off: they may come for
        # ever, and what lies before them waits.
        if first or self.place == self.refused:
            self.stays_until = now + STAYS
        self.place = self.refused = refused
        return first

    def return_(self) -> bool:
        """Go on from where the cursor was before it went back, for nothing is left before that.

        :return: whether that is anywhere else.
        """
        passed, self.passed = self.passed, None
        if passed is None or passed <= self.place:
            return False
        self.place = passed
        return True


class Front(t.NamedTuple):
    """The first waiting task of a level."""

    channel: str
    priority: int
    at: int
    id: str
    is_due: bool


class Look(t.NamedTuple):
    """What a look from the front found."""

    fronts: list[Front]
    #: Seconds until the next task falls due that is not due yet.
    next_due: float | None


def look(connection: Connection, models: Models, channels: t.Sequence[str]) -> Look:
    """Look from the front of the channels' queues."""
    rows = connection.execute(LOOK.on(models), {"channels": list(channels)}).all()
    return Look(
        [Front(*row[:-1]) for row in rows],
        min((row.next_due / 1e6 for row in rows if row.next_due is not None), default=None),
    )


class Cursor:
    """One place for each channel and priority.

    Every claim leaves a dead entry at the front of the index, so claims start where the last one
    stopped. What turns up before that (a retry, a late commit) is found by a look from the front,
    which has to wade through the dead entries and is therefore rationed.
    """

    def __init__(self, channels: t.Iterable[str]) -> None:
        self._levels = {(channel, 0): Level(channel, 0) for channel in channels}
        self._turns = 0
        #: How many looks in a row have found what is due and cannot be had.
        self._fruitless = 0
        self.next_look = 0.0

    def turn(self) -> list[Level]:
        """List the levels by priority; of equal ones, each channel comes first in its turn."""
        levels = list(self._levels.values())
        start = self._turns % len(levels)
        return sorted(levels[start:] + levels[:start], key=lambda level: level.priority)

    def pass_by(self, claims: t.Sequence[Claim], wanted: int) -> bool:
        """Move on behind what has been claimed, in the queue's order.

        :return: whether there may be more at once, where a level has returned to.
        """
        self._turns += 1
        for claim in claims:
            level = self._levels.get((claim.channel, claim.priority))
            if level is not None:  # a trigger may have changed them
                level.place = claim.scheduled_at, claim.key
        if claims:
            self._fruitless = 0
        if len(claims) == wanted:
            return False
        returned = [level for level in self._levels.values() if level.return_()]
        return bool(returned)

    def step_over(self, level: Level, refused: Place) -> bool:
        """Move on behind a task that the database refuses; the next channel has its turn.

        :return: whether it is the first such task of its level for a while.
        """
        self._turns += 1
        return level.step_over(refused, time.monotonic())

    def look_soon(self) -> None:
        """Let the next look come as early as it is wanted."""
        self._fruitless = 0
        self.next_look = 0.0

    def may_look(self, *, busy: bool = False) -> bool:
        return time.monotonic() >= self.next_look + (LOOK_BUSY if busy else 0.0)

    def next_claim(self, took: float) -> float:
        """Return when to claim again after a claim that got less than was wanted: what falls due
        meanwhile lies behind the cursor, and needs no look.

        :param took: seconds that the claim took.
        """
        if self._fruitless:
            return self.next_look
        return min(self.next_look, time.monotonic() + max(CLAIM_SHARE * took, CLAIM_AFTER))

    @property
    def in_vain(self) -> bool:
        """Whether what is due has not been had for a while: others have it locked."""
        return self._fruitless >= IN_VAIN

    def take_in(self, look: Look, took: float) -> bool:
        """Take in what a look found, and tell whether anything is due.

        :param took: seconds that the look took.
        """
        # While something is due and yet not to be had, each look comes later than the one before.
        pause = max(LOOK_SHARE * took, 0.01 * 2 ** min(self._fruitless, 10))
        now = time.monotonic()
        self.next_look = now + min(pause, LOOK_WITHIN)
        if len(self._levels) > MANY_LEVELS:
            used = {(front.channel, front.priority) for front in look.fronts}
            kept = {key: level for key, level in self._levels.items() if key in used}
            self._levels = kept or self._levels
        due = False
        for front in look.fronts:
            key = front.channel, front.priority
            level = self._levels.setdefault(key, Level(*key))
            if front.is_due:
                due = True
                place = front.at, front.id
                if place <= level.place and now >= level.stays_until:
                    level.go_back(place)
        self._fruitless = self._fruitless + 1 if due else 0
        return due
