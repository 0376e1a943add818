"""The tables and models, on whatever base the app brings."""

from __future__ import annotations

import ast
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from hypothesis import given
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue, EventType, TaskState, WorkerState
from flask_beanqueue.engine import outcome
from flask_beanqueue.models.task import DONE
from flask_beanqueue.models.uuid7 import uuid7

from .conftest import MakeApp
from .probe import query

Work = Callable[..., None]


# Ids.


def test_an_id_is_a_uuid_of_version_7_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "flask_beanqueue.models.uuid7._uuid7_last", 0
    )  # a test may have set the time ahead
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= made.int >> 80 <= after + 1


def test_ids_increase_also_within_a_millisecond() -> None:
    made = [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))


def test_ids_increase_across_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()

    def let_others_go_first() -> int:
        os.sched_yield()
        return now

    monkeypatch.setattr(time, "time_ns", let_others_go_first)
    monkeypatch.setattr("flask_beanqueue.models.uuid7._uuid7_last", 0)
    batches: list[list[uuid.UUID]] = []

    def make() -> None:
        batches.append([uuid7() for _ in range(500)])

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(batch == sorted(batch) for batch in batches)
    ticks = {made.int >> 64 for batch in batches for made in batch}
    assert len(ticks) == 8 * 500  # no two share one, so their order is never left to chance


