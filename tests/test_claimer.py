"""The claimer by itself, where the database does not let all tasks be claimed."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import cursor, quarantine
from flask_beanqueue.engine.claim import Claimer
from flask_beanqueue.engine.connection import connect
from flask_beanqueue.engine.cursor import STAYS, Cursor, look
from flask_beanqueue.engine.heartbeat import add_worker
from flask_beanqueue.engine.quarantine import Quarantine
from flask_beanqueue.models.uuid7 import uuid7

from .probe import query
from .triggers import trigger


class Claiming:
    """A worker of which there is nothing but its claimer, and the tasks 0 to 9."""

    def __init__(self, bq: BeanQueue, connection: Connection, url: str) -> None:
        self.connection = connection
        self.models = bq.models
        channels = ["default", "other"]
        self.cursor = Cursor(channels)
        self.worker_id = uuid7()
        self.claimer = Claimer(bq.models, self.worker_id, self.cursor, 100, 1000)
        self.quarantine = Quarantine(bq.models, self.worker_id, channels, 1000)
        add_worker(connection, bq.models, self.worker_id, "worker", channels)
        query(
            url,
            "INSERT INTO bq_tasks (module, func_name, scheduled_at)"
            " SELECT 'a', n, now() - (11 - n) * interval '1 hour' FROM generate_series(0, 9) AS n",
        )

    def look(self) -> bool:
        return self.cursor.take_in(look(self.connection, self.models, ["default", "other"]), 0.0)

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
        claims = self.claimer.claim(self.connection, wanted)
        if claims is None:
            return None
        self.cursor.pass_by(claims, wanted)
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
    monkeypatch.setattr(cursor, "time", clock)
    monkeypatch.setattr(quarantine, "time", clock)
    return now


def test_a_task_that_cannot_be_claimed_is_stepped_over_for_a_while(
    claiming: Claiming, refuse: None, now: Any, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert claiming.claim()[0] == [str(n) for n in range(10) if n != 5]
    assert "cannot be claimed, and is tried again in 60 s" in caplog.text
    query(database_url, "DROP TRIGGER refuse ON bq_tasks")
    claiming.look()
    assert claiming.claim() == ([], 1)
    now.at = STAYS
    assert claiming.look()
    assert claiming.claim()[0] == ["5"]


def test_what_comes_after_a_task_that_is_stepped_over_is_claimed_at_once(
    claiming: Claiming, refuse: None, now: Any, database_url: str
) -> None:
    """And many at once."""
    claiming.claim()
    for _ in range(3):
        query(
            database_url,
            "INSERT INTO bq_tasks (module, func_name) SELECT 'a', 'new' FROM generate_series(1, 9)",
        )
        claiming.look()
        found, calls = claiming.claim()
        assert found == ["new"] * 9
    assert calls == 2, "with all of them, and nothing"


def test_a_task_in_another_channel_is_not_stepped_over(
    claiming: Claiming, refuse: None, now: Any, database_url: str
) -> None:
    claiming.claim()
    query(
        database_url,
        "INSERT INTO bq_tasks (channel, module, func_name, scheduled_at)"
        " VALUES ('other', 'a', 'early', now() - interval '1 day'),"
        " ('default', 'a', 'early', now() - interval '1 day')",
    )
    claiming.look()
    assert claiming.claim()[0] == ["early"]
    now.at = STAYS
    claiming.look()
    assert claiming.claim()[0] == ["early"]


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


def test_many_tasks_that_cannot_be_claimed_are_named_once_a_minute(
    claiming: Claiming, database_url: str, now: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bad = "1", "3", "5", "6", "7"
    query(database_url, refusal(*bad))
    for minute in range(3):
        now.at = minute * STAYS
        claiming.look()
        good = [str(n) for n in range(10) if str(n) not in bad]
        assert claiming.claim()[0] == ([] if minute else good)
        assert len(caplog.records) == minute + 1


def test_a_task_that_cannot_be_claimed_holds_up_no_other_while_outcomes_cannot_be_written(
    claiming: Claiming, refuse: None, database_url: str
) -> None:
    on, body = "BEFORE INSERT ON bq_events", "RAISE EXCEPTION 'full'"
    query(database_url, trigger("refuse_events", on, body, each="STATEMENT"))
    assert claiming.claim()[0] == [str(n) for n in range(10) if n != 5]


def test_a_task_that_was_in_a_crash_and_cannot_be_claimed_is_tried_again_later(
    claiming: Claiming, database_url: str, now: Any, caplog: pytest.LogCaptureFixture
) -> None:
    query(database_url, "UPDATE bq_tasks SET crashes = 1")
    query(database_url, refusal("0"))

    def claim() -> Any:
        return claiming.quarantine.take(claiming.connection)

    assert claim() is None
    assert "A task that was in a crash cannot be claimed" in caplog.text
    query(database_url, "DROP TRIGGER refuse ON bq_tasks")
    assert claim() is None
    now.at = STAYS
    assert claim().func_name == "0"


def test_new_tasks_that_cannot_be_claimed_do_not_keep_what_is_before_them_waiting_for_ever(
    claiming: Claiming, database_url: str, now: Any
) -> None:
    query(database_url, "DELETE FROM bq_tasks")
    query(database_url, refusal("bad"))
    add = (
        "INSERT INTO bq_tasks (module, func_name, scheduled_at)"
        " VALUES ('a', %s, now() - interval '2 hours' + %s * interval '1 second')"
    )
    for second in range(0, 300, 10):
        query(database_url, add, "bad", second)
        query(database_url, add, "good", second + 1)
        if second == 100:
            query(database_url, add, "early", 50)
        now.at += 10
        claiming.look()
        if "early" in claiming.claim()[0]:
            break
    assert second <= 100 + STAYS


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE bq_tasks ALTER claims DROP DEFAULT, ALTER claims TYPE text",
        trigger("refuse", "BEFORE UPDATE ON bq_tasks", "RAISE EXCEPTION 'no'", each="STATEMENT"),
    ],
    ids=["a column of another type", "a trigger for the statement"],
)
def test_where_no_task_can_be_claimed_none_is_stepped_over(
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
    with pytest.raises(sa.exc.ProgrammingError, match=r'interruptions"? does not exist'):
        claiming.claimer.claim(claiming.connection, limit)
    with pytest.raises(sa.exc.ProgrammingError, match=r'interruptions"? does not exist'):
        claiming.quarantine.take(claiming.connection)
