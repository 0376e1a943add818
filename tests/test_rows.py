"""Rows that raw SQL writes, on any channel, and what comes of them.

There is a table of them: what is odd, in words, and how the task ends.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .conftest import running, texts, with_driver
from .probe import Probe, query
from .stage import EFFECT, stage
from .triggers import trigger
from .values import MOST

Work = Callable[..., None]

NIL = "00000000-0000-0000-0000-000000000000"

# What the database refuses.

REFUSED = {
    "NULL as arguments": ({"kwargs": None}, "23502"),
    "no JSON as arguments": ({"kwargs": "{"}, "22P02"),
    "NaN": ({"kwargs": '{"a": NaN}'}, "22P02"),
    "NUL": ({"kwargs": '{"a": "\\u0000"}'}, "22P05"),
    "half of a surrogate pair": ({"kwargs": '{"a": "\\ud800"}'}, "22P02"),
    "a state that there is not": ({"state": "SLEEPING"}, "23514"),
    "a state in small letters": ({"state": "pending"}, "23514"),
    "a priority that is too large": ({"priority": MOST + 1}, "22003"),
    "a time after the end of time": ({"scheduled_at": "300000-01-01"}, "22008"),
    "a channel that no index takes": (
        {"channel": "".join(random.Random(1).choices(string.ascii_letters, k=10_000))},
        "54000",
    ),
}


def insert(url: str, **columns: Any) -> str:
    """Write a task by raw SQL, and return its id."""
    columns = {"module": __name__, "func_name": "odd"} | columns
    names, values = ", ".join(columns), ", ".join(["%s"] * len(columns))
    [(task_id,)] = query(
        url,
        f"INSERT INTO bq_tasks ({names}) VALUES ({values}) RETURNING CAST(id AS text)",
        *columns.values(),
    )
    return str(task_id)


def test_the_database_refuses_rows_that_could_not_be_worked_on(
    app: Flask, database_url: str
) -> None:
    for name, (columns, code) in REFUSED.items():
        with pytest.raises(psycopg2.Error) as caught:
            insert(database_url, **columns)
        assert caught.value.pgcode == code, name


# How the others end, and what the error message says.

UNKNOWN = "No processor {} is registered in this worker"
LISTS = f'{{"a": {"[" * 10_000}{"]" * 10_000}}}'

ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a list as arguments": ({"kwargs": "[1]"}, "FAILED", "kwargs are no JSON object"),
    "text as arguments": ({"kwargs": '"a"'}, "FAILED", "kwargs are no JSON object"),
    "a number as arguments": ({"kwargs": "5"}, "FAILED", "kwargs are no JSON object"),
    "null as arguments": ({"kwargs": "null"}, "FAILED", "kwargs are no JSON object"),
    "an argument too many": ({"kwargs": '{"b": 1}'}, "FAILED", "unexpected keyword argument 'b'"),
    "what is filled in": ({"kwargs": '{"db": 1}'}, "FAILED", "multiple values for keyword"),
    "1e400": ({"kwargs": '{"a": 1e400}'}, "DONE", ""),
    "a number of 5,000 digits": ({"kwargs": '{"a": 1e4999}'}, "FAILED", "Exceeds the limit (4300"),
    "10,000 lists within each other": ({"kwargs": LISTS}, "FAILED", "kwargs are nested too deeply"),
    "PROCESSING, and nobody is at it": ({"state": "PROCESSING"}, "DONE", ""),
    "due at the end of time": ({"scheduled_at": "infinity"}, "PENDING", ""),
    "due in the year 290,000": ({"scheduled_at": "290000-01-01"}, "PENDING", ""),
    "due since ever": ({"scheduled_at": "-infinity"}, "DONE", ""),
    "due since 4713 BC": ({"scheduled_at": "4713-01-01 BC"}, "DONE", ""),
    "begun at the end of time": ({"started_at": "infinity", "created_at": "infinity"}, "DONE", ""),
    "unknown since ever": (
        {"func_name": "gone", "unknown_since": "-infinity"},
        "FAILED",
        UNKNOWN.format(f"{__name__}.gone"),
    ),
    "unknown since the end of time": (
        {"func_name": "gone", "unknown_since": "infinity"},
        "PENDING",
        UNKNOWN.format(f"{__name__}.gone"),
    ),
    "claimed less than never": ({"claims": -5}, "DONE", ""),
    "tried less than never": ({"attempts": -MOST - 1}, "DONE", ""),
    "crashed less than never": ({"crashes": -MOST - 1}, "DONE", ""),
    "interrupted less than never": ({"interruptions": -MOST - 1}, "DONE", ""),
    "claimed as seldom as can be": ({"claims": -MOST - 1}, "DONE", ""),
    "interrupted as often as can be": ({"interruptions": MOST}, "DONE", ""),
    "the first priority": ({"priority": -MOST - 1}, "DONE", ""),
    "the last priority": ({"priority": MOST}, "DONE", ""),
    "a module without a name": ({"module": ""}, "PENDING", UNKNOWN.format(".odd")),
    "a function without a name": ({"func_name": ""}, "PENDING", UNKNOWN.format(f"{__name__}.")),
    "SQL as a name": ({"func_name": "'; -- %s %(a)s :a\n😀"}, "PENDING", "; -- %s %(a)s :a"),
    "a name of a million characters": ({"func_name": "x" * 1_000_000}, "PENDING", "No processor"),
    "a channel without a name": ({"channel": ""}, "PENDING", ""),
    "a channel without a name, taken over": (
        {"channel": "", "state": "PROCESSING"},
        "PENDING",
        "Its worker died (1 of 3 times).",
    ),
    "the first id": ({"id": NIL}, "DONE", ""),
    "the last id": ({"id": "ffffffff-ffff-ffff-ffff-ffffffffffff"}, "DONE", ""),
}


@pytest.fixture(scope="module")
def rows_ended(own_databases: list[str]) -> dict[str, tuple[str, str]]:
    """State and error message of each row after a worker has done them, and a task for each."""
    with stage(with_driver(own_databases[0])) as on, on.app.app_context():

        @on.bq.processor()
        def odd(db: Any, a: Any = None) -> None:
            db.execute(EFFECT, {"text": "odd"})

        after = on.processor("after", lambda db, task: None)
        keys = {}
        for name, (columns, _, _) in ROWS.items():
            keys[name] = insert(on.url, **columns)
            after.enqueue()
            on.db.session.commit()
        on.work()
        effects = list(on.db.session.scalars(sa.text("SELECT text FROM note")))
        assert effects.count("after") == len(ROWS)
        assert effects.count("odd") == sum(state == "DONE" for _, state, _ in ROWS.values())
        rows = query(on.url, "SELECT CAST(id AS text), state, error_message FROM bq_tasks")
        ends = {key: (state, error or "") for key, state, error in rows}
        return {name: ends[key] for name, key in keys.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_raw_sql_wrote_ends_somehow_and_disturbs_nobody(
    rows_ended: dict[str, tuple[str, str]], name: str
) -> None:
    _, expected, words = ROWS[name]
    state, error = rows_ended[name]
    assert state == expected
    assert words in error
    assert len(error) < 3_000


@pytest.fixture
def odd(bq: BeanQueue) -> Any:
    """The processor whose rows are odd."""

    @bq.processor()
    def odd(db: Any, a: Any = None) -> None:
        db.execute(EFFECT, {"text": "odd"})

    return odd


@pytest.fixture
def after(bq: BeanQueue) -> Any:
    """One whose rows are not."""

    @bq.processor()
    def after(db: Any) -> None:
        db.execute(EFFECT, {"text": "after"})

    return after


@pytest.fixture
def others_get_done(
    app: Flask, db: SQLAlchemy, Note: Any, odd: Any, after: Any, work: Work
) -> Callable[..., None]:
    """Work, and see that tasks that come after odd rows get done, and of those none."""

    def check(number: int = 50, **options: Any) -> None:
        with app.app_context():
            after.enqueue_many([{}] * number)
            db.session.commit()
        work(**options)
        assert texts(app, db, Note) == ["after"] * number

    return check


@pytest.mark.parametrize("crashes", [0, 1])
def test_a_row_that_a_rule_does_not_let_be_claimed_disturbs_nobody(
    others_get_done: Callable[..., None],
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    crashes: int,
) -> None:
    """A rule of the app's own, which the row was written before."""
    query(
        database_url,
        "ALTER TABLE bq_tasks ADD CHECK (func_name <> 'odd' OR state = 'PENDING') NOT VALID",
    )
    for _ in range(3):
        insert(database_url, crashes=crashes)
    others_get_done()
    assert query(
        database_url, "SELECT state, count(*) FROM bq_tasks GROUP BY state ORDER BY state"
    ) == [("DONE", 50), ("PENDING", 3)]
    assert len(re.findall("cannot be claimed, .*: new row for relation", caplog.text)) == 1


