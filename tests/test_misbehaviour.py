"""Processors that misuse their session, connection, task or process, or whose database refuses.

There is a table for each: what is done, in words, and how the task ends. Elsewhere are processors
that fork, or stop or kill their worker (test_faults), receivers of signals that raise
(test_signals), and outcomes that a rule of the app's own refuses (test_worker, test_take_over).
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import datetime
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt, WorkerDied
from flask_beanqueue.engine import outcome
from flask_beanqueue.engine.heartbeat import Heartbeat

from .conftest import MakeApp, running, texts
from .probe import Probe, query
from .stage import EFFECT, Act, End, raising
from .triggers import trigger
from .values import MOST

Work = Callable[..., None]

NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)

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
    db.get_bind().dispose()


def commit(db: Any, task: Any) -> None:
    db.commit()


def begin_nested(db: Any, task: Any) -> None:
    db.begin_nested()


def delete(db: Any, task: Any) -> None:
    db.delete(task)


def update(change: str) -> Act:
    """Changes its own task past the ORM, and none of those that were claimed with it."""

    def act(db: Any, task: Any) -> None:
        db.execute(sa.text(f"UPDATE bq_tasks SET {change} WHERE id = :id"), {"id": task.id})

    return act


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
        "The database was in trouble (1 of 20 times).",
    ),
    "disposes of the engine": (dispose, "DONE", True, ""),
    "locks the tasks": (LOCK, "DONE", True, ""),
    "locks the tasks, and raises": (in_turn(LOCK, raising(KeyError)), "FAILED", False, "KeyError"),
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
    "gives it NaN": (setting(kwargs={"a": math.nan}), "FAILED", False, "DataError: invalid text"),
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
def processors_ended(end_all: Callable[..., dict[str, End]]) -> dict[str, End]:
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


def raise_in(thread: int, error: type[BaseException]) -> None:
    """What stopit and func_timeout do when a time is over."""
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error)
    )
    assert raised == 1


@pytest.mark.skipif(
    sys.gettrace() is not None and sys.version_info < (3, 12),
    reason="While it waits to be raised, CPython 3.11 runs no function that is traced.",
)
def test_a_timeout_that_comes_when_its_task_has_ended_harms_no_other(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    database_url: str,
    probe: Probe,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is raised as soon as the thread has its next claim."""
    threads: list[int] = []

    @bq.processor()
    def work(number: int) -> None:
        threads.append(threading.get_ident())

    probe.listen_states()
    with app.app_context(), running(app, bq, concurrency=1):
        for number in range(3):
            work.enqueue(number=number)
            db.session.commit()
            probe.wait("work DONE")
            raise_in(threads[-1], TimeoutError)
        work.enqueue_many([{"number": 3}, {"number": 4}])
        db.session.commit()
        done = "SELECT count(*) FROM bq_tasks WHERE state = 'DONE'"
        probe.wait_until(lambda: query(database_url, done) == [(5,)])
        tasks = db.session.execute(sa.select(bq.Task.state, bq.Task.attempts)).all()
        assert set(tasks) == {("DONE", 1)}
    assert len(threads) == 5
    assert len(set(threads)) == 1
    assert caplog.text.count("goes on after what was raised between its tasks") == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_loses_a_thread_leaves_to_be_replaced(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would hold for ever what the thread had taken."""

    @bq.processor()
    def work() -> None:
        raise AssertionError

    def exit(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr("flask_beanqueue.engine.attempt.Executor.execute", exit)
    monkeypatch.setattr("flask_beanqueue.engine.threads.failed", exit)
    app = make_app(db, bq, BQ_SHUTDOWN_TIMEOUT=0.0)
    with app.app_context():
        work.enqueue()
        db.session.commit()
    with pytest.raises(WorkerDied, match="has lost a thread that runs tasks"):
        bq.process_tasks(app=app)
    assert query(database_url, "SELECT state, attempts FROM bq_tasks") == [("PENDING", 0)]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_has_lost_its_heartbeat_is_gone_before_others_take_it_for_dead(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not wait for its tasks: others would count them as crashed, and do them beside it."""
    begun, over = threading.Event(), threading.Event()

    @bq.processor()
    def work() -> None:
        begun.set()
        over.wait(60)

    beat = Heartbeat.beat

    def beat_until_it_runs(self: Heartbeat) -> bool:
        if begun.is_set():
            raise SystemExit
        return beat(self)

    monkeypatch.setattr(Heartbeat, "beat", beat_until_it_runs)
    config = {"WORKER_HEARTBEAT_PERIOD": 0.1, "WORKER_HEARTBEAT_TIMEOUT": 2, "SHUTDOWN_TIMEOUT": 60}
    app = make_app(db, bq, **{f"BQ_{name}": value for name, value in config.items()})
    with app.app_context():
        work.enqueue()
        db.session.commit()
    with pytest.raises(WorkerDied, match="has lost the thread that sends its heartbeats"):
        bq.process_tasks(app=app)
    states = query(database_url, "SELECT state, attempts, crashes FROM bq_tasks")
    over.set()
    assert states == [("PENDING", 0, 0)]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]


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
    "deadlock detected": refused("at once 40P01"),
    "insufficient privilege": refused("at once 42501"),
    "program limit exceeded": refused("at once 54000"),
    "lock not available": refused("at once 55P03"),
    "raised by a trigger": refused("at once P0001"),
    "data corrupted": refused("at once XX001"),
}


