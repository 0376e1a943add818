"""What type checkers make of processors. Nothing here runs; mypy reads it.

Each ``type: ignore`` is a mistake that a type checker has to see: one that is not needed is an
error itself (``warn_unused_ignores``).
"""

from __future__ import annotations

import datetime
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from flask_beanqueue import (
    BeanQueue,
    DelayRetry,
    ExponentialBackoffRetry,
    LimitAttempt,
    TaskModelMixin,
    current_task,
)

if t.TYPE_CHECKING:
    from flask_beanqueue.models import BQTask

db = SQLAlchemy()
bq = BeanQueue(db=db)


# The worker fills in db, task and savepoint; the rest is what a task gives.


@bq.processor(channel="images")
def resize(
    db: Session, task: TaskModelMixin, savepoint: SessionTransaction, width: int, height: int = 1
) -> str:
    return f"{width}x{height}"


@bq.processor()
def plain(width: int, *, name: str = "") -> None: ...


@bq.processor()
def with_db(db: Session, width: int) -> list[int]:
    return [width]


@bq.processor()
def with_scoped_session(db: scoped_session[Session], task: TaskModelMixin, width: int) -> None: ...


@bq.processor()
def with_scoped_session_last(
    task: TaskModelMixin, db: scoped_session[Session], width: int
) -> None: ...


@bq.processor()
def with_task(task: TaskModelMixin, width: int) -> None: ...


@bq.processor()
def with_savepoint(savepoint: SessionTransaction, width: int) -> None: ...


@bq.processor()
def with_task_before_db(task: TaskModelMixin, db: Session, width: int) -> None: ...


@bq.processor()
def with_nothing_else(db: Session) -> None: ...


@bq.processor()
def with_nothing_at_all() -> None: ...


resize.run(1, 2)
resize.run(width=1)
resize.enqueue(width=1, height=2)
plain.run(1)
plain.enqueue(width=1, name="a")
with_db.run(width=1)
with_scoped_session.run(width=1)
with_scoped_session_last.run(1)
with_task.run(width=1)
with_savepoint.run(width=1)
with_task_before_db.run(width=1)
with_nothing_else.run()
with_nothing_at_all.enqueue()

resize.run()  # type: ignore[call-arg]
resize.run("wide")  # type: ignore[arg-type]
resize.run(width=1, height=None)  # type: ignore[arg-type]
resize.run(width=1, depth=2)  # type: ignore[call-arg]
resize.enqueue(db.session(), width=1)  # type: ignore[misc, arg-type]
resize.using(priority=1).enqueue(wide=1)  # type: ignore[call-arg]
plain.run(1, "a")  # type: ignore[call-arg]
with_db.run(db=db.session(), width=1)  # type: ignore[call-arg]
with_scoped_session.run(db.session, width=1)  # type: ignore[misc, arg-type]
with_scoped_session_last.run("wide")  # type: ignore[arg-type]
with_task.run(task=resize.run(1), width=1)  # type: ignore[call-arg]
with_savepoint.enqueue("wide")  # type: ignore[arg-type]
with_task_before_db.enqueue("wide")  # type: ignore[arg-type]
with_nothing_else.run(1)  # type: ignore[call-arg]
with_nothing_at_all.enqueue(1)  # type: ignore[call-arg]


# What comes back.

t.assert_type(resize.run(1), BQTask)
t.assert_type(resize.enqueue(1), BQTask)
t.assert_type(resize.run(1).id, uuid.UUID)
t.assert_type(resize.enqueue_many([{"width": 1}]), list[uuid.UUID])
t.assert_type(resize.enqueue_many({"width": width} for width in range(3)), list[uuid.UUID])


# The models.

t.assert_type(bq.Task, type[BQTask])
t.assert_type(bq.Task.state == "DONE", sa.ColumnElement[bool])
t.assert_type(bq.Task(channel="images", module="app", name="resize").state, str)
t.assert_type(db.session.get(bq.Task, uuid.uuid4()), BQTask | None)
t.assert_type(bq.Worker.last_heartbeat < sa.func.now(), sa.ColumnElement[bool])
t.assert_type(bq.Event.__table__, sa.Table)
t.assert_type(current_task, BQTask)
t.assert_type(current_task.parent_id, uuid.UUID | None)
current_task.scheduled_at = datetime.datetime.now(datetime.UTC)
current_task.state = 5  # type: ignore[assignment]
bq.Task.status  # type: ignore[attr-defined]  # noqa: B018
db.session.scalars(sa.select(bq.Event).where(bq.Event.task_id == resize.run(1).id))


