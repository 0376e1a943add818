"""The claimer by itself, where the database does not let all tasks be claimed."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from flask_beanqueue import BeanQueue, claimer, marks
from flask_beanqueue.claimer import Claimer
from flask_beanqueue.connection import connect
from flask_beanqueue.marks import Marks
from flask_beanqueue.models import uuid7

from .probe import connect as connect_by_itself
from .probe import query
from .triggers import trigger


class Claiming:
    """A worker of which there is nothing but its claimer, and the tasks 0 to 9."""

    def __init__(self, bq: BeanQueue, connection: Connection, url: str) -> None:
        self.connection = connection
        channels = ["default", "other"]
        self.marks = Marks(channels)
        self.claimer = Claimer(bq, channels, self.marks, 100, 1000, ())
        self.worker_id = uuid7()
        bq.queries.add_worker(connection, self.worker_id, "worker", channels)
        query(
            url,
            "INSERT INTO bq_tasks (module, func_name, scheduled_at)"
            " SELECT 'a', n, now() - (11 - n) * interval '1 hour' FROM generate_series(0, 9) AS n",
        )

    def look(self) -> bool:
        return self.marks.seen(self.claimer.look(self.connection), 0.0)

    def claim(self, most: int = 100) -> tuple[list[str], int]:
        """What is claimed until there is no more, and with how many calls."""
        found, calls, last = [], 0, None
        while last != []:
            calls += 1
            last = self.claim_once(most)
            found += last or []
        return found, calls

    def claim_once(self, most: int = 100) -> list[str] | None:
        wanted = self.claimer.at_once(most)
        claims = self.claimer.claim(self.connection, self.worker_id, wanted)
        if claims is None:
            return None
        self.marks.passed(claims, wanted)
        return [claim.func_name for claim in claims]


@pytest.fixture
def claiming(app: Flask, bq: BeanQueue, database_url: str) -> Iterator[Claiming]:
    with contextlib.closing(connect(bq.engine(app))) as connection:
        yield Claiming(bq, connection, database_url)


def refusal(*names: str, body: str = "RAISE EXCEPTION 'no'") -> str:
    """SQL that makes a trigger which lets tasks not be claimed."""
    quoted = ", ".join(f"'{name}'" for name in names)
    on = "BEFORE UPDATE ON bq_tasks"
    return trigger("refuse", on, body, condition=f"NEW.func_name IN ({quoted})")


@pytest.fixture
def refuse(database_url: str) -> None:
    """A trigger lets task 5 not be claimed."""
    query(database_url, refusal("5"))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = types.SimpleNamespace(at=0.0)
    clock = types.SimpleNamespace(monotonic=lambda: now.at)
    monkeypatch.setattr(claimer, "time", clock)
    monkeypatch.setattr(marks, "time", clock)
    return now


def test_a_task_that_cannot_be_claimed_is_left_out_for_a_while(
    claiming: Claiming, refuse: None, now: Any, database_url: str
) -> None:
    assert claiming.claim()[0] == [str(n) for n in range(10) if n != 5]
    query(database_url, "DROP TRIGGER refuse ON bq_tasks")
    assert not claiming.look()
    assert claiming.claim() == ([], 1)
    now.at = claimer.REFUSED_FOR
    assert claiming.look()
    assert claiming.claim()[0] == ["5"]


def test_what_is_left_out_makes_nothing_slower(
    claiming: Claiming, refuse: None, now: Any, database_url: str
) -> None:
    """Many are claimed at once again, though the claims start at the front."""
    claiming.claim()
    for _ in range(3):
        query(database_url, "UPDATE bq_tasks SET state = 'PENDING' WHERE func_name <> '5'")
        assert claiming.look()
        found, calls = claiming.claim()
        assert len(found) == 9
    assert calls == 2, "with all of them, and nothing"


@pytest.mark.parametrize("body", ["RAISE EXCEPTION 'no'", "RETURN NULL"])
def test_a_task_is_not_left_out_for_another_that_somebody_looks_at(
    claiming: Claiming,
    database_url: str,
    bq: BeanQueue,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
) -> None:
    """Another worker tries what cannot be claimed whenever this one looks for what is first."""
    query(database_url, refusal("0", body=body))
    find = bq.queries.next

    def find_meanwhile(*args: Any) -> Any:
        with contextlib.closing(connect_by_itself(database_url)) as other:
            other.cursor().execute("BEGIN; SELECT FROM bq_tasks WHERE func_name = '0' FOR UPDATE")
            return find(*args)

    monkeypatch.setattr(bq.queries, "next", find_meanwhile)
    found: list[str] = []
    for _ in range(30):
        claiming.look()
        found += claiming.claim_once(1) or []
    assert found == [str(n) for n in range(1, 10)]


def test_a_task_that_came_first_after_the_claim_was_refused_is_not_left_out(
    claiming: Claiming, refuse: None, bq: BeanQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = bq.queries.next
    late = [
        "INSERT INTO bq_tasks (module, func_name, scheduled_at)"
        " VALUES ('a', 'late', now() - interval '390 minutes')"
    ]

    def find_later(connection: Connection, *args: Any) -> Any:
        if late:
            connection.exec_driver_sql(late.pop())
        return find(connection, *args)

    monkeypatch.setattr(bq.queries, "next", find_later)
    assert claiming.claim()[0] == ["0", "1", "2", "3", "4", "late", "6", "7", "8", "9"]


def test_a_task_that_cannot_be_claimed_does_not_starve_its_channel_beside_a_backlog(
    claiming: Claiming, refuse: None, database_url: str
) -> None:
    query(
        database_url,
        "INSERT INTO bq_tasks (channel, module, func_name)"
        " SELECT 'other', 'a', 'other' FROM generate_series(1, 2000)",
    )
    found: list[str] = []
    for _ in range(25):
        found += claiming.claim_once() or []
    assert {"9", "other"} < set(found)
    assert found.count("other") < 2000


def test_of_many_tasks_that_cannot_be_claimed_some_are_named(
    claiming: Claiming,
    database_url: str,
    now: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(claimer, "MOST_NAMED", 2)
    query(database_url, refusal("1", "3", "5", "7"))
    assert claiming.claim()[0] == ["0", "2", "4", "6", "8", "9"]
    first, second, rest = (record.getMessage() for record in caplog.records)
    assert first.endswith(" cannot be claimed, and is tried again in 60 s: no")
    assert second.endswith(": no")
    assert rest == "More than 2 tasks cannot be claimed: no"
    # Later, they are named again.
    now.at = 3 * claimer.REFUSED_FOR
    claiming.look()
    assert claiming.claim()[0] == []
    assert len(caplog.records) == 6


def test_more_tasks_that_cannot_be_claimed_than_are_left_out_are_passed_over(
    claiming: Claiming,
    database_url: str,
    now: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are not tried again and again, and each good task is done."""
    monkeypatch.setattr(claimer, "MOST_REFUSED", 2)
    bad = "1", "3", "5", "7"
    query(database_url, refusal(*bad))
    found, _ = claiming.claim()
    assert found == [str(n) for n in range(10) if str(n) not in bad]
    assert caplog.text.count("Too many tasks of channel 'default' cannot be claimed") == 1
    for _ in range(20):
        assert claiming.look()
        assert claiming.claim() == ([], 1)
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('a', 'new')")
    assert claiming.claim()[0] == ["new"]
    now.at = marks.PASSED_OVER
    query(database_url, "DROP TRIGGER refuse ON bq_tasks")
    assert claiming.look()
    assert claiming.claim()[0] == list(bad)


