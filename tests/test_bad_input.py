"""Bad input, by every way in, and what comes of it.

Each way has a table: what goes in, in words, and what comes out; what takes more room has a test of
its own below. Elsewhere are: text that only looks odd, options, and what can be no processor
(test_processor); what a webhook brings (test_auto_complete); what a retry policy answers
(test_retry); receivers of signals that raise (test_signals); processors that fork, or stop or kill
their worker (test_faults); and outcomes that a rule of the app's own refuses (test_worker,
test_take_over).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import decimal
import enum
import logging
import math
import os
import pathlib
import random
import select
import signal
import string
import subprocess
import sys
import tempfile
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg2
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flask_beanqueue import (
    ArgumentError,
    BeanQueue,
    LimitAttempt,
    arguments,
    outcome,
    writer,
)
from flask_beanqueue.outcome import Outcome

from . import postgres
from .conftest import MakeApp, running, texts, with_driver
from .probe import Probe, query
from .triggers import trigger

Work = Callable[..., None]
#: What a processor does, given the session and its task.
Act = Callable[[Any, Any], Any]

EFFECT = sa.text("INSERT INTO note (text) VALUES (:text)")
MOST = 2**31 - 1
NIL = "00000000-0000-0000-0000-000000000000"
#: Of engines, in which a connection may have been left open.
POOLS: list[sa.Pool] = []
NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)


class End(NamedTuple):
    """How a task ended."""

    state: str
    error: str
    attempts: int
    result: Any
    #: What it wrote.
    effects: list[str]
    #: What each attempt that failed has left.
    events: list[Any]
    log: str


class Stage(NamedTuple):
    """An app whose tasks are done by one worker with one thread."""

    app: Flask
    db: SQLAlchemy
    bq: BeanQueue
    url: str

    def processor(self, name: str, act: Act, **options: Any) -> Any:
        """A processor that writes something and acts, at its first attempt."""

        def processor(db: Any, task: Any) -> Any:
            db.execute(EFFECT, {"text": name})
            return act(db, task) if task.attempts == task.interruptions == 0 else None

        processor.__name__ = name
        return self.bq.processor(**options)(processor)

    def work(self) -> None:
        self.bq.process_tasks(app=self.app, burst=True, concurrency=1)


@pytest.fixture(scope="module")
def stage(own_databases: list[str]) -> Callable[[], Any]:
    """Set a stage, and clear it afterwards."""

    @contextlib.contextmanager
    def stage() -> Iterator[Stage]:
        db = SQLAlchemy()
        bq = BeanQueue(db=db)

        class Note(db.Model):  # type: ignore[name-defined, misc]
            id = sa.Column(sa.Integer, primary_key=True)
            text = sa.Column(sa.Text, nullable=False)

        app = Flask("tests")
        app.config["SQLALCHEMY_DATABASE_URI"] = with_driver(own_databases[0])
        db.init_app(app)
        bq.init_app(app)
        with app.app_context():
            db.create_all()
        try:
            yield Stage(app, db, bq, own_databases[0])
        finally:
            with app.app_context():
                POOLS.append(db.engine.pool)
            while POOLS:
                POOLS.pop().dispose()
            postgres.empty(own_databases[0])

    return stage


@pytest.fixture(scope="module")
def end_all(stage: Any) -> Callable[..., dict[str, End]]:
    """Let one worker do a task for each act, and a next one after each; tell how they ended."""

    def end_all(acts: dict[str, Act], attempts: int = 1) -> dict[str, End]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("flask_beanqueue")
        with stage() as on, on.app.app_context(), pytest.MonkeyPatch.context() as patch:
            # What loses its connection is not due again.
            patch.setattr(outcome, "INTERRUPTION_DELAY", outcome.LONGEST_INTERRUPTION_DELAY)
            after = on.processor("after", lambda db, task: None)
            tasks = {}
            for number, (name, act) in enumerate(acts.items()):
                policy = LimitAttempt(attempts)
                processor = on.processor(f"act {number}", act, retry_policy=policy)
                tasks[name] = processor.enqueue().id, f"act {number}"
                after.enqueue()
            on.db.session.commit()
            logger.addHandler(handler)
            try:
                on.work()
            finally:
                logger.removeHandler(handler)
            effects = list(on.db.session.scalars(sa.text("SELECT text FROM note")))
            assert effects.count("after") == len(acts)
            ends = {}
            for name, (task_id, text) in tasks.items():
                task = on.db.session.get(on.bq.Task, task_id)
                ends[name] = End(
                    task.state,
                    task.error_message or "",
                    task.attempts,
                    task.result,
                    [effect for effect in effects if effect == text],
                    [(each.error_message or "", each.traceback or "") for each in task.events],
                    "\n".join(line for line in lines if str(task_id) in line),
                )
            return ends

    return end_all


# Arguments, in the view.


class Color(enum.Enum):
    RED = 1


class Mapping(dict[str, Any]):
    def items(self) -> Any:
        raise LookupError("no items")


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


CYCLE: list[Any] = []
CYCLE.append({"itself": CYCLE})

NO_ARGUMENT = {
    "a time": (NOON, "Object of type datetime is not JSON serializable"),
    "a set": ({1}, "Object of type set is not JSON serializable"),
    "bytes": (b"a", "Object of type bytes is not JSON serializable"),
    "a decimal": (decimal.Decimal("1.5"), "Object of type Decimal is not JSON serializable"),
    "a member of an enum": (Color.RED, "Object of type Color is not JSON serializable"),
    "an object that cannot be printed": (Unprintable(), "Object of type Unprintable is not JSON"),
    "a tuple as a key": ({(1, 2): 3}, "keys must be str, int, float, bool or None, not tuple"),
    "NaN": (float("nan"), "NaN and Infinity are not JSON compliant"),
    "Infinity": ([float("inf")], "NaN and Infinity are not JSON compliant"),
    "a number of 5,000 digits": (10**4_999, "Exceeds the limit (4300 digits)"),
    "NUL": ("a\0b", "it holds the character U+0000, which PostgreSQL cannot store"),
    "NUL in a key": ({"a\0b": 1}, "it holds the character U+0000"),
    "NUL after a backslash": ("\\\0", "it holds the character U+0000"),
    "half of a surrogate pair": ("\ud800", "it holds half of a surrogate pair, which is no text"),
    "both halves, each by itself": ("\ud83d\ude00", "it holds half of a surrogate pair"),
    "half of a pair in a key": ({"\udfff": 1}, "it holds half of a surrogate pair"),
    "a list that holds itself": (CYCLE, ""),
    "100 lists within each other": (nested(100), "it is nested too deeply"),
    "101 lists within each other": (nested(101), "it is nested too deeply"),
    "100,000 lists within each other": (nested(100_000), "it is nested too deeply, or holds"),
    "a mapping that raises": (Mapping(a=1), "it raises LookupError: no items"),
}


@pytest.fixture
def resize(bq: BeanQueue) -> Any:
    @bq.processor(channel="images")
    def resize(width: int, height: Any = 1) -> Any:
        return height

    return resize


@pytest.mark.parametrize("way", ["run", "enqueue", "enqueue_many"])
@pytest.mark.parametrize(("value", "words"), NO_ARGUMENT.values(), ids=NO_ARGUMENT)
def test_an_argument_that_cannot_be_stored_is_refused_by_name(
    resize: Any, way: str, value: Any, words: str
) -> None:
    with pytest.raises(ArgumentError) as caught:  # noqa: PT012
        if way == "enqueue_many":
            resize.enqueue_many([{"width": 1}, {"width": 1, "height": value}])
        else:
            getattr(resize, way)(width=1, height=value)
    item = "Item 1: " if way == "enqueue_many" else ""
    message = str(caught.value)
    assert message.startswith(
        f"{item}{__name__}.resize: the argument 'height' cannot be stored as JSON: {words}"
    )
    assert message.endswith(
        ". Pass something plain in its place, such as an id, a string or a number."
    )


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "half of a surrogate pair"])
def test_an_argument_whose_name_cannot_be_stored_is_refused(bq: BeanQueue, name: str) -> None:
    @bq.processor()
    def tag(**tags: str) -> None:
        pass

    with pytest.raises(ArgumentError, match="cannot be stored as JSON"):
        tag.run(**{name: "x"})


def test_an_argument_whose_name_is_no_text_is_refused(bq: BeanQueue) -> None:
    @bq.processor()
    def tag(**tags: str) -> None:
        pass

    with pytest.raises(ArgumentError, match=r"^Item 0: .*keywords must be strings"):
        tag.enqueue_many([{1: "x"}])


@pytest.mark.parametrize(
    ("text", "refused"), [("\\u0000", False), ("\0", True)], ids=["what looks like NUL", "NUL"]
)
def test_many_backslashes_take_little_memory(resize: Any, text: str, refused: bool) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError) if refused else contextlib.nullcontext():
            resize.run(width=1, height="\\" * 1_000_000 + text)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_argument_that_is_too_large_is_refused_by_name(
    resize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "LARGEST", 100)
    assert resize.run(width=1, height="x" * 70).kwargs["height"]
    with pytest.raises(ArgumentError, match=r"'height' .* too large: 113 characters of JSON, of"):
        resize.run(width=1, height="x" * 99)


@pytest.mark.slow
def test_a_hundred_megabytes_go_in_and_come_out(
    app: Flask, db: SQLAlchemy, resize: Any, work: Work, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue(width=1, height="x" * 100_000_000)
        db.session.commit()
    work()
    [found] = query(
        database_url,
        "SELECT state, kwargs->'height' = result, octet_length(result::text) FROM bq_tasks",
    )
    assert found == ("DONE", True, 100_000_002)


# Arguments, on the command line.

SUBMITTED = {
    "no JSON": ("{'width': 1}", "Invalid value for '--kwargs': This is not JSON"),
    "a list": ("[1]", 'This is no JSON object, such as {"width": 200}'),
    "text": ('"width"', "This is no JSON object"),
    "null": ("null", "This is no JSON object"),
    "NaN": ('{"width": NaN}', "the argument 'width' cannot be stored as JSON: NaN and Infinity"),
    "1e400": ('{"width": 1e400}', "NaN and Infinity are not JSON compliant"),
    "a number of 5,000 digits": (f'{{"width": {"9" * 5_000}}}', "Exceeds the limit (4300 digits)"),
    "NUL": ('{"width": "\\u0000"}', "the argument 'width' cannot be stored as JSON: it holds the"),
    "half of a surrogate pair": ('{"width": "\\ud800"}', "it holds half of a surrogate pair"),
    "bytes that are no text": ('{"width": "\udce9"}', "it holds half of a surrogate pair"),
    "101 lists within each other": (f'{{"width": {nested(101)}}}', "it is nested too deeply"),
    "50,000 lists": ('{"width": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
    "an argument too few": ("{}", "missing a required argument: 'width'"),
    "an argument too many": ('{"width": 1, "depth": 2}', "unexpected keyword argument 'depth'"),
}


def test_submit_says_what_is_wrong_with_its_arguments(
    app: Flask, resize: Any, database_url: str
) -> None:
    for name, (kwargs, words) in SUBMITTED.items():
        result = app.test_cli_runner().invoke(
            args=["bq", "submit", "images", __name__, "resize", "-k", kwargs]
        )
        assert isinstance(result.exception, SystemExit), name
        assert result.exit_code in (1, 2), name
        assert words in result.output, name
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


# Tasks that are made by hand: what cannot be stored raises in the view, with the commit.

BY_HAND: dict[str, dict[str, Any]] = {
    "NaN": {"kwargs": {"a": float("nan")}},
    "NUL": {"kwargs": {"a": "\0"}},
    "half of a surrogate pair": {"kwargs": {"a": "\ud800"}},
    "an object": {"kwargs": {"a": object()}},
    "no module": {"module": None},
    "a channel without a name": {"channel": ""},
    "a channel with NUL": {"channel": "a\0b"},
    "a state that there is not": {"state": "SLEEPING"},
    "a priority that is too large": {"priority": MOST + 1},
    "a time that is none": {"scheduled_at": "tomorrow-ish"},
}


def test_a_task_that_is_made_badly_raises_in_the_view(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    for columns in BY_HAND.values():
        with app.app_context():
            db.session.add(bq.Task(**{"module": __name__, "name": "resize"} | columns))
            with pytest.raises((sa.exc.SQLAlchemyError, TypeError, ValueError)):
                db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


# Rows that raw SQL writes, and that the database refuses.

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


# Rows that raw SQL writes: how they end, and what the error message says.

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
    "claimed as often as can be": ({"claims": MOST}, "DONE", ""),
    "claimed as seldom as can be": ({"claims": -MOST - 1}, "DONE", ""),
    "tried as often as can be": ({"attempts": MOST}, "DONE", ""),
    "tried as often, and bad": ({"attempts": MOST, "kwargs": "5"}, "FAILED", "no JSON object"),
    "crashed as often as can be": ({"crashes": MOST}, "DONE", ""),
    "crashed once more": ({"crashes": MOST, "state": "PROCESSING"}, "FAILED", "Its worker died"),
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
        "FAILED",
        "channel name cannot be empty",
    ),
    "the first id": ({"id": NIL}, "DONE", ""),
    "the last id": ({"id": "ffffffff-ffff-ffff-ffff-ffffffffffff"}, "DONE", ""),
}


@pytest.fixture(scope="module")
def rows_ended(stage: Any) -> dict[str, tuple[str, str]]:
    """State and error message of each row after a worker has done them, and a task for each."""
    with stage() as on, on.app.app_context():

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


def test_a_task_that_was_tried_as_often_as_can_be_may_end_itself(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    @bq.processor()
    def end(task: Any) -> None:
        task.state = "CANCELLED"

    insert(database_url, func_name="end", attempts=MOST)
    work()
    assert query(database_url, "SELECT state, attempts FROM bq_tasks") == [("CANCELLED", MOST)]


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


@pytest.mark.parametrize("crashes", [0, 1])
def test_a_row_that_a_rule_does_not_let_be_claimed_disturbs_nobody(
    app: Flask,
    db: SQLAlchemy,
    Note: Any,
    odd: Any,
    after: Any,
    work: Work,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    crashes: int,
) -> None:
    """A rule of the app's own, which the row was written before."""
    query(
        database_url,
        "ALTER TABLE bq_tasks ADD CHECK (func_name <> 'odd' OR state = 'PENDING') NOT VALID",
    )
    rows = [insert(database_url, crashes=crashes) for _ in range(3)]
    with app.app_context():
        after.enqueue_many([{}] * 50)
        db.session.commit()
    work()
    assert texts(app, db, Note) == ["after"] * 50
    assert query(
        database_url, "SELECT state, count(*) FROM bq_tasks GROUP BY state ORDER BY state"
    ) == [("DONE", 50), ("PENDING", 3)]
    for what in ["A task that was in a crash"] if crashes else rows:
        assert caplog.text.count(f"{what} cannot be claimed: new row for relation") == 1


