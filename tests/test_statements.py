"""The statements by themselves: what they find, what they leave alone, and in which order."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import outcome, settle
from flask_beanqueue.engine.claim import Claim, claim_tasks
from flask_beanqueue.engine.connection import connect
from flask_beanqueue.engine.cursor import Level, look
from flask_beanqueue.engine.heartbeat import add_worker
from flask_beanqueue.engine.quarantine import Quarantine
from flask_beanqueue.engine.queue import INSERT
from flask_beanqueue.models.uuid7 import uuid7
from flask_beanqueue.sql import array

from .probe import Probe, query

TakeAll = Callable[[], list[Claim]]


@pytest.fixture
def connection(app: Flask, bq: BeanQueue) -> Iterator[Connection]:
    """A worker's connection, in autocommit."""
    with contextlib.closing(connect(bq.engine(app))) as connection:
        # The test itself would hold the lock that it waits for, where no timeout of pytest's gets.
        connection.exec_driver_sql("SET lock_timeout = '10s'")
        yield connection


@pytest.fixture
def worker_id(bq: BeanQueue, connection: Connection) -> uuid.UUID:
    worker_id = uuid7()
    add_worker(connection, bq.models, worker_id, "worker", ["default"])
    return worker_id


@pytest.fixture
def take_all(bq: BeanQueue, connection: Connection, worker_id: uuid.UUID) -> TakeAll:
    """Claims what is due."""

    def take_all() -> list[Claim]:
        return claim_tasks(connection, bq.models, worker_id, [Level("default", 0)], 100)

    return take_all


def make(url: str, **columns: Any) -> uuid.UUID:
    """Insert a task, as raw SQL does; its id."""
    columns = {"id": str(uuid7()), "module": "a", "func_name": "b"} | columns
    names, places = ", ".join(columns), ", ".join(["%s"] * len(columns))
    query(url, f"INSERT INTO bq_tasks ({names}) VALUES ({places})", *columns.values())
    return uuid.UUID(columns["id"])


def task(url: str, task_id: uuid.UUID) -> Any:
    [row] = query(url, "SELECT ctid::text, state, claims FROM bq_tasks WHERE id = %s", str(task_id))
    return row


def test_neither_claim_nor_finish_reads_the_whole_table(
    app: Flask, bq: BeanQueue, worker_id: uuid.UUID, database_url: str
) -> None:
    """The planner would, where a table has some ten thousand rows and a batch some hundreds."""
    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name) SELECT 'a', 'b' FROM generate_series(1, 20000)",
    )
    query(database_url, "ANALYZE bq_tasks")
    scans = "SELECT seq_scan FROM pg_stat_xact_user_tables WHERE relname = 'bq_tasks'"
    with bq.engine(app).begin() as connection:
        before = connection.exec_driver_sql(scans).scalar_one()  # PostgreSQL 15 counts all of them
        for result in (None, "1"):
            claims = claim_tasks(connection, bq.models, worker_id, [Level("default", 0)], 500)
            done = [(claim, result) for claim in claims]
            assert len(settle.finish(connection, bq.models, done)) == 500
        look(connection, bq.models, ["default"])
        assert connection.exec_driver_sql(scans).scalar_one() == before


# finish


def test_a_claim_from_quarantine_does_not_read_all_that_is_there_for_each_of_it(
    app: Flask, bq: BeanQueue, worker_id: uuid.UUID, database_url: str
) -> None:
    """The statistics know of none: a crash has just left them all."""
    number = 1_000
    insert = "INSERT INTO bq_tasks (module, func_name, crashes) SELECT 'a', 'b', %s"
    query(database_url, f"{insert} FROM generate_series(1, 20000)", 0)
    query(database_url, "ANALYZE bq_tasks")
    query(database_url, f"{insert} FROM generate_series(1, {number})", 1)
    fetched = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'bq_tasks'"
    with bq.engine(app).begin() as connection:
        before = connection.exec_driver_sql(fetched).scalar_one()
        quarantine = Quarantine(bq.models, worker_id, ["default"], 8_000)
        assert quarantine.any_waits(connection)
        assert quarantine.take(connection)
        assert connection.exec_driver_sql(fetched).scalar_one() - before < 10 * number


