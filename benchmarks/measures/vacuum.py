"""How fast a worker stays while another transaction keeps vacuum from removing dead rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import psycopg2

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, dsn, execute
from ..systems.bare import Bare, BareLoop, FrontLoop
from ..systems.ours import FlaskBeanQueue
from ..tally import Sum, tally
from ..worker import Worker
from .wakeup import timed, warm_up

#: Seconds between two points of the curve.
POINT = 0.5
#: Shares of the tasks over which the rates at the beginning and at the end are taken.
BEGINNING, END = (0.05, 0.3), (0.75, 1.0)


@contextlib.contextmanager
def held_snapshot() -> Iterator[None]:
    """A transaction with a snapshot that stays open, as that of a long report does."""
    connection = psycopg2.connect(dsn())
    try:
        connection.set_session(isolation_level="REPEATABLE READ")
        connection.cursor().execute("SELECT count(*) FROM pg_class")
        yield
    finally:
        connection.close()


def held(system: System, number: int, seconds: float, commits: int, box: float) -> Figures:
    """Tasks a second over time, and wake-ups before and after, while a snapshot is held; from the
    commit where the system tells when that began.

    :param number: tasks, each of which leaves about two dead rows.
    :param commits: tasks whose wake-up is measured.
    :param box: seconds for all wake-ups.
    """
    system.clean()
    tally().clear()
    figures: Figures = {}
    bare = isinstance(system, Bare)
    if not bare:
        with Worker(system.start()) as worker:
            warm_up(system, worker)
            numbers = range(1, commits + 1)
            figures["wakeup_before"] = median(timed(system, worker, numbers, None, box))
    with held_snapshot():
        system.fill("nothing", number)
        tally().clear()
        points: list[tuple[float, int]] = []

        def glance(told: Sum) -> None:
            if told.done and (not points or told.last >= told.first + points[-1][0] + POINT):
                points.append((told.last - told.first, told.done))

        with Worker(system.start()) as worker:
            told = worker.work(number, seconds, glance)
            points.append((told.last - told.first, told.done))
            figures |= {
                "rate": told.rate,
                "points": points,
                "beginning": rate_within(points, *BEGINNING, told.rate),
                "end": rate_within(points, *END, told.rate),
                "done": told.done,
            }
            if told.done >= number and not bare:
                numbers = range(commits + 1, 2 * commits + 1)
                figures["wakeup_after"] = median(timed(system, worker, numbers, None, box))
        [(dead,)] = execute("SELECT sum(n_dead_tup) FROM pg_stat_user_tables")
        figures["dead"] = int(str(dead))
    return figures


def median(wakeups: Figures) -> float:
    return float(wakeups["commit_p50"] if "commit_p50" in wakeups else wakeups["p50"])


def rate_within(points: Sequence[tuple[float, int]], low: float, high: float, rate: float) -> float:
    """Tasks a second between two shares of what was done, by the curve; over the whole time if
    there are too few points."""
    most = points[-1][1]
    inside = [point for point in points if low * most <= point[1] <= high * most]
    if len(inside) < 2:
        return rate
    (begun, before), (ended, after) = inside[0], inside[-1]
    return (after - before) / (ended - begun) if ended > begun else rate


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    def step(system: System, number: int, box: float, seconds: float, rounds: int = 1) -> Step:
        return Step(
            "vacuum",
            "",
            str(system),
            lambda: held(system, number, box, sizes.commits // 2, sizes.box),
            seconds,
            rounds=rounds,
        )

    for system in (FlaskBeanQueue(), BareLoop(500), FrontLoop(500)):
        rounds, more = (1, 2) if isinstance(system, Bare) else (2, 7)
        seconds = min(sizes.held_box, sizes.held / 20_000) + more
        yield step(system, sizes.held, sizes.held_box, seconds, rounds)
    for peer in peers:
        if peer.store == "PostgreSQL":
            yield step(peer, sizes.peers_held, sizes.peers_held_box, sizes.peers_held_box + 8)
