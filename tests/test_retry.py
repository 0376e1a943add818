"""Retry policies: their arithmetic, and what a worker does with their answers."""

from __future__ import annotations

import datetime
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import given
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue, DelayRetry, ExponentialBackoffRetry, LimitAttempt
from flask_beanqueue.engine import outcome

from .probe import query

Work = Callable[..., None]

SECOND = datetime.timedelta(seconds=1)
HOUR = datetime.timedelta(hours=1)


def after(attempts: int) -> Any:
    """A task that has failed so often."""
    return types.SimpleNamespace(attempts=attempts)


# Arithmetic.


@given(attempts=st.integers(1, 10**9), delay=st.timedeltas(min_value=datetime.timedelta(0)))
def test_a_delay_is_always_the_same(attempts: int, delay: datetime.timedelta) -> None:
    assert DelayRetry(delay)(after(attempts)) == delay


@pytest.mark.parametrize(("attempts", "seconds"), [(1, 1), (2, 2), (3, 4), (10, 512), (13, 3600)])
def test_a_backoff_doubles_up_to_its_maximum(attempts: int, seconds: float) -> None:
    policy = ExponentialBackoffRetry(jitter=0)
    assert policy(after(attempts)).total_seconds() == seconds


def test_a_backoff_has_the_base_factor_and_maximum_that_it_is_given() -> None:
    policy = ExponentialBackoffRetry(2 * SECOND, factor=10, maximum=HOUR, jitter=0)
    delays = [policy(after(attempts)).total_seconds() for attempts in (1, 2, 3, 4, 5)]
    assert delays == [2, 20, 200, 2000, 3600]


@given(
    attempts=st.integers(1, 10**9),
    base=st.timedeltas(datetime.timedelta(0), HOUR),
    factor=st.floats(1, 1e300),
    maximum=st.timedeltas(HOUR),
    jitter=st.floats(0, 1),
)
def test_a_backoff_keeps_its_bounds(
    attempts: int,
    base: datetime.timedelta,
    factor: float,
    maximum: datetime.timedelta,
    jitter: float,
) -> None:
    policy = ExponentialBackoffRetry(base, factor=factor, maximum=maximum, jitter=jitter)
    sure = ExponentialBackoffRetry(base, factor=factor, maximum=maximum, jitter=0)
    most = sure(after(attempts))
    rounding = datetime.timedelta(seconds=most.total_seconds() * 1e-9, microseconds=1)
    assert min(base, maximum) - rounding <= most <= maximum + rounding
    assert most * (1 - jitter) - rounding <= policy(after(attempts)) <= most + rounding


def test_what_failed_together_does_not_come_back_together() -> None:
    policy = ExponentialBackoffRetry(HOUR)
    delays = [policy(after(1)) for _ in range(1_000)]
    assert len(set(delays)) > 900
    assert min(delays) < 0.6 * HOUR
    assert max(delays) > 0.9 * HOUR


@pytest.mark.parametrize(
    "attempts", [1024, 1025, 10**9, 10**400], ids=["1024", "1025", "10**9", "10**400"]
)
def test_a_backoff_survives_any_number_of_attempts(attempts: int) -> None:
    assert ExponentialBackoffRetry(jitter=0)(after(attempts)) == HOUR


@given(attempts=st.integers(1, 100), maximum=st.integers(1, 100))
def test_a_limit_counts_the_first_attempt(attempts: int, maximum: int) -> None:
    verdict = LimitAttempt(maximum)(after(attempts))
    assert verdict == (datetime.timedelta(0) if attempts < maximum else None)


def test_a_limit_asks_the_policy_that_it_is_given() -> None:
    policy = LimitAttempt(3, DelayRetry(HOUR))
    assert [policy(after(attempts)) for attempts in (1, 2, 3, 4)] == [HOUR, HOUR, None, None]