@pytest.mark.parametrize("body", ["RETURN NULL", "RETURN OLD", "NEW.state := OLD.state"])
def test_tasks_that_a_trigger_leaves_as_they_are_hold_up_no_others(
    claiming: Claiming, database_url: str, caplog: pytest.LogCaptureFixture, body: str
) -> None:
    """Nothing is raised then; they just are not claimed."""
    bad = "0", "1", "2", "3", "8"
    query(database_url, refusal(*bad, body=body))
    found: list[str] = []
    for _ in range(10):
        claiming.look()
        found += claiming.claim(most=2)[0]
    assert found == [str(n) for n in range(10) if str(n) not in bad]
    assert caplog.text.count("its row stays as it is; does a trigger return NULL?") == len(bad)
    assert not claiming.look()


def test_tasks_that_are_left_as_they_are_are_each_tried_a_few_times(
    claiming: Claiming, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimer, "MOST_REFUSED", 2)
    query(database_url, "CREATE SEQUENCE times")
    query(database_url, refusal("bad", body="PERFORM nextval('times'); RETURN NULL"))
    query(database_url, "UPDATE bq_tasks SET func_name = 'bad'")
    query(database_url, "ALTER SEQUENCE times RESTART")
    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name) SELECT 'a', 'bad' FROM generate_series(11, 100)",
    )
    for _ in range(3):
        claiming.look()
        claiming.claim()
    [(times,)] = query(database_url, "SELECT last_value FROM times")
    assert times < 6 * 100


def test_a_task_that_is_touched_while_it_is_claimed_is_not_taken_for_one_that_cannot_be(
    claiming: Claiming, bq: BeanQueue, database_url: str
) -> None:
    query(database_url, "DELETE FROM bq_tasks WHERE func_name <> '0'")
    [(key,)] = query(database_url, "SELECT id::text FROM bq_tasks")
    through = threading.Event()

    def touch() -> None:
        with contextlib.closing(connect_by_itself(database_url)) as other, other.cursor() as cursor:
            while not through.is_set():
                cursor.execute("UPDATE bq_tasks SET kwargs = '{}'")

    threads = [threading.Thread(target=touch) for _ in range(2)]
    for thread in threads:
        thread.start()
    levels = claiming.marks.turn()
    found = []
    try:
        for _ in range(300):
            found += bq.queries.claim(claiming.connection, claiming.worker_id, levels, 1, alone=key)
            query(database_url, "UPDATE bq_tasks SET state = 'PENDING'")
    finally:
        through.set()
        for thread in threads:
            thread.join()
    assert 0 < len(found) < 300, "or there was nothing to be seen"