#: What a trigger may answer, and some of what else comes back from a statement that is refused.
CODES = ["P0001", "A0001", "45000", "57014", "3F000", "42P01", "0A000", "55P03"]
RAISE = "RAISE EXCEPTION 'no' USING ERRCODE = NEW.kwargs->>'a'"


@pytest.mark.parametrize("crashes", [0, 1])
def test_a_row_that_a_trigger_does_not_let_be_claimed_disturbs_nobody_whatever_it_raises(
    others_get_done: Callable[..., None], database_url: str, crashes: int
) -> None:
    on = "BEFORE UPDATE ON bq_tasks"
    query(database_url, trigger("refuse", on, RAISE, condition="NEW.func_name = 'odd'"))
    for code in CODES:
        insert(database_url, crashes=crashes, kwargs=json.dumps({"a": code}))
    others_get_done()
    states = query(database_url, "SELECT state FROM bq_tasks WHERE func_name = 'odd'")
    assert states == [("PENDING",)] * len(CODES)


@pytest.mark.slow
def test_arguments_that_are_too_long_as_text_hold_up_no_other(
    others_get_done: Callable[..., None], database_url: str
) -> None:
    """JSONB keeps 1e131071 in some bytes; as text it has 131,072."""
    kwargs = f'{{"a": [{",".join(["1e131071"] * 8_200)}]}}'
    insert(database_url, kwargs=kwargs)
    insert(database_url, kwargs=kwargs, state="PROCESSING")
    others_get_done(concurrency=1)