def test_one_task_at_a_time_is_claimed_from_quarantine_in_a_channel_whoever_asks(
    bq: BeanQueue, connection: Connection, worker_id: uuid.UUID, database_url: str
) -> None:
    """The next one would occupy another worker, and the rest of the queue would stand still."""
    other_id = uuid7()
    add_worker(connection, bq.models, other_id, "other", ["default", "letters"])
    first, second = (make(database_url, crashes=1) for _ in range(2))
    letter = make(database_url, crashes=1, channel="letters")
    channels = ["default", "letters"]

    def quarantine(worker_id: uuid.UUID, *channels: str) -> Quarantine:
        return Quarantine(bq.models, worker_id, channels, 8_000)

    def waits(*channels: str) -> bool:
        return quarantine(worker_id, *channels).any_waits(connection)

    assert waits("default")
    claim = quarantine(worker_id, "default").take(connection)
    assert claim is not None
    assert claim.id == first
    assert not waits("default")
    assert quarantine(other_id, "default").take(connection) is None

    # Channels are no business of each other's.
    assert waits(*channels)
    claimed = quarantine(other_id, *channels).take(connection)
    assert claimed is not None
    assert claimed.id == letter
    assert not waits(*channels)

    # One that waits for a webhook runs no longer.
    query(database_url, "UPDATE bq_tasks SET parked = true WHERE id = %s", str(first))
    assert waits("default")
    claimed = quarantine(other_id, *channels).take(connection)
    assert claimed is not None
    assert claimed.id == second