def test_what_does_not_fit_in_one_row_is_not_looked_for_in_the_tables_each_time(
    claiming: Claiming, bq: BeanQueue, database_url: str, now: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is a handful of statements."""
    bad = "1", "3", "5", "7"
    query(database_url, refusal(*bad, body="RAISE EXCEPTION 'no' USING ERRCODE = '42703'"))
    times = []
    check = bq.queries.check_tables
    monkeypatch.setattr(bq.queries, "check_tables", lambda of: [times.append(1), check(of)])
    assert claiming.claim()[0] == [str(n) for n in range(10) if str(n) not in bad]
    assert times == [1]


def test_a_task_that_cannot_be_claimed_holds_up_no_other_while_outcomes_cannot_be_written(
    claiming: Claiming, refuse: None, database_url: str
) -> None:
    on, body = "BEFORE INSERT ON bq_events", "RAISE EXCEPTION 'full'"
    query(database_url, trigger("refuse_events", on, body, each="STATEMENT"))
    assert claiming.claim()[0] == [str(n) for n in range(10) if n != 5]


@pytest.mark.parametrize("body", ["RAISE EXCEPTION 'no'", "RETURN NULL", "RETURN OLD"])
def test_a_task_that_was_in_a_crash_and_cannot_be_claimed_holds_up_no_other_that_was(
    claiming: Claiming, database_url: str, body: str
) -> None:
    query(database_url, "UPDATE bq_tasks SET crashes = 1")
    query(database_url, refusal("0", "1", "3", body=body))
    found = []
    for _ in range(20):
        if claim := claiming.claimer.claim_suspect(claiming.connection, claiming.worker_id):
            found.append(claim.func_name)
            query(database_url, "DELETE FROM bq_tasks WHERE id = %s", claim.key)
    assert found == [str(n) for n in range(10) if n not in (0, 1, 3)]


def test_a_task_is_not_left_out_because_another_worker_looks_at_it(
    claiming: Claiming, database_url: str, bq: BeanQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    query(database_url, "UPDATE bq_tasks SET crashes = 1")
    query(database_url, "DELETE FROM bq_tasks WHERE func_name <> '0'")
    claim, times = bq.queries.claim_suspect, [1, 2]

    def claim_meanwhile(*args: Any, **options: Any) -> Any:
        if not times:
            return claim(*args, **options)
        times.pop()
        with contextlib.closing(connect_by_itself(database_url)) as other, other.cursor() as cursor:
            cursor.execute("BEGIN; SELECT FROM bq_tasks FOR UPDATE")
            found = claim(*args, **options)
            cursor.execute("ROLLBACK")
            return found

    monkeypatch.setattr(bq.queries, "claim_suspect", claim_meanwhile)
    assert claiming.claimer.claim_suspect(claiming.connection, claiming.worker_id) is None
    assert not times
    assert claiming.claimer.claim_suspect(claiming.connection, claiming.worker_id)


def test_new_tasks_that_cannot_be_claimed_do_not_keep_what_is_before_them_waiting_for_ever(
    claiming: Claiming, database_url: str, now: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimer, "MOST_REFUSED", 2)
    query(database_url, "DELETE FROM bq_tasks")
    query(database_url, refusal("bad"))
    add = (
        "INSERT INTO bq_tasks (module, func_name, scheduled_at)"
        " SELECT 'a', %s, now() - interval '2 hours' + %s * interval '1 second'"
        " FROM generate_series(1, 4)"
    )
    found: list[str] = []
    for second in range(0, 3600, 50):
        query(database_url, add, "bad", second)
        if second == 1800:
            query(database_url, add, "good", 1700)
        if second > 1800 + 2 * marks.PASSED_LONGEST:
            break
        now.at += 50
        claiming.look()
        found += claiming.claim()[0]
    assert found == ["good"] * 4


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE bq_tasks ALTER claims DROP DEFAULT, ALTER claims TYPE text",
        trigger("refuse", "BEFORE UPDATE ON bq_tasks", "RAISE EXCEPTION 'no'", each="STATEMENT"),
    ],
    ids=["a column of another type", "a trigger for the statement"],
)
def test_where_no_task_can_be_claimed_none_is_left_out(
    claiming: Claiming, database_url: str, change: str
) -> None:
    query(database_url, change)
    with pytest.raises(sa.exc.DBAPIError, match=r"operator does not exist|no"):
        claiming.claim()


@pytest.mark.parametrize("limit", [1, 100])
def test_a_claim_that_does_not_fit_the_tables_says_so(
    claiming: Claiming, database_url: str, limit: int
) -> None:
    """That is no task's fault, and no waiting helps."""
    query(database_url, "ALTER TABLE bq_tasks RENAME interruptions TO breaks")
    with pytest.raises(sa.exc.ProgrammingError, match="interruptions does not exist"):
        claiming.claimer.claim(claiming.connection, claiming.worker_id, limit)
    with pytest.raises(sa.exc.ProgrammingError, match="interruptions does not exist"):
        claiming.claimer.claim_suspect(claiming.connection, claiming.worker_id)