@pytest.mark.slow
def test_arguments_that_are_too_long_as_text_fail_their_task_and_no_other(
    app: Flask, db: SQLAlchemy, Note: Any, odd: Any, after: Any, work: Work, database_url: str
) -> None:
    """JSONB keeps 1e131071 in some bytes; as text it has 131,072."""
    kwargs = f'{{"a": [{",".join(["1e131071"] * 8_200)}]}}'
    insert(database_url, kwargs=kwargs)
    insert(database_url, kwargs=kwargs, state="PROCESSING")
    with app.app_context():
        after.enqueue_many([{}] * 50)
        db.session.commit()
    work(concurrency=1)
    assert texts(app, db, Note) == ["after"] * 50
    ends = query(database_url, "SELECT state, error_message FROM bq_tasks WHERE func_name = 'odd'")
    assert [state for state, _ in ends] == ["FAILED", "FAILED"]
    assert all("ValueError: the task's kwargs cannot be read: " in error for _, error in ends)


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


def test_any_channel_is_worked_on(app: Flask, bq: BeanQueue, work: Work, database_url: str) -> None:
    @bq.processor()
    def odd() -> None:
        pass

    for channel in CHANNELS:
        insert(database_url, channel=channel)
    work(*CHANNELS)
    assert query(database_url, "SELECT state, count(*) FROM bq_tasks GROUP BY state") == [
        ("DONE", len(CHANNELS))
    ]