def test_finish_leaves_a_row_alone_that_lies_where_the_claimed_one_lay(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    """Both were claimed once, so that only the id tells them apart."""
    make(database_url)
    [deleted] = take_all()
    query(database_url, "DELETE FROM bq_tasks")
    query(database_url, "VACUUM bq_tasks")
    make(database_url)
    [claim] = take_all()
    assert (claim.ctid, claim.claims) == (deleted.ctid, deleted.claims)
    assert claim.id != deleted.id

    assert settle.finish(connection, bq.models, [(deleted, None)]) == set()
    assert task(database_url, claim.id) == (claim.ctid, "PROCESSING", 1)
    assert settle.finish(connection, bq.models, [(claim, None)]) == {(claim.key, claim.claims)}


def test_finish_leaves_a_task_alone_that_was_claimed_again(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    """Even if the first claim knew where the row lies now."""
    make(database_url)
    [first] = take_all()
    query(database_url, "UPDATE bq_tasks SET state = 'PENDING'")
    [second] = take_all()
    assert (first.claims, second.claims) == (1, 2)
    late = dataclasses.replace(first, ctid=second.ctid)

    assert settle.finish(connection, bq.models, [(late, None)]) == set()
    assert task(database_url, second.id) == (second.ctid, "PROCESSING", 2)
    assert settle.finish(connection, bq.models, [(second, None)]) == {(second.key, second.claims)}


def test_finish_leaves_a_task_alone_that_is_no_longer_processing(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    make(database_url)
    [claim] = take_all()
    query(database_url, "UPDATE bq_tasks SET state = 'CANCELLED'")
    ctid, *_ = task(database_url, claim.id)
    moved = dataclasses.replace(claim, ctid=ctid)

    assert settle.finish(connection, bq.models, [(moved, None)]) == set()
    assert task(database_url, claim.id) == (ctid, "CANCELLED", 1)


def test_a_row_that_has_moved_is_missed_by_finish_and_then_found_by_its_id(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    make(database_url)
    make(database_url)
    moved, stayed = take_all()
    query(database_url, "UPDATE bq_tasks SET priority = 5 WHERE id = %s", str(moved.id))
    assert task(database_url, moved.id)[0] != moved.ctid

    assert settle.finish(connection, bq.models, [(moved, None)]) == set()
    assert task(database_url, moved.id)[1] == "PROCESSING"

    outcomes = [outcome.succeeded(claim, 7, event=False) for claim in (moved, stayed)]
    assert all(each.is_plain for each in outcomes)
    assert settle.write(connection, bq.models, outcomes) == outcomes[1:]
    assert not outcomes[0].is_plain
    assert settle.write(connection, bq.models, outcomes[:1]) == outcomes[:1]
    found = query(database_url, "SELECT state, result, attempts, priority FROM bq_tasks ORDER BY 4")
    assert found == [("DONE", 7, 1, 0), ("DONE", 7, 1, 5)]
    assert query(database_url, "SELECT count(*) FROM bq_events") == [(0,)]


def test_finish_one_is_fenced_as_finish_is(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    """By where the row is, its id, the number of its claim, and its state."""
    for _ in range(2):
        make(database_url)
    claim, other = take_all()

    def wrong(**changes: Any) -> bool:
        return settle.finish_one(connection, bq.models, dataclasses.replace(claim, **changes), None)

    assert not wrong(ctid=other.ctid)
    assert not wrong(key=other.key)
    assert not wrong(claims=claim.claims + 1)
    assert task(database_url, claim.id) == (claim.ctid, "PROCESSING", 1)
    assert settle.finish_one(connection, bq.models, claim, "[1]")
    assert query(database_url, "SELECT state, result FROM bq_tasks ORDER BY id") == [
        ("DONE", [1]),
        ("PROCESSING", None),
    ]
    ctid, *_ = task(database_url, claim.id)
    assert not wrong(ctid=ctid)  # it has ended


def test_finish_ends_the_tasks_that_are_still_claimed_and_names_them(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str
) -> None:
    for _ in range(3):
        make(database_url)
    first, deleted, last = take_all()
    query(database_url, "DELETE FROM bq_tasks WHERE id = %s", str(deleted.id))

    done = [(first, "1"), (deleted, "2"), (last, None)]
    assert settle.finish(connection, bq.models, done) == {(first.key, 1), (last.key, 1)}
    found = query(database_url, "SELECT state, result FROM bq_tasks ORDER BY id")
    assert found == [("DONE", 1), ("DONE", None)]


@pytest.mark.parametrize("plain", [True, False])
def test_of_two_claims_of_one_task_the_one_that_holds_is_written_and_told_of(
    bq: BeanQueue, connection: Connection, take_all: TakeAll, database_url: str, plain: bool
) -> None:
    """A worker that was given up for dead may claim a task again that it has not let go of."""
    make(database_url)
    [first] = take_all()
    query(database_url, "UPDATE bq_tasks SET state = 'PENDING'")
    [second] = take_all()
    if plain:
        outcomes = [outcome.succeeded(claim, None, event=False) for claim in (first, second)]
    else:
        outcomes = [outcome.failed(first, ValueError()), outcome.given_back(second)]
    assert settle.write(connection, bq.models, outcomes) == outcomes[1:]
    assert task(database_url, second.id)[1] == ("DONE" if plain else "PENDING")


# claim

#: Before now, in order.
TIMES = ["2020-01-01 00:00+00", "2020-01-01 00:00:00.000001+00", "2020-01-02 00:00+00"]


def test_claims_come_in_the_order_of_priority_schedule_and_id(
    bq: BeanQueue, connection: Connection, worker_id: uuid.UUID, database_url: str
) -> None:
    ids = [uuid7() for _ in range(8)]
    wanted = [
        ("mails", -1, TIMES[2], ids[7]),
        ("images", 0, TIMES[0], ids[5]),
        ("mails", 0, TIMES[0], ids[6]),
        ("images", 0, TIMES[1], ids[1]),
        ("images", 0, TIMES[2], ids[2]),
        ("images", 0, TIMES[2], ids[3]),
        ("mails", 1, TIMES[0], ids[0]),
        ("images", 1, TIMES[1], ids[4]),
    ]
    for channel, priority, at, id in sorted(wanted, key=lambda row: row[3], reverse=True):
        make(database_url, id=str(id), channel=channel, priority=priority, scheduled_at=at)
    levels = [
        Level(channel, priority) for priority in (-1, 0, 1) for channel in ("images", "mails")
    ]

    claims = claim_tasks(connection, bq.models, worker_id, levels, 100)
    assert [claim.id for claim in claims] == [id for *_, id in wanted]


def test_a_claim_keeps_to_its_limit_over_all_channels(
    bq: BeanQueue, connection: Connection, worker_id: uuid.UUID, database_url: str
) -> None:
    """The first level has its turn before the next; in each, the earliest come first."""
    made: dict[str, list[uuid.UUID]] = {"images": [], "mails": []}
    for at in TIMES:
        for channel, ids in made.items():
            ids.append(make(database_url, channel=channel, scheduled_at=at))
    urgent = make(database_url, channel="mails", priority=-1, scheduled_at=TIMES[2])
    levels = [Level("images", -1), Level("mails", -1), Level("mails", 0), Level("images", 0)]

    def claim(limit: int) -> set[uuid.UUID]:
        return {each.id for each in claim_tasks(connection, bq.models, worker_id, levels, limit)}

    assert claim(3) == {urgent, *made["mails"][:2]}
    assert claim(2) == {made["mails"][2], made["images"][0]}
    assert claim(100) == set(made["images"][1:])
    assert claim(100) == set()


def test_a_claim_takes_what_lies_behind_the_cursor_and_is_due(
    bq: BeanQueue, connection: Connection, worker_id: uuid.UUID, database_url: str
) -> None:
    ids = sorted(uuid7() for _ in range(4))
    for id, at in zip(ids, [*TIMES, "9999-01-01 00:00+00"], strict=True):
        make(database_url, id=str(id), scheduled_at=at)
    level = Level("default", 0)
    [first] = claim_tasks(connection, bq.models, worker_id, [level], 1)
    assert first.id == ids[0]
    level.place = first.scheduled_at, first.key
    query(database_url, "UPDATE bq_tasks SET state = 'PENDING'")

    claims = claim_tasks(connection, bq.models, worker_id, [level], 100)
    assert [claim.id for claim in claims] == ids[1:3]


def test_a_claim_skips_rows_that_another_transaction_has_locked(
    app: Flask,
    bq: BeanQueue,
    take_all: TakeAll,
    database_url: str,
) -> None:
    ids = [make(database_url) for _ in range(3)]
    with bq.engine(app).begin() as other:
        other.execute(sa.select(bq.Task.id).where(bq.Task.id == ids[1]).with_for_update())
        assert [claim.id for claim in take_all()] == [ids[0], ids[2]]
    assert [claim.id for claim in take_all()] == [ids[1]]


def test_a_claim_takes_rows_that_an_open_transaction_refers_to(
    app: Flask,
    bq: BeanQueue,
    Note: Any,
    connection: Connection,
    take_all: TakeAll,
    database_url: str,
) -> None:
    """The foreign key locks only their keys, so their completion does not wait for it either."""
    task_id = make(database_url)
    with bq.engine(app).begin() as other:
        other.execute(sa.insert(Note).values(text="refers to it", task_id=task_id))
        locked = sa.select(bq.Task.id).with_for_update(skip_locked=True)
        assert connection.execute(locked).all() == []  # the lock is there
        [claim] = take_all()
        assert claim.id == task_id
        assert len(settle.finish(connection, bq.models, [(claim, None)], lock_timeout=0.1)) == 1


# insert


def test_many_tasks_are_inserted_and_notified_by_one_statement(
    bq: BeanQueue, connection: Connection, database_url: str
) -> None:
    """PostgreSQL folds equal notifications, so a function in pg_notify's place counts them."""
    connection.exec_driver_sql(
        """
        CREATE SCHEMA counting;
        CREATE TABLE counting.sent (number serial, channel text);
        CREATE FUNCTION counting.pg_notify(text, text) RETURNS void LANGUAGE sql
            AS 'INSERT INTO counting.sent (channel) VALUES ($1)';
        SET search_path = counting, public, pg_catalog;
        """
    )
    insert(bq, connection, "images", 100)
    insert(bq, connection, "mails", 1)
    insert(bq, connection, "images", 2)
    sent = query(database_url, "SELECT channel FROM counting.sent ORDER BY number")
    assert sent == [("images",), ("mails",), ("images",)]
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(103,)]


def test_many_tasks_of_one_transaction_notify_once_for_each_channel(
    app: Flask, bq: BeanQueue, database_url: str
) -> None:
    with contextlib.closing(Probe(database_url, "images", "mails")) as ears:
        with bq.engine(app).begin() as connection:
            for channel in ("images", "mails", "images"):
                insert(bq, connection, channel, 3)
        assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(9,)]
        # What follows comes last, so there is no more of the first.
        query(database_url, "SELECT pg_notify('images', 'end')")
        ears.wait("end")
        assert ears.heard == ["", ""]


def insert(bq: BeanQueue, connection: Connection, channel: str, number: int) -> None:
    connection.execute(
        INSERT.on(bq.models),
        {
            "ids": array(uuid7().hex for _ in range(number)),
            "kwargs": f"[{', '.join(['{}'] * number)}]",
            "channel": channel,
            "module": "a",
            "func_name": "b",
            "priority": 0,
            "scheduled_at": None,
            "delay": None,
            "parent_id": None,
            "notify": True,
            "notify_name": channel,
        },
    )