@given(clock=st.lists(st.integers(min_value=0, max_value=2**63), min_size=1, max_size=20))
def test_ids_increase_whatever_the_clock_does(clock: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flask_beanqueue.models.uuid7._uuid7_last", 0)
        made = []
        for now in clock:
            patch.setattr(time, "time_ns", lambda now=now: now)
            made.append(uuid7())
    assert made == sorted(set(made))
    assert {(each.version, each.variant) for each in made} == {(7, uuid.RFC_4122)}
    assert abs((made[0].int >> 80) - clock[0] // 1_000_000) <= 1


def test_ids_differ_between_processes_that_share_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    made = []
    for _ in range(2):
        monkeypatch.setattr("flask_beanqueue.models.uuid7._uuid7_last", 0)
        made.append(uuid7())
    assert made[0].int >> 64 == made[1].int >> 64
    assert made[0] != made[1]


def test_an_object_has_its_id_before_any_flush(bq: BeanQueue) -> None:
    task = bq.Task(module="a", name="b")
    assert task.id.version == 7
    assert bq.Worker(name="w").id.version == 7
    assert bq.Event(task_id=task.id, type="FAILED").id.version == 7


def test_an_id_that_is_given_is_kept(bq: BeanQueue) -> None:
    own = uuid.uuid4()
    assert bq.Task(id=own, module="a", name="b").id == own


# Columns.


def test_name_is_func_name(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    task = bq.Task(module="a", name="b")
    assert (task.func_name, task.name) == ("b", "b")
    with app.app_context():
        db.session.add(task)
        db.session.commit()
        found = db.session.scalars(sa.select(bq.Task).where(bq.Task.name == "b")).one()
        assert found.func_name == "b"


def test_a_repr_says_what_it_is(bq: BeanQueue) -> None:
    task = bq.Task(module="a", name="b", state="DONE")
    assert repr(task) == f"<BQTask {task.id} a.b DONE>"
    worker = bq.Worker(name="w", state="RUNNING")
    assert repr(worker) == f"<BQWorker {worker.id} w RUNNING>"
    assert repr(bq.Event(type="FAILED", error_message="oh")) == "<BQEvent FAILED oh>"


def test_a_task_inserted_by_raw_sql_is_waiting_and_gets_done(
    app: Flask, bq: BeanQueue, work: Work, database_url: str
) -> None:
    done = []

    @bq.processor()
    def nothing() -> None:
        done.append("nothing")

    query(
        database_url,
        "INSERT INTO bq_tasks (module, func_name) VALUES (%s, %s)",
        nothing.module,
        "nothing",
    )
    columns = "state, channel, kwargs, priority, claims, attempts, crashes, parked"
    [row] = query(database_url, f"SELECT {columns}, scheduled_at = created_at FROM bq_tasks")
    assert row == ("PENDING", "default", {}, 0, 0, 0, 0, False, True)
    work()
    assert done == ["nothing"]
    assert query(database_url, "SELECT state FROM bq_tasks") == [("DONE",)]


def test_what_raw_sql_and_the_orm_leave_out_is_the_same(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    with app.app_context():
        db.session.add(bq.Task(module="a", name="b"))
        db.session.commit()
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('a', 'b')")
    one, other = query(
        database_url,
        "SELECT to_jsonb(t) - '{id,created_at,scheduled_at}'::text[] FROM bq_tasks AS t",
    )
    assert one == other


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO bq_tasks (module, func_name, state) VALUES ('a', 'b', 'QUEUED')",
        "UPDATE bq_tasks SET state = 'pending'",
        "INSERT INTO bq_workers (name, channels, state) VALUES ('a', '{}', 'IDLE')",
    ],
)
def test_an_unknown_state_is_refused_by_the_database(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, statement: str
) -> None:
    with app.app_context():
        db.session.add(bq.Task(module="a", name="b"))
        db.session.commit()
        with pytest.raises(sa.exc.IntegrityError, match=r"ck_bq_(tasks|workers)_state"):
            db.session.execute(sa.text(statement))


def test_every_known_state_is_taken(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    with app.app_context():
        for state in TaskState:
            db.session.add(bq.Task(module="a", name="b", state=state))
        for each in WorkerState:
            db.session.add(bq.Worker(name="a", channels=[], state=each))
        db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks, bq_workers") == [(15,)]


# The words for states and events, as enums of text.


def test_a_member_is_its_text() -> None:
    for words in (TaskState, WorkerState, EventType):
        for member in words:
            assert (
                member
                == member.name
                == str(member)
                == f"{member}"
                == json.loads(json.dumps(member))
            )
    assert DONE == TaskState.DONE
    assert type(DONE) is str


def test_members_are_stored_and_found_as_text(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    with app.app_context():
        task = bq.Task(module="a", name="b", state=TaskState.FAILED)
        db.session.add(task)
        db.session.add(bq.Event(task=task, type=EventType.FAILED))
        db.session.commit()
        assert (task.state, type(task.state)) == ("FAILED", str)
        assert task.state == TaskState.FAILED
        states = [TaskState.FAILED, TaskState.DONE]
        for condition in (bq.Task.state == TaskState.FAILED, bq.Task.state.in_(states)):
            assert db.session.scalars(sa.select(bq.Task).where(condition)).one() is task
        [event] = task.events
        assert event.type == EventType.FAILED
        changed = sa.update(bq.Task).values(state=TaskState.CANCELLED).returning(bq.Task.state)
        assert db.session.scalars(changed).all() == [TaskState.CANCELLED]
        db.session.commit()
    assert query(database_url, "SELECT state FROM bq_tasks") == [("CANCELLED",)]


@pytest.mark.parametrize("state", [TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED])
def test_a_processor_may_set_a_member_as_its_tasks_state(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str, state: TaskState
) -> None:
    @bq.processor()
    def end(task: Any) -> None:
        task.state = state

    with app.app_context():
        end.enqueue().state = TaskState.PENDING
        db.session.commit()
    work()
    sql = "SELECT state, attempts, finished_at IS NULL FROM bq_tasks"
    assert query(database_url, sql) == [(state.value, 1, False)]


def test_all_types_of_events_are_members() -> None:
    values: list[ast.expr] = []
    for node in ast.walk(ast.parse(Path(outcome.__file__).read_text())):
        if isinstance(node, ast.Call):
            values += [each.value for each in node.keywords if each.arg == "event"]
            values += node.args[2:3] if ast.unparse(node.func) == "Outcome" else []
        elif isinstance(node, ast.Assign) and "event" in ast.unparse(node.targets[0]):
            values.append(node.value)
    parts = [part for value in values for part in ast.walk(value)]
    texts = {part.value for part in parts if isinstance(part, ast.Constant)}
    assert {text for text in texts if isinstance(text, str)} == set(EventType)


# What hangs together.


@pytest.mark.parametrize("way", ["orm", "orm, loaded", "sql"])
def test_deleting_a_worker_leaves_its_tasks(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str, way: str
) -> None:
    with app.app_context():
        worker = bq.Worker(name="w", channels=[])
        worker.tasks.append(bq.Task(module="a", name="b"))
        db.session.add(worker)
        db.session.commit()
        if way == "orm, loaded":
            assert len(worker.tasks) == 1
        if way == "sql":
            db.session.execute(sa.text("DELETE FROM bq_workers"))
        else:
            db.session.delete(worker)
        db.session.commit()
    assert query(database_url, "SELECT worker_id FROM bq_tasks") == [(None,)]


@pytest.mark.parametrize("way", ["orm", "orm, loaded", "sql"])
def test_deleting_a_task_deletes_its_events_and_leaves_its_children(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str, way: str
) -> None:
    with app.app_context():
        parent = bq.Task(module="a", name="parent")
        parent.children.append(bq.Task(module="a", name="child"))
        parent.events.append(bq.Event(type="FAILED"))
        db.session.add(parent)
        db.session.commit()
        if way == "orm, loaded":
            assert (len(parent.children), len(parent.events)) == (1, 1)
        if way == "sql":
            db.session.execute(sa.text("DELETE FROM bq_tasks WHERE func_name = 'parent'"))
        else:
            db.session.delete(parent)
        db.session.commit()
    assert query(database_url, "SELECT func_name, parent_id FROM bq_tasks") == [("child", None)]
    assert query(database_url, "SELECT count(*) FROM bq_events") == [(0,)]


# Bases.


def does_tasks(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    """A task goes all the way: made, done with its effects, failed with its event."""

    class Mark(db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "mark"
        id: sa_orm.Mapped[int] = sa_orm.mapped_column(primary_key=True)

    @bq.processor()
    def mark(db: Any, task: Any, number: int) -> int:
        db.add(Mark(id=number))
        return number + 1

    @bq.processor()
    def fail() -> None:
        raise ValueError("no good")

    with app.app_context():
        db.create_all()
        mark.enqueue(number=1)
        mark.enqueue_many([{"number": 2}])
        fail.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    with app.app_context():
        found = db.session.scalars(sa.select(bq.Task).order_by(bq.Task.id)).all()
        assert [(each.state, each.result) for each in found] == [
            ("DONE", 2),
            ("DONE", 3),
            ("FAILED", None),
        ]
        assert [event.error_message for event in found[2].events] == ["ValueError: no good"]
        assert {each.worker.state for each in found} == {"SHUTDOWN"}
        assert sorted(db.session.scalars(sa.select(Mark.id))) == [1, 2]


def plain_base() -> Any:
    class Base(sa_orm.DeclarativeBase):
        pass

    return Base


def base_without_meta() -> Any:
    class Base(sa_orm.DeclarativeBaseNoMeta):
        pass

    return Base


def dataclass_base() -> Any:
    class Base(sa_orm.MappedAsDataclass, sa_orm.DeclarativeBase):
        pass

    try:
        SQLAlchemy(model_class=Base)
    except sa.exc.InvalidRequestError:
        pytest.skip("Flask-SQLAlchemy #1420: no dataclasses with SQLAlchemy 2.1")
    return Base


def legacy_base() -> Any:
    class Base(Model):
        def shout(self) -> str:
            return repr(self).upper()

    return Base


def declarative_base() -> Any:
    return sa_orm.declarative_base()


@pytest.mark.parametrize(
    "base", [plain_base, base_without_meta, dataclass_base, legacy_base, declarative_base]
)
def test_the_models_work_on_any_base(make_app: MakeApp, base: Callable[[], Any]) -> None:
    db = SQLAlchemy(model_class=base())
    bq = BeanQueue(db=db)
    does_tasks(make_app(db, bq), db, bq)


@pytest.mark.parametrize("base", [plain_base, dataclass_base, legacy_base])
def test_the_models_work_on_any_base_in_a_bind(
    make_app: MakeApp, other_database_url: str, base: Callable[[], Any]
) -> None:
    db = SQLAlchemy(model_class=base())
    bq = BeanQueue(db=db, bind_key="queue")
    app = make_app(db, bq, SQLALCHEMY_BINDS={"queue": other_database_url})
    does_tasks(app, db, bq)
    assert query(other_database_url, "SELECT count(*) FROM bq_tasks") == [(3,)]


def test_a_base_that_names_no_tables_does_not_matter(make_app: MakeApp) -> None:
    db = SQLAlchemy(model_class=plain_base(), disable_autonaming=True)
    bq = BeanQueue(db=db)
    does_tasks(make_app(db, bq), db, bq)


def test_methods_of_the_apps_base_are_there(db: SQLAlchemy) -> None:
    db = SQLAlchemy(model_class=legacy_base())
    bq = BeanQueue(db=db)
    assert bq.Task(module="a", name="b").shout().startswith("<BQTASK")


def test_models_can_be_queried_the_legacy_way(app: Flask, bq: BeanQueue) -> None:
    with app.app_context():
        assert bq.Task.query.filter_by(state="PENDING").all() == []


NAMING = {
    "ix": "index_%(table_name)s_%(column_0_name)s",
    "uq": "unique_%(table_name)s_%(column_0_name)s",
    "ck": "check_%(table_name)s_%(constraint_name)s",
    "fk": "foreign_%(table_name)s_%(column_0_name)s",
    "pk": "primary_%(table_name)s",
}


@pytest.mark.parametrize("dataclass", [False, True])
def test_a_naming_convention_is_followed_and_checks_keep_their_names(
    make_app: MakeApp, database_url: str, dataclass: bool
) -> None:
    metadata = sa.MetaData(naming_convention=NAMING)
    if dataclass:
        model_class = dataclass_base()
        model_class.metadata = metadata
        db = SQLAlchemy(model_class=model_class)
    else:
        db = SQLAlchemy(metadata=metadata)
    bq = BeanQueue(db=db)
    does_tasks(make_app(db, bq), db, bq)
    names = {
        name
        for [name] in query(
            database_url,
            "SELECT conname FROM pg_constraint WHERE conrelid = 'bq_tasks'::regclass"
            " AND contype IN ('p', 'f', 'c')",
        )
    }
    assert names == {
        "primary_bq_tasks",
        "foreign_bq_tasks_worker_id",
        "foreign_bq_tasks_parent_id",
        "ck_bq_tasks_state",
    }


@pytest.mark.parametrize("dataclass", [False, True])
def test_a_schema_of_the_metadata_is_followed(
    make_app: MakeApp, database_url: str, dataclass: bool
) -> None:
    query(database_url, "CREATE SCHEMA house")
    metadata = sa.MetaData(schema="house")
    if dataclass:
        model_class = dataclass_base()
        model_class.metadata = metadata
        db = SQLAlchemy(model_class=model_class)
    else:
        db = SQLAlchemy(metadata=metadata)
    bq = BeanQueue(db=db)
    app = make_app(db, bq)
    does_tasks(app, db, bq)
    assert query(database_url, "SELECT count(*) FROM house.bq_tasks") == [(3,)]


def test_the_queue_may_live_in_another_database(
    make_app: MakeApp, database_url: str, other_database_url: str
) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db, bind_key="queue")
    app = make_app(db, bq, SQLALCHEMY_BINDS={"queue": other_database_url})
    does_tasks(app, db, bq)
    assert query(other_database_url, "SELECT state FROM bq_tasks ORDER BY id") == [
        ("DONE",),
        ("DONE",),
        ("FAILED",),
    ]
    assert query(other_database_url, "SELECT to_regclass('mark')") == [(None,)]
    assert query(database_url, "SELECT id FROM mark ORDER BY id") == [(1,), (2,)]
    assert query(database_url, "SELECT to_regclass('bq_tasks')") == [(None,)]


def test_an_app_may_have_a_model_called_task(make_app: MakeApp) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db)

    class Task(db.Model):  # type: ignore[name-defined, misc]
        id = sa_orm.mapped_column(sa.Integer, primary_key=True)

    class Item(db.Model):  # type: ignore[name-defined, misc]
        id = sa_orm.mapped_column(sa.Integer, primary_key=True)
        task_id = sa_orm.mapped_column(sa.ForeignKey("task.id"))
        task = sa_orm.relationship("Task")
        bq_task_id = sa_orm.mapped_column(sa.ForeignKey("bq_tasks.id"))
        bq_task = sa_orm.relationship("BQTask")

    app = make_app(db, bq)
    with app.app_context():
        db.session.add(Item(task=Task(), bq_task=bq.Task(module="a", name="b")))
        db.session.commit()
        item = db.session.scalars(sa.select(Item)).one()
        assert (type(item.task), type(item.bq_task)) == (Task, bq.Task)


# Indexes.


def test_the_queue_is_in_partial_indexes(app: Flask, database_url: str) -> None:
    found = dict(
        query(
            database_url,
            "SELECT indexname, substring(indexdef FROM 'USING.*') FROM pg_indexes"
            " WHERE tablename = 'bq_tasks'",
        )
    )
    assert found == {
        "bq_tasks_pkey": "USING btree (id)",
        "ix_bq_tasks_pending": "USING btree (channel, priority, scheduled_at, id)"
        " WHERE (state = 'PENDING'::text)",
        "ix_bq_tasks_processing": (
            "USING btree (worker_id) WHERE ((state = 'PROCESSING'::text) AND (NOT parked))"
        ),
        "ix_bq_tasks_suspect": "USING btree (channel, scheduled_at) WHERE ((crashes > 0)"
        " AND (state = ANY (ARRAY['PENDING'::text, 'PROCESSING'::text])))",
        "ix_bq_tasks_parent": "USING btree (parent_id) WHERE (parent_id IS NOT NULL)",
    }