@pytest.mark.parametrize("way", ["processor", "using", "worker"])
def test_a_channel_that_no_index_takes_is_refused_where_it_is_named(
    app: Flask, bq: BeanQueue, resize: Any, way: str
) -> None:
    name = {
        "processor": lambda channel: bq.processor(channel=channel),
        "using": lambda channel: resize.using(channel=channel),
        "worker": lambda channel: bq.worker([channel], app=app),
    }
    with pytest.raises(ValueError, match="channel takes 2502 bytes, but at most 2500 go into an"):
        name[way]("☃" * 834)


# Results: stored as they are, or the task is DONE without, and the log says why.


class Leaving(dict[str, Any]):
    def items(self) -> Any:
        sys.exit("no items")


RESULTS = {
    "nothing": (None, True),
    "a list of one object": ([{"a": [1, 2.5, "é", None, True]}], True),
    "a number of 4,000 digits": (10**3_999, True),
    "text of a megabyte": ("x" * 1_000_000, True),
    "an object": (object(), False),
    "an object that cannot be printed": (Unprintable(), False),
    "a set in a dict": ({"a": {1, 2}}, False),
    "NaN": (float("nan"), False),
    "NUL": ("\0", False),
    "half of a surrogate pair": ("\ud800", False),
    "a list that holds itself": (CYCLE, False),
    "100,000 lists within each other": (nested(100_000), False),
    "a number of 5,000 digits": (10**4_999, False),
    "a mapping that raises": (Mapping(a=1), False),
    "a mapping that ends the program": (Leaving(a=1), False),
}


@pytest.fixture(scope="module")
def results_ended(end_all: Any) -> dict[str, End]:
    return end_all({name: returning(value) for name, (value, _) in RESULTS.items()})


def returning(value: Any) -> Act:
    return lambda db, task: value


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_stored_or_left_out(results_ended: dict[str, End], name: str) -> None:
    value, stored = RESULTS[name]
    end = results_ended[name]
    assert (end.state, end.attempts, len(end.effects)) == ("DONE", 1, 1)
    assert end.result == (value if stored else None)
    assert ("is not stored: " in end.log) is not stored


def test_a_result_that_is_too_large_is_left_out(
    end_all: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "LARGEST", 100)
    [end] = end_all({"large": returning("x" * 99)}).values()
    assert (end.state, end.result, len(end.effects)) == ("DONE", None, 1)
    assert "is not stored: ValueError: it is too large: 101 characters" in end.log