# Plain calls, with what the worker fills in given or left out.

t.assert_type(resize(width=1), str)
t.assert_type(resize(db.session(), resize.run(1), db.session.begin_nested(), 1, 2), str)
t.assert_type(with_db(width=1), list[int])
t.assert_type(with_nothing_else(), None)


# Own models and own kinds of sessions.


class Job(TaskModelMixin):
    tenant: str


class OwnSession(Session): ...


@bq.processor()
def with_own(db: OwnSession, task: Job, width: int) -> None: ...


with_own.run(width=1)
with_own.run("wide")  # type: ignore[arg-type]


# Where they come last, a type checker takes them for arguments of the task.


@bq.processor()
def with_names_last(width: int, *, db: Session, task: TaskModelMixin) -> None: ...


with_names_last.run(width=1)  # type: ignore[call-arg]


# Where it cannot know, it says nothing.


@bq.processor()
def with_any(db: t.Any, task: t.Any, width: int) -> None: ...


@bq.processor()
def with_all_kinds(db: Session, **kwargs: t.Any) -> None: ...


@bq.processor()
def with_all_numbers(db: Session, **kwargs: int) -> None: ...


@bq.processor()
def with_db_in_second_place(width: int, db: Session) -> None: ...


@bq.processor()
def answers_anything(db: Session, width: int) -> dict[str, t.Any]:
    return {}


def untyped(db, width, height=1):  # type: ignore[no-untyped-def]
    pass


untyped_processor = bq.processor()(untyped)

with_any.run(width=1)
with_all_kinds.run(width=1, name="a")
with_all_numbers.enqueue(width=1)
with_db_in_second_place.run(width=1)
answers_anything.run(width=1)
untyped_processor.run(1)
untyped_processor.run(width=1, height=2)
t.assert_type(untyped_processor.enqueue(1), BQTask)


# Options.

resize.using(
    channel="b", priority=1, scheduled_at=datetime.datetime.now(datetime.UTC)
).enqueue_many([{"width": 1}])
t.assert_type(with_db.using(delay=datetime.timedelta(1))(width=1), list[int])
resize.using(delay=1)  # type: ignore[arg-type]
resize.using(importance=1)  # type: ignore[call-arg]


@bq.processor  # type: ignore[arg-type]
def without_parentheses() -> None: ...


@bq.processor(retry_policy=LimitAttempt(3, DelayRetry(datetime.timedelta(1))))
def with_policy() -> None: ...


@bq.processor(
    retry_policy=ExponentialBackoffRetry(jitter=1.0), retry_exceptions=(OSError, ValueError)
)
def with_exceptions() -> None: ...


@bq.processor(retry_policy=lambda task: datetime.timedelta(task.attempts))
def with_own_policy() -> None: ...


@bq.processor(retry_policy=lambda task: sa.func.now() + datetime.timedelta(seconds=1))
def with_sql() -> None: ...


def answers_sql(task: TaskModelMixin) -> sa.ColumnElement[datetime.datetime]:
    return sa.func.now() + datetime.timedelta(seconds=task.attempts)


@bq.processor(retry_policy=LimitAttempt(3, answers_sql))
def with_limited_sql() -> None: ...


@bq.processor(retry_policy=lambda task: 5)  # type: ignore[arg-type, return-value]
def with_wrong_policy() -> None: ...


# The rest of the house.

bq.complete(uuid.uuid4(), result={"a": 1})
bq.complete(str(uuid.uuid4()))
bq.fail(uuid.uuid4(), error="gone")
bq.fail(uuid.uuid4())  # type: ignore[call-arg]
bq.process_tasks(("images",), app=Flask(__name__), concurrency=2, burst=True, name="a")
bq.worker(("images",), app=Flask(__name__), concurrency=2, burst=True, name="a").stop()
bq.worker(concurrency="2")  # type: ignore[arg-type]
bq.worker(threads=2)  # type: ignore[call-arg]
BeanQueue(db)  # type: ignore[arg-type]