# What makes no sense is refused.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DelayRetry(5), TypeError, "delay must be a datetime.timedelta, not 5"),
        (lambda: DelayRetry(-SECOND), ValueError, "delay must not be negative"),
        (lambda: ExponentialBackoffRetry(-SECOND), ValueError, "base must not be negative"),
        (
            lambda: ExponentialBackoffRetry(HOUR, maximum=SECOND),
            ValueError,
            "must not be less than base",
        ),
        (lambda: ExponentialBackoffRetry(5), TypeError, "base must be a datetime.timedelta"),
        (
            lambda: ExponentialBackoffRetry(maximum=5),
            TypeError,
            "maximum must be a datetime.timedelta",
        ),
        (lambda: ExponentialBackoffRetry(factor=0.5), ValueError, "factor must be 1 or more"),
        (lambda: ExponentialBackoffRetry(factor=math.nan), ValueError, "factor must be 1 or more"),
        (
            lambda: ExponentialBackoffRetry(factor=math.inf),
            ValueError,
            "factor must be 1 or more, and finite, not inf",
        ),
        (
            lambda: ExponentialBackoffRetry(factor="2"),
            TypeError,
            "factor must be a number, not '2'",
        ),
        (
            lambda: ExponentialBackoffRetry(factor=True),
            TypeError,
            "factor must be a number, not Tr",
        ),
        (lambda: ExponentialBackoffRetry(jitter=None), TypeError, "jitter must be a number, not N"),
        (lambda: ExponentialBackoffRetry(jitter=math.nan), ValueError, "jitter must be .* not nan"),
        (lambda: ExponentialBackoffRetry(jitter=1.1), ValueError, "jitter must be between 0 and 1"),
        (lambda: ExponentialBackoffRetry(jitter=-1), ValueError, "jitter must be between 0 and 1"),
        (lambda: LimitAttempt(0), ValueError, "maximum_attempt must be 1 or more, not 0"),
        (lambda: LimitAttempt(True), TypeError, "maximum_attempt must be a whole number, not True"),
        (lambda: LimitAttempt(2.0), TypeError, "maximum_attempt must be a whole number, not 2.0"),
        (lambda: LimitAttempt(DelayRetry(HOUR)), TypeError, "maximum_attempt must be a whole"),
        (lambda: LimitAttempt(3, HOUR), TypeError, "retry_policy must be callable"),
        (lambda: LimitAttempt(3, DelayRetry), TypeError, "is the class DelayRetry; make one"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


# In a worker.


@pytest.fixture
def fail_with(app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work) -> Any:
    """Runs a task that raises, with a retry policy, and returns its row."""

    def fail_with(error: BaseException, **options: Any) -> Any:
        @bq.processor(**options)
        def fail() -> None:
            raise error

        with app.app_context():
            fail.enqueue()
            db.session.commit()
        work()
        with app.app_context():
            return db.session.scalars(
                sa.select(bq.Task).options(sa.orm.selectinload(bq.Task.events))
            ).one()

    return fail_with


def event_types(task: Any) -> list[str]:
    return [event.type for event in task.events]


def test_a_task_is_retried_until_its_limit(fail_with: Any) -> None:
    task = fail_with(ValueError("no good"), retry_policy=LimitAttempt(3))
    assert (task.state, task.attempts, task.claims) == ("FAILED", 3, 3)
    assert task.error_message == "ValueError: no good"
    assert event_types(task) == ["RETRIED", "RETRIED", "FAILED"]
    for event in task.events:
        assert event.error_message == "ValueError: no good"
        assert "in fail\n    raise error\n" in event.traceback
    retried, _, failed = task.events
    assert retried.scheduled_at is not None
    assert failed.scheduled_at is None


def test_a_task_that_succeeds_in_the_end_is_done(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    @bq.processor(retry_policy=LimitAttempt(5))
    def waver(db: Any, task: Any) -> int:
        db.add(Note(text=f"attempt {task.attempts}"))
        db.flush()
        if task.attempts < 2:
            raise ValueError
        return int(task.attempts)

    with app.app_context():
        waver.enqueue()
        db.session.commit()
    work()
    [row] = query(database_url, "SELECT state, attempts, result, error_message FROM bq_tasks")
    assert row == ("DONE", 3, 2, None)
    assert query(database_url, "SELECT text FROM note") == [("attempt 2",)]


def test_a_delay_counts_by_the_databases_clock(
    fail_with: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = fail_with(ValueError(), retry_policy=DelayRetry(HOUR))
    assert (task.state, task.attempts) == ("PENDING", 1)
    [row] = query(
        database_url,
        "SELECT scheduled_at > now() + interval '59 minutes', scheduled_at < now() + interval"
        " '1 hour', worker_id FROM bq_tasks",
    )
    assert row == (True, True, None)
    assert task.events[0].scheduled_at == task.scheduled_at


def test_without_a_policy_a_task_fails_at_once(fail_with: Any) -> None:
    task = fail_with(ValueError())
    assert (task.state, task.attempts, event_types(task)) == ("FAILED", 1, ["FAILED"])


@pytest.mark.parametrize(
    ("exceptions", "attempts"),
    [
        (OSError, 1),
        (ValueError, 2),
        (Exception, 2),
        ((OSError, ValueError), 2),
        ((OSError, KeyError), 1),
        ((), 1),
        (None, 2),
    ],
)
def test_retry_exceptions_decide_whether_the_policy_is_asked(
    fail_with: Any, exceptions: Any, attempts: int
) -> None:
    task = fail_with(ValueError(), retry_policy=LimitAttempt(2), retry_exceptions=exceptions)
    assert (task.state, task.attempts) == ("FAILED", attempts)


def test_a_policy_is_asked_about_the_task_as_it_is_after_the_attempt(fail_with: Any) -> None:
    seen = []

    def policy(task: Any) -> datetime.timedelta | None:
        columns = sa.inspect(type(task)).columns.keys()
        seen.append({name: getattr(task, name) for name in columns})
        return datetime.timedelta(0) if task.attempts < 2 else None

    task = fail_with(ValueError(), retry_policy=policy)
    assert [each["attempts"] for each in seen] == [1, 2]
    assert {each["func_name"] for each in seen} == {"fail"}
    assert {each["created_at"] for each in seen} == {task.created_at}
    assert (task.state, task.attempts) == ("FAILED", 2)


def test_a_policy_is_asked_about_the_processors_own_task_as_it_is_after_the_attempt(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []

    def policy(task: Any) -> None:
        seen.append((task.attempts, task.priority, task.claims, task.created_at is not None))

    @bq.processor(retry_policy=policy)
    def fail(db: Any, task: Any) -> None:
        task.priority = 3
        db.flush()
        raise ValueError

    with app.app_context():
        fail.enqueue()
        db.session.commit()
    work()
    assert seen == [(1, 0, 1, True)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("offset", [2 * HOUR, -SECOND, SECOND / 1000], ids=str)
def test_a_policy_may_answer_a_time(fail_with: Any, offset: datetime.timedelta) -> None:
    noon = datetime.datetime(2100, 1, 1, 12, tzinfo=datetime.timezone(offset))
    task = fail_with(ValueError(), retry_policy=lambda task: noon)
    assert (task.state, task.scheduled_at) == ("PENDING", noon)
    assert event_types(task) == ["RETRIED"]


@pytest.mark.parametrize(
    "verdict", [-HOUR, datetime.timedelta.min, datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)]
)
def test_a_time_that_has_passed_is_now(fail_with: Any, verdict: Any) -> None:
    task = fail_with(ValueError(), retry_policy=lambda task: verdict if task.attempts < 2 else None)
    assert (task.state, task.attempts) == ("FAILED", 2)


def test_a_delay_that_never_ends_can_be_stored(fail_with: Any) -> None:
    task = fail_with(ValueError(), retry_policy=lambda task: datetime.timedelta.max)
    assert task.state == "PENDING"
    assert task.scheduled_at.year >= 2100


# A policy may answer SQL, for the database to say when.


@pytest.mark.parametrize(
    "expression",
    [
        sa.func.now() + HOUR,
        sa.func.clock_timestamp() + HOUR,
        sa.text("now() + interval '1 hour'"),
        sa.cast("1 hour", sa.Interval),
        sa.func.make_interval(0, 0, 0, 0, 1),
        sa.select(sa.func.now() + HOUR).scalar_subquery(),
        sa.case((sa.true(), sa.func.now() + HOUR), else_=None),
    ],
    ids=str,
)
@pytest.mark.parametrize("limited", [False, True])
def test_a_policy_may_answer_sql(
    fail_with: Any, database_url: str, expression: Any, limited: bool
) -> None:
    def policy(task: Any) -> Any:
        return expression

    task = fail_with(ValueError(), retry_policy=LimitAttempt(2, policy) if limited else policy)
    assert (task.state, task.attempts, task.error_message) == ("PENDING", 1, "ValueError")
    sql = (
        "SELECT scheduled_at - now() BETWEEN interval '59 minutes' AND interval '1 hour'"
        " FROM bq_tasks"
    )
    assert query(database_url, sql) == [(True,)]
    assert event_types(task) == ["RETRIED"]
    assert task.events[0].scheduled_at == task.scheduled_at


@pytest.mark.parametrize(
    "expression", [sa.null(), sa.cast(sa.null(), sa.DateTime(timezone=True))], ids=str
)
def test_a_null_is_never(fail_with: Any, expression: Any) -> None:
    task = fail_with(ValueError("no good"), retry_policy=lambda task: expression)
    assert (task.state, task.error_message) == ("FAILED", "ValueError: no good")


@pytest.mark.parametrize("expression", [sa.func.now() - HOUR, sa.literal(-HOUR)], ids=str)
def test_a_time_of_sql_that_has_passed_is_now(fail_with: Any, expression: Any) -> None:
    task = fail_with(ValueError(), retry_policy=LimitAttempt(2, lambda task: expression))
    assert (task.state, task.attempts) == ("FAILED", 2)


def test_an_expression_may_use_the_columns_of_its_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    @bq.processor(channel="a", retry_policy=lambda task: bq.Task.created_at + HOUR)
    def fail() -> None:
        raise ValueError

    @bq.processor(channel="b", retry_policy=lambda task: bq.Task.created_at)
    def fail_at_once(task: Any) -> None:
        if task.attempts == 0:
            raise ValueError

    with app.app_context():
        for number in range(3):  # which is the row that has been there for longest
            fail.enqueue().created_at = sa.func.now() + number * HOUR
        fail_at_once.enqueue()
        db.session.commit()
    work()
    with app.app_context():
        for task in db.session.scalars(sa.select(bq.Task)):
            if task.func_name == "fail":
                assert task.scheduled_at == task.created_at + HOUR
            else:
                assert (task.state, task.attempts) == ("DONE", 2)


def test_nothing_of_the_attempt_comes_back_with_the_answer_of_sql(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    began: list[bool] = []

    def policy(task: Any) -> Any:
        db.session.add(Note(text="of the policy"))
        return sa.func.now() + HOUR

    @app.teardown_appcontext
    def look(error: BaseException | None) -> None:
        began.append(db.session.registry.has() and db.session.registry().in_transaction())

    @bq.processor(retry_policy=policy)
    def fail(db: Any) -> None:
        db.add(Note(text="of the attempt"))
        db.flush()
        raise ValueError

    with app.app_context():
        fail.enqueue()
        db.session.commit()
    began.clear()
    work()
    assert began
    assert not any(began)
    assert query(database_url, "SELECT state, (SELECT count(*) FROM note) FROM bq_tasks") == [
        ("PENDING", 0)
    ]


def test_an_expression_whose_connection_is_lost_is_no_failure(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "INTERRUPTION_DELAY", 0.0)
    asked = []

    def policy(task: Any) -> Any:
        asked.append(task.id)
        return sa.func.pg_terminate_backend(sa.func.pg_backend_pid()) if len(asked) == 1 else None

    @bq.processor(retry_policy=policy)
    def fail() -> None:
        raise ValueError

    with app.app_context():
        fail.enqueue()
        db.session.commit()
    work()
    with app.app_context():
        task = db.session.scalars(sa.select(bq.Task)).one()
        assert event_types(task) == ["INTERRUPTED", "FAILED"]


def raises(task: Any) -> None:
    raise ZeroDivisionError("in the policy")


@pytest.mark.parametrize(
    ("policy", "logged"),
    [
        (raises, "ZeroDivisionError: in the policy"),
        (lambda task: 5, "a datetime with a time zone, SQL for one of them, or None, not 5"),
        (lambda task: True, "SQL for one of them, or None, not True"),
        (lambda task: DelayRetry(HOUR), "or None, not <flask_beanqueue.retry.DelayRetry object"),
        (lambda task: datetime.datetime(2100, 1, 1), "has no time zone"),
        (lambda task: datetime.datetime.max.replace(tzinfo=datetime.UTC), "is out of range"),
        (lambda: None, "takes 0 positional arguments"),
        (lambda task: sa.func.localtimestamp(), "has no time zone"),
        (lambda task: sa.func.now().op("AT TIME ZONE")("UTC"), "has no time zone"),
        (lambda task: sa.func.current_date(), "or None, not datetime.date("),
        (lambda task: sa.literal(5), "SQL for one of them, or None, not 5"),
        (lambda task: sa.literal("1 hour"), "SQL for one of them, or None, not '1 hour'"),
        (lambda task: sa.func.nothing(), "function nothing() does not exist"),
        (lambda task: sa.text("SELECT now()"), "syntax error"),
        (lambda task: sa.literal(1) / 0, "division by zero"),
        (lambda task: sa.text("generate_series(1, 2)"), "Multiple rows"),
        (lambda task: sa.text("timestamptz 'infinity'"), ""),
        (lambda task: sa.text("timestamptz '4713-01-01 BC'"), ""),
        (lambda task: sa.bindparam("when"), "A value is required for bind parameter"),
    ],
)
def test_a_policy_that_fails_leaves_its_task_failed_and_says_why(
    fail_with: Any, policy: Any, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = fail_with(ValueError("no good"), retry_policy=policy)
    assert task.state == "FAILED"
    assert task.error_message.startswith("ValueError: no good (its retry policy failed: ")
    assert logged in task.error_message
    assert event_types(task) == ["FAILED"]
    [event] = task.events
    assert event.error_message == task.error_message
    assert "ValueError: no good\n\nIts retry policy failed:\nTraceback" in event.traceback
    assert logged in event.traceback
    [record] = [each for each in caplog.records if "The retry policy" in each.getMessage()]
    assert record.getMessage() == f"The retry policy of {__name__}.fail {task.id} failed"
    assert record.levelname == "ERROR"
    assert record.task_id == str(task.id)  # type: ignore[attr-defined]
    assert logged in caplog.text


def test_a_long_message_leaves_room_for_what_the_policy_says(fail_with: Any) -> None:
    task = fail_with(ValueError("x" * 5_000), retry_policy=raises)
    assert len(task.error_message) < 2_100
    assert task.error_message.endswith("policy failed: ZeroDivisionError: in the policy)")


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
def test_a_policy_that_would_end_the_program_does_not(
    fail_with: Any, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def policy(task: Any) -> None:
        raise error

    task = fail_with(ValueError("no good"), retry_policy=policy)
    assert task.state == "FAILED"
    assert task.error_message.startswith("ValueError: no good (its retry policy failed: ")


def test_a_policy_may_ask_the_database(fail_with: Any, db: SQLAlchemy, bq: BeanQueue) -> None:
    def policy(task: Any) -> datetime.timedelta | None:
        count = db.session.scalar(sa.select(sa.func.count()).select_from(bq.Event))
        return datetime.timedelta(0) if count < 2 else None

    task = fail_with(ValueError(), retry_policy=policy)
    assert (task.state, event_types(task)) == ("FAILED", ["RETRIED", "RETRIED", "FAILED"])