def test_large_results_go_into_several_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL closes the connection to who sends a gigabyte at once."""
    monkeypatch.setattr(writer, "LARGEST_PART", 100)
    claim: Any = None
    waiting = [
        Outcome(claim, "DONE", result=size and "x" * size) for size in (None, 60, 30, 20, 300, 50)
    ]
    parts = []
    while waiting:
        part = writer.first_part(waiting, 3)
        parts.append([each.result and len(each.result) for each in part])
        waiting = waiting[len(part) :]
    assert parts == [[None, 60, 30], [20], [300], [50]]


async def coroutine() -> None:
    pass


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> Any:
    yield 1


def test_a_result_that_has_yet_to_run_is_a_failure(end_all: Any) -> None:
    """Behind a decorator, nobody sees that the function is no ordinary one."""
    unrun = {
        function.__name__: lambda db, task, function=function: function()
        for function in (coroutine, generator, async_generator)
    }
    for name, end in end_all(unrun).items():
        assert (end.state, end.effects) == ("FAILED", [])
        assert f"The processor returned a {name}, and nothing has run in it. Call" in end.error


# Exceptions: what the error message says of them.


class WithoutWords(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class LeavingWords(Exception):
    def __str__(self) -> str:
        sys.exit("in __str__")


class OddText(str):
    def __format__(self, spec: str) -> str:
        raise ZeroDivisionError


class OddWords(Exception):
    def __str__(self) -> str:
        return OddText("odd")


class OddNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise ZeroDivisionError


class LeavingNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        sys.exit("in __notes__")


class Nameless(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__", "__module__"):
            raise ZeroDivisionError
        return super().__getattribute__(name)


class WithoutName(Exception, metaclass=Nameless):
    pass


class WithoutClass(Exception):
    @property
    def __class__(self) -> Any:
        raise ZeroDivisionError("in __class__")


class Untrue(Exception):
    def __bool__(self) -> bool:
        raise ZeroDivisionError


def caused_by(cause: BaseException) -> Exception:
    error = ValueError("last")
    error.__cause__ = cause
    return error


def circle() -> Exception:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


def chain(length: int) -> Exception:
    error = ValueError(0)
    for number in range(1, length + 1):
        later = ValueError(number)
        later.__cause__, error = error, later
    return error


def group(depth: int) -> Exception:
    error: Exception = ValueError("innermost")
    for _ in range(depth):
        error = ExceptionGroup("group", [error])
    return error


def odd_syntax_error() -> Exception:
    error: Any = SyntaxError("odd")
    error.lineno = error.offset = error.text = error.filename = object()
    return error  # type: ignore[no-any-return]


def raising(error: Any) -> Act:
    def act(db: Any, task: Any) -> None:
        raise error

    return act


def endless(db: Any, task: Any) -> None:
    endless(db, task)


def raise_from_nowhere(db: Any, task: Any) -> None:
    code = compile("raise ValueError('elsewhere')", "\ud800", "exec")
    tracer = sys.gettrace()
    sys.settrace(None)  # coverage cannot write such a name
    try:
        exec(code)
    finally:
        sys.settrace(tracer)


ERRORS: dict[str, tuple[Act, str]] = {
    "sys.exit(0)": (lambda db, task: sys.exit(0), "SystemExit: 0"),
    "sys.exit with words": (lambda db, task: sys.exit("words"), "SystemExit: words"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt), "KeyboardInterrupt"),
    "GeneratorExit": (raising(GeneratorExit), "GeneratorExit"),
    "StopIteration": (raising(StopIteration(5)), "StopIteration: 5"),
    "CancelledError": (raising(asyncio.CancelledError), "CancelledError"),
    "BaseException": (raising(BaseException("base")), "BaseException: base"),
    "MemoryError": (raising(MemoryError), "MemoryError"),
    "endless recursion": (endless, "RecursionError: maximum recursion depth exceeded"),
    "what is no exception": (raising("odd"), "TypeError: exceptions must derive from"),
    "no words": (raising(ValueError), "ValueError"),
    "NUL": (raising(ValueError("a\0b")), "ValueError: a\\0b"),
    "half of a surrogate pair": (raising(ValueError("\ud800")), "ValueError: \\ud800"),
    "ten megabytes of words": (raising(ValueError("x" * 10_000_000)), "ValueError: xxx"),
    "a __str__ that raises": (
        raising(WithoutWords()),
        "WithoutWords: (its message cannot be read: ZeroDivisionError)",
    ),
    "a __str__ that ends the program": (
        raising(LeavingWords()),
        "LeavingWords: (its message cannot be read: SystemExit)",
    ),
    "a __str__ that returns odd text": (
        raising(OddWords()),
        "OddWords: (its message cannot be read: ZeroDivisionError)",
    ),
    "notes that raise": (raising(OddNotes("odd")), "OddNotes: odd"),
    "notes that end the program": (raising(LeavingNotes("odd")), "LeavingNotes: odd"),
    "a class without a name": (raising(WithoutName("odd")), "WithoutName: odd"),
    "an object without a class": (raising(WithoutClass()), "ZeroDivisionError: in __class__"),
    "a file whose name is no text": (raise_from_nowhere, "ValueError: elsewhere"),
    "a class with a long name": (raising(type("X" * 1_000_000, (Exception,), {})), "XXX"),
    "a class with an odd name": (raising(type("%s {}\n'", (Exception,), {})), "%s {}\n'"),
    "a syntax error of odd parts": (raising(odd_syntax_error()), "SyntaxError: odd"),
    "causes in a circle": (raising(circle()), "ValueError: first"),
    "5,000 causes": (raising(chain(5_000)), "ValueError: 5000"),
    "a cause that is neither true nor false": (raising(caused_by(Untrue())), "ValueError: last"),
    "a group of a thousand": (
        raising(ExceptionGroup("group", [ValueError()] * 1_000)),
        "ExceptionGroup: group (1000 sub-exceptions)",
    ),
    "5,000 groups within each other": (
        raising(group(5_000)),
        "ExceptionGroup: group (1 sub-exception)",
    ),
}


@pytest.fixture(scope="module")
def errors_ended(end_all: Any) -> dict[str, End]:
    return end_all({name: act for name, (act, _) in ERRORS.items()})


@pytest.mark.parametrize("name", ERRORS)
def test_whatever_is_raised_fails_its_task_and_takes_its_effects_back(
    errors_ended: dict[str, End], name: str
) -> None:
    end = errors_ended[name]
    assert (end.state, end.attempts, end.effects) == ("FAILED", 1, [])
    assert end.error.startswith(ERRORS[name][1])
    assert len(end.error) < outcome.MESSAGE_LENGTH + 100
    [(error, traceback)] = end.events
    assert error == end.error
    assert 0 < len(traceback) < outcome.TRACEBACK_LENGTH + 100


def test_an_exception_that_cannot_be_logged_is_harmless_after_the_end(end_all: Any) -> None:
    def act(db: Any, task: Any) -> None:
        task.state = "DONE"
        db.commit()
        raise WithoutName

    [end] = end_all({"odd": act}).values()
    assert (end.state, len(end.effects)) == ("DONE", 1)


def test_a_cause_that_is_neither_true_nor_false_leaves_the_retry_policy_its_say(
    end_all: Any,
) -> None:
    [end] = end_all({"odd": raising(caused_by(Untrue()))}, attempts=2).values()
    assert (end.state, end.attempts) == ("DONE", 2)


# Processors that have written something, and what they do then: how the task ends, whether what was
# written is kept, and what the error message says.


def sql(statement: str) -> Act:
    def act(db: Any, task: Any) -> None:
        db.execute(sa.text(statement))

    return act


def setting(**columns: Any) -> Act:
    def act(db: Any, task: Any) -> None:
        for name, value in columns.items():
            setattr(task, name, value)

    return act


def in_turn(*acts: Act) -> Act:
    def act(db: Any, task: Any) -> None:
        for each in acts:
            each(db, task)

    return act


def swallowing(act: Act) -> Act:
    def quietly(db: Any, task: Any) -> None:
        with contextlib.suppress(sa.exc.SQLAlchemyError):
            act(db, task)

    return quietly


def in_savepoint(act: Act) -> Act:
    def within(db: Any, task: Any) -> None:
        with db.begin_nested():
            act(db, task)

    return within


def dispose(db: Any, task: Any) -> None:
    POOLS.append(db.get_bind().pool)
    db.get_bind().dispose()


def commit(db: Any, task: Any) -> None:
    db.commit()


def begin_nested(db: Any, task: Any) -> None:
    db.begin_nested()


def delete(db: Any, task: Any) -> None:
    db.delete(task)


def update(change: str) -> Act:
    return sql(f"UPDATE bq_tasks SET {change} WHERE state = 'PROCESSING' AND func_name <> 'after'")


BROKEN = sql("SELECT no_such_column")
LOCK = sql("LOCK TABLE bq_tasks IN ACCESS EXCLUSIVE MODE")
LOST = "ClaimLost: The task is not as it was claimed"
ABORTED = "InternalError: current transaction is aborted"
ROLLED_BACK = "PendingRollbackError: This Session's transaction has been rolled back"

PROCESSORS: dict[str, tuple[Act, str, bool, str]] = {
    # The session.
    "closes it": (lambda db, task: db.close(), "DONE", False, ""),
    "rolls back": (lambda db, task: db.rollback(), "DONE", False, ""),
    "rolls back in SQL": (sql("ROLLBACK"), "DONE", False, ""),
    "commits": (commit, "DONE", True, ""),
    "commits in SQL": (sql("COMMIT"), "DONE", True, ""),
    "commits, and raises": (in_turn(commit, raising(KeyError)), "FAILED", True, "KeyError"),
    "leaves savepoints open": (in_turn(begin_nested, begin_nested), "DONE", True, ""),
    "commits within savepoints": (in_turn(begin_nested, begin_nested, commit), "DONE", True, ""),
    "swallows an error": (swallowing(BROKEN), "FAILED", False, ABORTED),
    "swallows it around a savepoint": (swallowing(in_savepoint(BROKEN)), "DONE", True, ""),
    "swallows an error of a flush": (
        in_turn(setting(channel=None), swallowing(lambda db, task: db.flush())),
        "FAILED",
        False,
        ROLLED_BACK,
    ),
    "leaves what cannot be flushed": (setting(channel=None), "FAILED", False, "null value in"),
    # The connection.
    "ends its own backend": (
        sql("SELECT pg_terminate_backend(pg_backend_pid())"),
        "PENDING",
        False,
        "The database went away (1 of 20 times).",
    ),
    "disposes of the engine": (dispose, "DONE", True, ""),
    "locks the tasks": (LOCK, "DONE", True, ""),
    "locks the tasks, and raises": (in_turn(LOCK, raising(KeyError)), "FAILED", False, "KeyError"),
    "may only read": (sql("SET TRANSACTION READ ONLY"), "FAILED", False, "read-only transaction"),
    "looks for tables elsewhere": (
        sql("SET LOCAL search_path TO nowhere"),
        "FAILED",
        False,
        'relation "bq_tasks" does not exist',
    ),
    "looks elsewhere, too": (sql("SET LOCAL search_path TO nowhere, public"), "DONE", True, ""),
    "hides the tasks": (
        sql("CREATE TEMPORARY TABLE bq_tasks () ON COMMIT DROP"),
        "FAILED",
        False,
        "ProgrammingError: column",
    ),
    # The task.
    "deletes it": (delete, "FAILED", False, LOST),
    "deletes it, and commits": (in_turn(delete, commit), "FAILED", False, LOST),
    "gives it another id": (setting(id=uuid.uuid4()), "FAILED", False, LOST),
    "gives it other claims": (setting(claims=7), "FAILED", False, LOST),
    "parks it": (setting(parked=True), "FAILED", False, LOST),
    "gives it no state": (setting(state="SLEEPING"), "FAILED", False, "ck_bq_tasks_state"),
    "gives it NaN": (setting(kwargs={"a": math.nan}), "FAILED", False, "DataError: invalid input"),
    "gives it too large a number": (setting(crashes=MOST + 1), "FAILED", False, "out of range"),
    "gives it another channel": (setting(channel="other"), "DONE", True, ""),
    "gives it another time": (setting(scheduled_at=NOON), "DONE", True, ""),
    "gives it no worker": (setting(worker_id=None), "DONE", True, ""),
    # The task's row, by raw SQL.
    "DELETE": (sql("DELETE FROM bq_tasks WHERE state = 'PROCESSING'"), "FAILED", False, LOST),
    "state = 'DONE'": (update("state = 'DONE'"), "FAILED", False, LOST),
    "state = 'CANCELLED'": (update("state = 'CANCELLED'"), "FAILED", False, LOST),
    "state = 'PENDING'": (update("state = 'PENDING'"), "FAILED", False, LOST),
    "claims = claims + 1": (update("claims = claims + 1"), "FAILED", False, LOST),
    "claims = 0": (update("claims = 0"), "FAILED", False, LOST),
    "id = gen_random_uuid()": (update("id = gen_random_uuid()"), "FAILED", False, LOST),
    "parked = true": (update("parked = true"), "FAILED", False, LOST),
    "channel = 'other'": (update("channel = 'other'"), "DONE", True, ""),
    "scheduled_at = '2030-01-01'": (update("scheduled_at = '2030-01-01'"), "DONE", True, ""),
    "worker_id = NULL": (update("worker_id = NULL"), "DONE", True, ""),
    "kwargs = '[1]'": (update("kwargs = '[1]'"), "DONE", True, ""),
    "module = ''": (update("module = ''"), "DONE", True, ""),
    "attempts = 2147483647": (update("attempts = 2147483647"), "DONE", True, ""),
    # The process.
    "goes to another folder": (lambda db, task: os.chdir("/"), "DONE", True, ""),
    "handles a signal": (
        lambda db, task: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        "FAILED",
        False,
        "ValueError: signal only works in main thread",
    ),
}


@pytest.fixture(scope="module")
def processors_ended(end_all: Any) -> dict[str, End]:
    with contextlib.chdir("."):  # and back
        return end_all({name: act for name, (act, *_) in PROCESSORS.items()})


@pytest.mark.parametrize("name", PROCESSORS)
def test_whatever_a_processor_does_its_task_ends_and_the_next_one_is_done(
    processors_ended: dict[str, End], name: str
) -> None:
    _, state, kept, words = PROCESSORS[name]
    end = processors_ended[name]
    assert (end.state, len(end.effects)) == (state, int(kept))
    assert words in end.error


def test_a_thread_that_outlives_its_task_commits_nothing(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work
) -> None:
    over = threading.Event()
    raised: list[str] = []
    threads: list[threading.Thread] = []

    @bq.processor()
    def start(db: Any) -> None:
        def late() -> None:
            over.wait(60)
            try:
                db.execute(EFFECT, {"text": "late"})
                db.commit()
            except Exception as error:
                raised.append(type(error).__name__)
            finally:
                db.close()

        threads.append(threading.Thread(target=contextvars.copy_context().run, args=(late,)))
        threads[0].start()

    with app.app_context():
        start.enqueue()
        db.session.commit()
    work()
    over.set()
    threads[0].join(60)
    assert raised == ["ClaimLost"]
    assert texts(app, db, Note) == []


# Errors of the database: with a retry policy the task ends right at the next attempt, without one
# it is FAILED. What an attempt that failed has written is not there.

REFUSE = "RAISE EXCEPTION 'refused with %', right(NEW.text, 5) USING ERRCODE = right(NEW.text, 5)"
RULES = trigger(
    "refuse", "BEFORE INSERT ON note", REFUSE, condition="NEW.text LIKE 'at once _____'"
) + trigger(
    "refuse_late",
    "AFTER INSERT ON note",
    REFUSE,
    condition="NEW.text LIKE 'at commit _____'",
    deferred=True,
)


def refused(text: str) -> tuple[Act, str]:
    """What a trigger refuses."""
    act = in_turn(sql(RULES), lambda db, task: db.execute(EFFECT, {"text": text}))
    return act, f"refused with {text[-5:]}"


def wait_for_lock(db: Any, task: Any) -> None:
    with db.get_bind().connect() as other:
        other.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
        db.execute(sa.text("SET LOCAL lock_timeout TO '10ms'"))
        db.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))


def be_overtaken(db: Any, task: Any) -> None:
    """Read what another transaction then changes."""
    db.rollback()
    db.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    db.execute(EFFECT, {"text": "never"})
    with db.get_bind().begin() as other:
        other.execute(sa.text("UPDATE bq_workers SET name = 'other'"))
    db.execute(sa.text("UPDATE bq_workers SET name = 'mine'"))


DATABASE_ERRORS: dict[str, tuple[Act, str]] = {
    "a lock timeout": (wait_for_lock, "canceling statement due to lock timeout"),
    "a statement timeout": (
        in_turn(sql("SET LOCAL statement_timeout TO '10ms'"), sql("SELECT pg_sleep(60)")),
        "canceling statement due to statement timeout",
    ),
    "a read-only transaction": (
        in_turn(sql("SET TRANSACTION READ ONLY"), sql("INSERT INTO note (text) VALUES ('never')")),
        "cannot execute INSERT in a read-only transaction",
    ),
    "a serialization failure": (be_overtaken, "could not serialize access due to concurrent"),
    "a rule that is checked at commit": (
        in_turn(
            sql("CREATE TABLE one (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)"),
            sql("INSERT INTO one VALUES (1), (1)"),
        ),
        "IntegrityError: duplicate key value violates unique constraint",
    ),
    "a division by zero": (sql("SELECT 1 / 0"), "DataError: division by zero"),
    "a table that there is not": (sql("TABLE nowhere"), 'relation "nowhere" does not exist'),
    "unique violation, at once": refused("at once 23505"),
    "unique violation, at commit": refused("at commit 23505"),
    "serialization failure, at once": refused("at once 40001"),
    "serialization failure, at commit": refused("at commit 40001"),
    "deadlock detected": refused("at once 40P01"),
    "insufficient privilege": refused("at once 42501"),
    "disk full, at once": refused("at once 53100"),
    "disk full, at commit": refused("at commit 53100"),
    "out of memory": refused("at once 53200"),
    "program limit exceeded": refused("at once 54000"),
    "lock not available": refused("at once 55P03"),
    "I/O error": refused("at once 58030"),
    "raised by a trigger": refused("at once P0001"),
    "data corrupted": refused("at once XX001"),
}


@pytest.fixture(scope="module")
def database_errors_ended(end_all: Any) -> Callable[[int], dict[str, End]]:
    acts = {name: act for name, (act, _) in DATABASE_ERRORS.items()}
    return {attempts: end_all(acts, attempts) for attempts in (1, 2)}.__getitem__


@pytest.mark.parametrize("name", DATABASE_ERRORS)
def test_an_error_of_the_database_fails_a_task_without_a_retry_policy(
    database_errors_ended: Callable[[int], dict[str, End]], name: str
) -> None:
    end = database_errors_ended(1)[name]
    assert (end.state, end.attempts, end.effects) == ("FAILED", 1, [])
    assert DATABASE_ERRORS[name][1] in end.error


@pytest.mark.parametrize("name", DATABASE_ERRORS)
def test_an_error_of_the_database_takes_the_retry_policy(
    database_errors_ended: Callable[[int], dict[str, End]], name: str
) -> None:
    end = database_errors_ended(2)[name]
    assert (end.state, end.attempts, len(end.effects), end.error) == ("DONE", 2, 1, "")
    [(error, _)] = end.events
    assert DATABASE_ERRORS[name][1] in error


@pytest.mark.parametrize("attempts", [1, 2])
def test_of_two_tasks_in_a_deadlock_one_goes_on(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    database_url: str,
    attempts: int,
) -> None:
    both = threading.Barrier(2)

    @bq.processor(retry_policy=LimitAttempt(attempts))
    def lock(db: Any, task: Any, first: int, second: int) -> None:
        db.execute(EFFECT, {"text": "locked"})
        db.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": first})
        if task.attempts == 0:
            both.wait(60)
        db.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": second})

    with app.app_context():
        lock.enqueue_many([{"first": 1, "second": 2}, {"first": 2, "second": 1}])
        db.session.commit()
    work(concurrency=2)
    ends = query(database_url, "SELECT state, attempts, error_message FROM bq_tasks ORDER BY 1, 2")
    if attempts == 1:
        assert [state for state, *_ in ends] == ["DONE", "FAILED"]
        assert "deadlock detected" in ends[1][2]
    else:
        assert ends == [("DONE", 1, None), ("DONE", 2, None)]
    assert texts(app, db, Note) == ["locked"] * attempts


def test_a_connection_that_was_idle_for_too_long_is_lost_and_no_failure(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    work: Work,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcome, "INTERRUPTION_DELAY", 0.0)

    @bq.processor()
    def think(db: Any, task: Any) -> None:
        db.add(Note(text="thought"))
        db.flush()
        if task.interruptions == 0:
            db.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout TO '10ms'"))
            connection = db.connection().connection.dbapi_connection
            assert select.select([connection.fileno()], [], [], 60)[0]  # the server hangs up

    with app.app_context():
        think.enqueue()
        db.session.commit()
    work()
    found = query(database_url, "SELECT state, attempts, interruptions FROM bq_tasks")
    assert found == [("DONE", 1, 1)]
    assert texts(app, db, Note) == ["thought"]


@pytest.fixture
def small_disk(database_url: str) -> Iterator[None]:
    """A tablespace that is called ``small`` and has room for four megabytes."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="small-disk-", dir="/tmp"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    with contextlib.ExitStack() as clean_up:
        clean_up.callback(folder.rmdir)
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("Only root makes a disk.")
        clean_up.callback(subprocess.run, ["umount", str(folder)], check=True)
        try:
            [(data,)] = query(database_url, "SHOW data_directory")
            os.chown(folder, os.stat(data).st_uid, os.stat(data).st_gid)
            query(database_url, f"CREATE TABLESPACE small LOCATION '{folder}'")
        except (psycopg2.Error, OSError) as error:
            pytest.skip(f"The server cannot use it: {error}")
        clean_up.callback(query, database_url, "DROP TABLESPACE small")
        query(database_url, "CREATE TABLE big (text text) TABLESPACE small")
        clean_up.callback(query, database_url, "DROP TABLE big")
        yield


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_takes_the_retry_policy(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    @bq.processor(retry_policy=LimitAttempt(2))
    def write(db: Any, task: Any, twice: bool) -> None:
        db.add(Note(text="written"))
        if twice or task.attempts == 0:
            db.execute(
                sa.text(
                    "INSERT INTO big SELECT string_agg(md5(n::text), '')"
                    " FROM generate_series(1, 300000) AS n"
                )
            )

    with app.app_context():
        write.enqueue_many([{"twice": True}, {"twice": False}])
        db.session.commit()
    work(concurrency=1)
    failed, done = query(
        database_url, "SELECT state, attempts, error_message FROM bq_tasks ORDER BY id"
    )
    assert failed[:2] == ("FAILED", 2)
    assert "No space left on device" in failed[2]
    assert done == ("DONE", 2, None)
    assert texts(app, db, Note) == ["written"]


# What a task leaves behind in its connection, and whether the next one on it finds that.

LEFT_BEHIND = {
    "SET LOCAL": ("SET LOCAL search_path TO nowhere, public", False),
    "SET TRANSACTION": ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", False),
    "an open savepoint": ("SAVEPOINT mine", False),
    "a lock of the transaction": ("SELECT pg_advisory_xact_lock(1)", False),
    "a table until the commit": ("CREATE TEMPORARY TABLE mine () ON COMMIT DROP", False),
    "SET": ("SET statement_timeout TO '1h'", True),
    "SET SESSION": ("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE, DEFERRABLE", True),
    "a lock of the session": ("SELECT pg_advisory_lock(1)", True),
    "a table of the session": ("CREATE TEMPORARY TABLE mine ()", True),
}

CONNECTION = sa.text("""
    SELECT current_setting('search_path'), current_setting('statement_timeout'),
        current_setting('transaction_isolation'), current_setting('transaction_deferrable'),
        (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'),
        (SELECT count(*) FROM pg_class WHERE relpersistence = 't')
""")


@pytest.fixture
def see(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue) -> Callable[..., list[Any]]:
    """Do acts, each in a task, and tell how the connection was before, between, and after."""

    def see(*acts: Act) -> list[Any]:
        # The connection that was used last is the next to be used.
        app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS={"pool_use_lifo": True})
        seen: list[Any] = []

        @bq.processor()
        def look(db: Any) -> None:
            seen.append(db.execute(CONNECTION).one())

        @bq.processor()
        def leave(db: Any, task: Any, number: int) -> None:
            acts[number](db, task)

        with app.app_context():
            look.enqueue()
            for number in range(len(acts)):
                leave.enqueue(number=number)
                look.enqueue()
            db.session.commit()
        bq.process_tasks(app=app, burst=True, concurrency=1)
        return seen

    return see