#: What is passing trouble of the whole database, and no fault of the task.
TROUBLE: dict[str, tuple[Act, str]] = {
    "serialization failure, at commit": refused("at commit 40001"),
    "deadlock detected, at commit": refused("at commit 40P01"),
    "program limit exceeded, at commit": refused("at commit 54000"),
    "disk full, at once": refused("at once 53100"),
    "disk full, at commit": refused("at commit 53100"),
    "out of memory": refused("at once 53200"),
    "cannot connect now": refused("at once 57P03"),
    "I/O error": refused("at once 58030"),
}


@pytest.fixture(scope="module")
def trouble_ended(end_all: Callable[..., dict[str, End]]) -> dict[str, End]:
    return end_all({name: act for name, (act, _) in TROUBLE.items()})


@pytest.mark.parametrize("name", TROUBLE)
def test_passing_trouble_of_the_database_interrupts_a_task(
    trouble_ended: dict[str, End], name: str
) -> None:
    end = trouble_ended[name]
    assert end.state in ("PENDING", "DONE")  # it may have been due again meanwhile
    assert len(end.effects) == end.attempts == (end.state == "DONE")
    [(error, _)] = end.events
    assert TROUBLE[name][1] in error


@pytest.fixture(scope="module")
def database_errors_ended(
    end_all: Callable[..., dict[str, End]],
) -> Callable[[int], dict[str, End]]:
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
def test_a_full_disk_interrupts_a_task(
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
    def write(db: Any, task: Any) -> None:
        db.add(Note(text="written"))
        if task.interruptions < 2:
            db.execute(
                sa.text(
                    "INSERT INTO big SELECT string_agg(md5(n::text), '')"
                    " FROM generate_series(1, 300000) AS n"
                )
            )

    with app.app_context():
        write.enqueue()
        db.session.commit()
    work()
    found = query(database_url, "SELECT state, attempts, interruptions FROM bq_tasks")
    assert found == [("DONE", 1, 2)]
    [first, _] = query(database_url, "SELECT type, error_message FROM bq_events")
    assert first[0] == "INTERRUPTED"
    assert "No space left on device" in first[1]
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
            insert = "INSERT INTO bq_tasks (module, func_name) VALUES (%s, %s)"
            query(database_url, insert, __name__, name)
            query(database_url, 'NOTIFY "default"')
            probe.wait(f"{name} {state}")