def test_rows_that_come_behind_the_mark_are_found_whatever_their_time_and_id(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, odd: Any, after: Any, probe: Probe, database_url: str
) -> None:
    """Times long ago are known to a worker less exactly than to PostgreSQL."""
    probe.listen_states()
    with running(app, bq, concurrency=1):
        with app.app_context():
            after.enqueue()
            db.session.commit()
        probe.wait("after DONE")
        times = [f"1000-01-01 00:00:00.{number}" for number in range(100_001, 100_009)]
        rows = [{"scheduled_at": time} for time in [*times, "4714-11-24 BC", "-infinity"]]
        for row in [*rows, {"id": NIL}]:
            insert(database_url, **row)
            query(database_url, 'NOTIFY "default"')
            probe.wait("odd DONE", timeout=20)


# Channels. That each wakes its worker is in test_notify.

CHANNELS = [
    '"',
    "'",
    "''; DROP TABLE bq_tasks; --",
    "%s %(channel)s %",
    ":channel ::text",
    "\\",
    "{tasks}",
    "two\nlines",
    " ",
    "😀 ünï",
    "x" * 64,
    "x" * 2_500,
    "☃" * 833,
]


def test_any_channel_is_worked_on(app: Flask, odd: Any, work: Work, database_url: str) -> None:
    for channel in CHANNELS:
        insert(database_url, channel=channel)
    work(*CHANNELS)
    assert query(database_url, "SELECT state, count(*) FROM bq_tasks GROUP BY state") == [
        ("DONE", len(CHANNELS))
    ]


@pytest.mark.parametrize("way", ["processor", "using", "worker"])
def test_a_channel_that_no_index_takes_is_refused_where_it_is_named(
    app: Flask, bq: BeanQueue, odd: Any, way: str
) -> None:
    name = {
        "processor": lambda channel: bq.processor(channel=channel),
        "using": lambda channel: odd.using(channel=channel),
        "worker": lambda channel: bq.worker([channel], app=app),
    }
    with pytest.raises(ValueError, match="channel takes 2502 bytes, but at most 2500 go into an"):
        name[way]("☃" * 834)