@pytest.mark.parametrize(("statement", "stays"), LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_what_a_task_leaves_behind_ends_with_its_transaction_or_its_connection(
    see: Callable[..., list[Any]], statement: str, stays: bool
) -> None:
    before, after_failure, after_success = see(
        in_turn(sql(statement), raising(KeyError)), sql(statement)
    )
    # A rollback takes everything back, but for a lock of the session.
    assert (before != after_failure) is (statement == "SELECT pg_advisory_lock(1)")
    assert (before != after_success) is stays


def test_an_isolation_level_of_one_task_is_not_the_next_ones(
    see: Callable[..., list[Any]],
) -> None:
    def isolated(level: str) -> Act:
        return lambda db, task: db.connection(execution_options={"isolation_level": level})

    seen = see(isolated("AUTOCOMMIT"), isolated("SERIALIZABLE"))
    assert seen[0] == seen[1] == seen[2]


def test_what_a_task_leaves_behind_does_not_reach_the_queues_own_connections(
    app: Flask, bq: BeanQueue, probe: Probe, database_url: str
) -> None:
    """A worker connects anew when the database is in trouble, and finds its tables all the same."""
    probe.listen_states()
    query(
        database_url,
        "CREATE SEQUENCE claims;"
        + trigger(
            "trouble",
            "BEFORE UPDATE ON bq_tasks",
            "IF nextval('claims') < 4 THEN RAISE 'disk full' USING ERRCODE = '53100'; END IF",
            condition="NEW.func_name = 'odd' AND NEW.state = 'PROCESSING'",
        ),
    )

    @bq.processor()
    def leave(db: Any) -> None:
        db.execute(sa.text("SET search_path TO nowhere"))
        db.execute(sa.text("COMMIT"))
        raise KeyError

    @bq.processor()
    def odd() -> None:
        pass

    with running(app, bq, concurrency=1):
        for name, state in (("leave", "FAILED"), ("odd", "DONE")):
            insert(database_url, func_name=name)
            query(database_url, 'NOTIFY "default"')
            probe.wait(f"{name} {state}")


# Any value, any words.

NUMBERS = st.integers() | st.integers(4_000, 5_000).map(lambda digits: 10**digits) | st.floats()
TEXT = st.text() | st.text(st.sampled_from("a\0\\\"'u0{}%:\ud800\udfff\uffff\U0010ffff"))
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from([98, 101, 150]).map(nested),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Whether a value came back. JSONB has one kind of number: 1e16 comes back as a whole one."""
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, float):
        return type(other) in (int, float) and one == float(other)
    return type(one) is type(other) and bool(one == other)


def bad(value: Any, depth: int = 1) -> bool:
    """Whether a value cannot be stored."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, int):
        return abs(value) >= 10**4_300
    if isinstance(value, (list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 100 or any(bad(part, depth + 1) for part in parts)
    return False


def test_an_argument_is_refused_by_name_or_reaches_the_processor(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen: list[Any] = []

    @bq.processor()
    def look(value: Any) -> None:
        seen.append(value)

    refused = pytest.raises(ArgumentError, match="the argument 'value' cannot be stored as JSON")

    @settings(max_examples=12)
    @given(values=st.lists(VALUES, min_size=10, max_size=30))
    @example(values=["\0", "\ud800", float("nan"), float("-inf"), 10**4_300, 1e23, -0.0, 5e-324])
    @example(values=[{"\0": 1}, {"\ud800": 1}, "\\u0000", "\\ud800", 10**4_299, 1e308, nested(99)])
    @example(values=[nested(100)])
    def check(values: list[Any]) -> None:
        seen.clear()
        taken = []
        with app.app_context():
            for value in values:
                for enqueue in (look.enqueue, lambda value: look.enqueue_many([{"value": value}])):
                    with refused if bad({"value": value}) else contextlib.nullcontext():
                        enqueue(value=value)
                        taken.append(value)
                db.session.flush()
            db.session.commit()
        work(concurrency=1)
        assert same(taken, seen)

    check()


def test_a_result_is_stored_or_the_task_is_done_without(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    values: list[Any] = []

    @bq.processor()
    def answer(db: Any, number: int) -> Any:
        if number % 2:
            db.execute(sa.text("SELECT 1"))
        return values[number]

    @settings(max_examples=12)
    @given(results=st.lists(VALUES, min_size=10, max_size=30))
    def check(results: list[Any]) -> None:
        values[:] = results
        caplog.clear()
        with app.app_context():
            answer.enqueue_many({"number": number} for number in range(len(results)))
            db.session.commit()
            work(concurrency=1)
            tasks = db.session.scalars(sa.select(bq.Task).order_by(bq.Task.id)).all()
            for task, result in zip(tasks, results, strict=True):
                assert (task.state, task.attempts) == ("DONE", 1)
                assert same(None if bad(result) else result, task.result)
                assert (f"{task.id} is not stored: " in caplog.text) is bad(result)
            db.session.execute(sa.delete(bq.Task))
            db.session.commit()

    check()


def test_an_error_is_stored_whatever_it_says(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    words: list[str] = []

    @bq.processor()
    def fail(db: Any, number: int) -> None:
        if number % 2:
            db.execute(sa.text("SELECT 1"))
        raise ValueError(words[number]) from LookupError(words[number])

    @settings(max_examples=12)
    @given(messages=st.lists(TEXT, min_size=10, max_size=20), times=st.integers(1, 20_000))
    @example(messages=["", "\0", "\ud800", "\\", "é", "\udfff\uffff\U0010ffff"], times=60_000)
    def check(messages: list[str], times: int) -> None:
        words[:] = [*messages, *(message * times for message in messages)]
        with app.app_context():
            fail.enqueue_many({"number": number} for number in range(len(words)))
            db.session.commit()
            work(concurrency=1)
            tasks = db.session.scalars(sa.select(bq.Task).order_by(bq.Task.id)).all()
            for task, message in zip(tasks, words, strict=True):
                assert (task.state, task.attempts) == ("FAILED", 1)
                assert task.error_message.startswith("ValueError")
                assert len(task.error_message) < outcome.MESSAGE_LENGTH + 100
                if 0 < len(message) < 1_000 and not bad(message):
                    assert task.error_message == f"ValueError: {message}"
                [event] = task.events
                assert (event.type, event.error_message) == ("FAILED", task.error_message)
                assert 0 < len(event.traceback) < outcome.TRACEBACK_LENGTH + 100
            db.session.execute(sa.delete(bq.Task))
            db.session.commit()

    check()
