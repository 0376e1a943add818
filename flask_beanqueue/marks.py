"""The marks: where each part of the queue was claimed last, and when to look at it again."""

from __future__ import annotations

import dataclasses
import typing as t
import uuid

from . import clock as time
from .claim import Claim

#: Before every id, for a look from the front.
NIL = str(uuid.UUID(int=0))
#: Microseconds since 1970 that stand for all times before, and for all after: 285 years. A double
#: has whole numbers up to there, with which PostgreSQL multiplies an interval.
EARLIEST, LATEST = -(2**53), 2**53
FRONT = EARLIEST - 1

#: A look from the front may take one twentieth of the time, and comes after a second at most.
LOOK_SHARE = 20
LOOK_WITHIN = 1.0
#: Until then, claims that may find nothing may take a quarter of the time, and come after so many
#: seconds at least.
CLAIM_SHARE = 4
CLAIM_AFTER = 0.005
#: Seconds between two looks of a worker that finds enough behind its marks, at least.
LOOK_BUSY = 0.25
#: Looks that in a row find what is due and cannot be had.
IN_VAIN = 8
#: Seconds for which a mark stays behind tasks that the database refuses.
STAYS = 60.0
#: Levels that are kept in mind although nothing waits there.
MANY_LEVELS = 100


@dataclasses.dataclass(slots=True)
class Level:
    """One channel and priority, and the place in its queue where the last claim stopped."""

    channel: str
    priority: int
    #: In microseconds since 1970.
    at: int = FRONT
    #: As text, which sorts as PostgreSQL sorts UUIDs.
    id: str = NIL
    #: Where the mark was before it went back to the front.
    passed: tuple[int, str] | None = None
    #: The last task that the database refused, and until when the mark stays behind it.
    refused: tuple[int, str] | None = None
    stays_until: float = 0.0

    @property
    def mark(self) -> tuple[int, str]:
        return self.at, self.id

    @mark.setter
    def mark(self, mark: tuple[int, str]) -> None:
        self.at, self.id = mark

    def go_back(self, front: Front) -> None:
        """Let the next claim start at a task that the mark has passed."""
        self.passed = max(self.mark, self.passed or self.mark)
        self.mark = (front.at - 1, NIL)

    def step_over(self, front: Front, now: float) -> bool:
        """Go on behind a task that the database refuses, and stay there for a while.

        :return: whether it is the first such task for a while.
        """
        first = now >= self.stays_until
        # As long as one comes right after the other. Later ones put nothing off: they may come for
        # ever, and what lies before them waits.
        if first or self.mark == self.refused:
            self.stays_until = now + STAYS
        self.mark = self.refused = front.at, front.id
        return first

    def return_(self) -> bool:
        """There is nothing left before the old mark: go on from there, and tell whether that is
        anywhere else."""
        passed, self.passed = self.passed, None
        if passed is None or passed <= self.mark:
            return False
        self.mark = passed
        return True


@dataclasses.dataclass(slots=True)
class Front:
    """The first waiting task of a level."""

    channel: str
    priority: int
    at: int
    id: str
    #: Seconds until it is due; not above 0 if it is.
    due_in: float


class Look(t.NamedTuple):
    """What a look from the front found."""

    fronts: list[Front]
    #: Seconds until the next task falls due that is not due yet.
    next_due: float | None
    #: Whether a task is due that must run alone.
    suspects: bool


class Marks:
    """One mark for each channel and priority.

    Every claim leaves a dead entry at the front of the index, so claims start where the last one
    stopped. What turns up before a mark (a retry, a late commit) is found by a look from the
    front, which has to wade through the dead entries and is therefore rationed.
    """

    def __init__(self, channels: t.Iterable[str]) -> None:
        self._levels = {(channel, 0): Level(channel, 0) for channel in channels}
        self._turns = 0
        self._fruitless = 0
        self.next_look = 0.0

    def turn(self) -> list[Level]:
        """The levels by priority; of equal ones, each channel comes first in its turn, which lasts
        until there is nothing to find out about it."""
        levels = list(self._levels.values())
        start = self._turns % len(levels)
        return sorted(levels[start:] + levels[:start], key=lambda level: level.priority)

    def passed(self, claims: t.Sequence[Claim], wanted: int) -> bool:
        """Move the marks behind what has been claimed, in the queue's order.

        :return: whether there may be more at once, where a mark has returned to.
        """
        self._turns += 1
        for claim in claims:
            level = self._levels.get((claim.channel, claim.priority))
            if level is not None:  # or a trigger has changed them
                level.mark = claim.scheduled_at, claim.key
        if claims:
            self._fruitless = 0
        if len(claims) == wanted:
            return False
        returned = [level for level in self._levels.values() if level.return_()]
        return bool(returned)

    def step_over(self, front: Front) -> bool:
        """Move a mark behind a task that the database refuses; the next channel has its turn.

        :return: whether it is the first such task of its level for a while.
        """
        self._turns += 1
        return self._levels[front.channel, front.priority].step_over(front, time.monotonic())

    def look_soon(self) -> None:
        """Let the next look come as early as it is wanted."""
        self._fruitless = 0
        self.next_look = 0.0

    def may_look(self, *, busy: bool = False) -> bool:
        return time.monotonic() >= self.next_look + (LOOK_BUSY if busy else 0.0)

    def next_claim(self, took: float) -> float:
        """When to claim again after a claim that got less than was wanted: what falls due
        meanwhile lies behind the mark, and needs no look.

        :param took: seconds that the claim took.
        """
        if self._fruitless:
            return self.next_look
        return min(self.next_look, time.monotonic() + max(CLAIM_SHARE * took, CLAIM_AFTER))

    @property
    def in_vain(self) -> bool:
        """Whether what is due has not been had for a while: others have it locked."""
        return self._fruitless >= IN_VAIN

    def seen(self, look: Look, took: float) -> bool:
        """Take in what a look found, and tell whether anything is due.

        :param took: seconds that the look took.
        """
        # Where something is due and yet not to be had, each look comes later than the one before.
        pause = max(LOOK_SHARE * took, 0.01 * 2 ** min(self._fruitless, 10))
        now = time.monotonic()
        self.next_look = now + min(pause, LOOK_WITHIN)
        if len(self._levels) > MANY_LEVELS:
            used = {(front.channel, front.priority) for front in look.fronts}
            kept = {key: level for key, level in self._levels.items() if key in used}
            self._levels = kept or self._levels
        due = False
        for front in look.fronts:
            level = self._levels.setdefault(
                (front.channel, front.priority), Level(front.channel, front.priority)
            )
            if front.due_in <= 0:
                due = True
                if (front.at, front.id) <= level.mark and now >= level.stays_until:
                    level.go_back(front)
        self._fruitless = self._fruitless + 1 if due else 0
        return due
