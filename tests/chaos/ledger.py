"""The books: what the shop was told, what the database holds, and what that comes to."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

#: Share of the former rate that counts as recovered, and seconds for which it has to last.
RECOVERED, LASTING = 0.95, 6.0
#: The share that each single second has to have.
UNEVEN = 0.7


@dataclasses.dataclass
class Verdict:
    """What one scenario came to."""

    scenario: str
    system: str
    #: How many were seen.
    faults: int
    #: Sales that were committed.
    tasks: int
    #: Sales that were told to be committed and are gone, or have not been seen to.
    lost: int
    #: Shipments beyond one for each sale, and letters about what was never sold.
    doubled: int
    #: Tasks that are not done, whatever became of the sale.
    unfinished: int
    #: Letters beyond one for each sale, which are allowed.
    posted_again: int
    #: Sales that were refused, or whose fate was not told.
    refused: int
    #: Seconds from the last fault until the rate was back; None if it never was.
    recovery: float | None
    #: Sales seen to in a second: before the faults, and once the rate is back, or at last.
    before: float
    after: float
    #: What was promised besides, and is not so; also faults of which nothing was seen.
    broken: list[str]
    #: What else there is to say.
    remarks: list[str]

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 0.0


@contextlib.contextmanager
def cursor(dsn: str) -> Iterator[Any]:
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    try:
        yield connection.cursor()
    finally:
        connection.close()


class Ledger:
    """:param dsn: how to reach the database whatever is done to the workers' way there.
    :param folder: where letters are posted.
    """

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        #: Sales that the shop was told are committed.
        self.told: set[int] = set()
        #: Sales of which it was told that they may not be.
        self.refused: set[int] = set()

    @property
    def sold(self) -> set[int]:
        with cursor(self.dsn) as database:
            database.execute("SELECT number FROM sale")
            return {number for (number,) in database}

    @property
    def shipped(self) -> collections.Counter[int]:
        with cursor(self.dsn) as database:
            database.execute("SELECT number FROM shipment")
            return collections.Counter(number for (number,) in database)

    def letters(self) -> list[tuple[int, float]]:
        """The letters that were posted, each with the time in seconds since the epoch."""
        letters = self.folder / "letters"
        lines = letters.read_text().splitlines() if letters.exists() else []
        parts = [line.split() for line in lines]
        return [(int(part[0]), float(part[1])) for part in parts if len(part) == 2]

    @property
    def posted(self) -> collections.Counter[int]:
        return collections.Counter(number for number, _ in self.letters())

    def open_sales(self) -> int:
        """How many sales have not been seen to."""
        return len(self.sold - self.shipped.keys() - self.posted.keys())

    def waiting(self) -> int:
        """About as many; in no time."""
        with cursor(self.dsn) as database:
            database.execute("SELECT (SELECT count(*) FROM sale) - count(*) FROM shipment")
            [(count,)] = database
        return int(count) - sum(self.posted.values())

    def times(self) -> list[float]:
        """When sales were seen to, in seconds since the epoch."""
        with cursor(self.dsn) as database:
            database.execute("SELECT date_part('epoch', at) FROM shipment")
            shipped = [at for (at,) in database]
        return sorted([*shipped, *(at for _, at in self.letters())])

    def lost(self) -> int:
        return len(self.told - self.sold) + self.open_sales()

    def doubled(self) -> int:
        shipped, posted, sold = self.shipped, self.posted, self.sold
        return sum(count - (number in sold) for number, count in shipped.items()) + sum(
            count for number, count in posted.items() if number not in sold
        )


def rate(times: list[float], start: float, end: float) -> float:
    """Sales seen to in a second, between two points in time."""
    return (bisect.bisect(times, end) - bisect.bisect(times, start)) / (end - start)


def recovered(times: list[float], since: float, until: float, wanted: float) -> float | None:
    """The first time from which on the rate is back, and stays so for a while."""
    at = since
    while at + LASTING <= until:
        # Each second counts, or a pause would pass that a burst makes good.
        seconds = [rate(times, at + each, at + each + 1) for each in range(int(LASTING))]
        mean = sum(seconds) / len(seconds)
        if mean >= RECOVERED * wanted and min(seconds) >= UNEVEN * wanted:
            return at
        at += 0.1
    return None
