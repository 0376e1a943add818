"""Own task, worker and event models, made with the mixins."""

from __future__ import annotations

import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.orm import Mapped, declared_attr, mapped_column, relationship

import flask_beanqueue as fbq
from flask_beanqueue import BeanQueue, ConfigError, listen_events

from .conftest import MakeApp
from .probe import Probe, query

Own = dict[str, Any]

# Each of these makes own models on a db.


def as_in_the_readme_of_beanqueue(db: Any) -> Own:
    class Task(fbq.TaskModelMixin, db.Model):  # type: ignore[misc]
        __tablename__ = "task"
        worker_id: Mapped[uuid.UUID] = mapped_column(
            UUID(as_uuid=True),
            sa.ForeignKey("worker.id", onupdate="CASCADE"),
            nullable=True,
            index=True,
        )

        worker = relationship("Worker", back_populates="tasks", uselist=False)

    class Worker(fbq.WorkerModelMixin, db.Model):  # type: ignore[misc]
        __tablename__ = "worker"

        tasks = relationship(
            "Task",
            back_populates="worker",
            cascade="all,delete",
            order_by="Task.created_at",
        )

    return {"task_model": Task, "worker_model": Worker}


def own_task(db: Any) -> Own:
    class Job(fbq.TaskModelMixin, fbq.TaskModelRefWorkerMixin, db.Model):  # type: ignore[misc]
        pass

    return {"task_model": Job}


def own_task_with_all_references(db: Any) -> Own:
    class Job(  # type: ignore[misc]
        fbq.TaskModelMixin,
        fbq.TaskModelRefWorkerMixin,
        fbq.TaskModelRefParentMixin,
        fbq.TaskModelRefEventMixin,
        db.Model,
    ):
        tenant: Mapped[str | None] = mapped_column(sa.Text)
        source: Mapped[str] = mapped_column(sa.Text, server_default="web")

    return {"task_model": Job}


def own_task_without_relationships(db: Any) -> Own:
    class Job(fbq.TaskModelMixin, db.Model):  # type: ignore[misc]
        worker_id: Mapped[uuid.UUID | None] = mapped_column(UUID(as_uuid=True))

    return {"task_model": Job}


def own_worker(db: Any) -> Own:
    class Machine(fbq.WorkerModelMixin, fbq.WorkerRefMixin, db.Model):  # type: ignore[misc]
        room: Mapped[str | None] = mapped_column(sa.Text)

    return {"worker_model": Machine}


def own_worker_without_relationships(db: Any) -> Own:
    class Machine(fbq.WorkerModelMixin, db.Model):  # type: ignore[misc]
        pass

    return {"worker_model": Machine}


def own_event(db: Any) -> Own:
    class Happening(  # type: ignore[misc]
        fbq.EventModelMixin, fbq.EventModelRefTaskMixin, db.Model
    ):
        pass

    return {"event_model": Happening}


def own_event_without_relationships(db: Any) -> Own:
    class Happening(fbq.EventModelMixin, db.Model):  # type: ignore[misc]
        task_id: Mapped[uuid.UUID] = mapped_column(UUID(as_uuid=True))

    return {"event_model": Happening}


def all_own(db: Any) -> Own:
    class Job(  # type: ignore[misc]
        fbq.TaskModelMixin,
        fbq.TaskModelRefWorkerMixin,
        fbq.TaskModelRefParentMixin,
        fbq.TaskModelRefEventMixin,
        db.Model,
    ):
        __tablename__ = "jobs"
        __table_args__ = (sa.Index("jobs_module", "module"),)
        bq_worker_table = "machines"
        bq_worker_class = "Machine"
        bq_event_class = "Happening"

    class Machine(fbq.WorkerModelMixin, fbq.WorkerRefMixin, db.Model):  # type: ignore[misc]
        __tablename__ = "machines"
        bq_task_class = "Job"

    class Happening(  # type: ignore[misc]
        fbq.EventModelMixin, fbq.EventModelRefTaskMixin, db.Model
    ):
        __tablename__ = "happenings"
        bq_task_table = "jobs"
        bq_task_class = "Job"

    return {"task_model": Job, "worker_model": Machine, "event_model": Happening}


def all_own_in_a_schema(db: Any) -> Own:
    class Job(  # type: ignore[misc]
        fbq.TaskModelMixin,
        fbq.TaskModelRefWorkerMixin,
        fbq.TaskModelRefParentMixin,
        fbq.TaskModelRefEventMixin,
        db.Model,
    ):
        __tablename__ = "Jobs of the house"
        __table_args__ = (
            sa.CheckConstraint("priority < 100", name="urgent_enough"),
            {"schema": "house"},
        )
        bq_worker_table = "house.machines"
        bq_worker_class = "Machine"
        bq_event_class = "Happening"

    class Machine(fbq.WorkerModelMixin, fbq.WorkerRefMixin, db.Model):  # type: ignore[misc]
        __tablename__ = "machines"
        __table_args__ = {"schema": "house"}  # noqa: RUF012
        bq_task_class = "Job"

    class Happening(  # type: ignore[misc]
        fbq.EventModelMixin, fbq.EventModelRefTaskMixin, db.Model
    ):
        __tablename__ = "happenings"

        @declared_attr.directive
        def __table_args__(cls) -> Any:
            return {"schema": "house"}

        bq_task_table = "house.Jobs of the house"
        bq_task_class = "Job"

    return {"task_model": Job, "worker_model": Machine, "event_model": Happening}


def own_task_in_a_schema(db: Any) -> Own:
    class Job(  # type: ignore[misc]
        fbq.TaskModelMixin, fbq.TaskModelRefWorkerMixin, fbq.TaskModelRefParentMixin, db.Model
    ):
        __table_args__ = {"schema": "house"}  # noqa: RUF012

    return {"task_model": Job}


KINDS = [
    as_in_the_readme_of_beanqueue,
    own_task,
    own_task_with_all_references,
    own_task_without_relationships,
    own_worker,
    own_worker_without_relationships,
    own_event,
    own_event_without_relationships,
    all_own,
    all_own_in_a_schema,
    own_task_in_a_schema,
]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module to put own models into."""
    module = types.ModuleType("house_models")
    monkeypatch.setitem(sys.modules, "house_models", module)
    return module


Queue = tuple[Flask, SQLAlchemy, BeanQueue]
MakeQueue = Callable[..., Queue]


@pytest.fixture
def make_queue(make_app: MakeApp, module: Any, database_url: str) -> MakeQueue:
    """Sets an app up whose queue has own models."""

    def make(kind: Callable[[Any], Own], *, dotted_names: bool = False) -> Queue:
        query(database_url, "CREATE SCHEMA house")
        db = SQLAlchemy()
        own = kind(db)
        if not dotted_names:
            bq = BeanQueue(db=db, **own)
            return make_app(db, bq), db, bq
        settings = {}
        for key, model in own.items():
            setattr(module, model.__name__, model)
            settings[f"BQ_{key.upper()}"] = f"house_models.{model.__name__}"
        bq = BeanQueue()
        return make_app(db, bq, **settings), db, bq

    return make


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def queue(request: pytest.FixtureRequest, make_queue: MakeQueue) -> Queue:
    return make_queue(request.param)


def table(model: Any) -> str:
    preparer = sa.dialects.postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return str(preparer.format_table(model.__table__))


def does_tasks(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    """Tasks go all the way: made in each way, done, failed with an event, made by another."""

    @bq.processor()
    def double(db: Any, task: Any, number: int) -> int:
        assert db.get(bq.Task, task.id) is task
        if number == 1:
            double.enqueue(number=10)
        return number * 2

    @bq.processor()
    def fail() -> None:
        raise ValueError("no good")

    with app.app_context():
        double.enqueue(number=1)
        double.enqueue_many([{"number": 2}])
        fail.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    with app.app_context():
        tasks = db.session.scalars(sa.select(bq.Task).order_by(bq.Task.id)).all()
        assert [(each.state, each.result) for each in tasks] == [
            ("DONE", 2),
            ("DONE", 4),
            ("FAILED", None),
            ("DONE", 20),
        ]
        worker = db.session.scalars(sa.select(bq.Worker)).one()
        assert worker.state == "SHUTDOWN"
        assert {each.worker_id for each in tasks} == {worker.id}
        event = db.session.scalars(sa.select(bq.Event)).one()
        assert (event.task_id, event.error_message) == (tasks[2].id, "ValueError: no good")
        if hasattr(worker, "tasks") and hasattr(bq.Task, "worker"):
            assert {each.id for each in worker.tasks} == {each.id for each in tasks}
        if hasattr(bq.Task, "events"):
            assert tasks[2].events == [event]
        if hasattr(event, "task"):
            assert event.task is tasks[2]
        if hasattr(bq.Task, "parent"):
            assert tasks[3].parent is tasks[0]


def test_own_models_do_tasks(queue: Queue) -> None:
    does_tasks(*queue)


@pytest.mark.parametrize(
    "kind",
    [as_in_the_readme_of_beanqueue, own_task, own_worker, own_event, all_own],
    ids=lambda kind: kind.__name__,
)
def test_own_models_may_be_given_by_their_dotted_names(make_queue: MakeQueue, kind: Any) -> None:
    does_tasks(*make_queue(kind, dotted_names=True))


def test_dotted_names_are_enough_where_the_app_is_known(
    make_app: MakeApp, module: Any, db: SQLAlchemy
) -> None:
    module.Machine = own_worker(db)["worker_model"]
    app = make_app(db, BQ_WORKER_MODEL="house_models.Machine")
    bq = BeanQueue(app)
    assert bq.Worker is module.Machine
    with app.app_context():
        db.create_all()
    does_tasks(app, db, bq)


@pytest.fixture
def worker(queue: Queue) -> Iterator[threading.Thread]:
    """A worker in a thread that is still to be started."""
    app, _, bq = queue
    bq.processor()(survive)
    worker = bq.worker(app=app)
    thread = threading.Thread(target=worker.run)
    yield thread
    worker.stop()
    if thread.ident is not None:
        thread.join(30)
        assert not thread.is_alive()


def survive() -> None:
    pass


def test_a_worker_takes_over_what_another_left(
    queue: Queue, worker: threading.Thread, database_url: str, probe: Probe
) -> None:
    app, db, bq = queue
    with app.app_context():
        dead = bq.Worker(name="dead", channels=["default"], state="NO_HEARTBEAT")
        db.session.add(dead)
        db.session.flush()
        db.session.add(
            bq.Task(
                module=__name__, name="survive", state="PROCESSING", claims=1, worker_id=dead.id
            )
        )
        db.session.commit()
    probe.listen_states(table(bq.Task))
    worker.start()
    probe.wait("survive PENDING")
    probe.wait("survive DONE")
    [row] = query(database_url, f"SELECT state, claims, attempts, crashes FROM {table(bq.Task)}")
    assert row == ("DONE", 2, 1, 1)
    assert query(database_url, f"SELECT type FROM {table(bq.Event)}") == [("CRASHED",)]


def test_own_tables_get_the_queues_indexes_and_checks(queue: Queue) -> None:
    app, _, bq = queue
    tasks = bq.Task.__table__
    with app.app_context():
        inspector = sa.inspect(bq.engine(app))
    indexes = {each["name"] for each in inspector.get_indexes(tasks.name, tasks.schema)}
    for name in ("pending", "processing", "suspect"):
        assert f"ix_{tasks.name}_{name}" in indexes
    checks = {each["name"] for each in inspector.get_check_constraints(tasks.name, tasks.schema)}
    assert f"ck_{tasks.name}_state" in checks
    if tasks.name == "Jobs of the house":
        assert "urgent_enough" in checks
    if tasks.name == "jobs":
        assert "jobs_module" in indexes


def test_an_index_or_check_of_ones_own_stands_in_for_the_queues(
    make_app: MakeApp, db: SQLAlchemy
) -> None:
    class Job(  # type: ignore[misc]
        fbq.TaskModelMixin,
        fbq.TaskModelRefWorkerMixin,
        db.Model,  # type: ignore[name-defined]
    ):
        __table_args__ = (
            sa.Index("ix_job_pending", "channel"),
            sa.CheckConstraint("state <> ''", name="ck_job_state"),
        )

    bq = BeanQueue(db=db, task_model=Job)
    app = make_app(db, bq)
    with app.app_context():
        inspector = sa.inspect(bq.engine(app))
    indexes = {each["name"]: each["column_names"] for each in inspector.get_indexes("job")}
    assert indexes["ix_job_pending"] == ["channel"]
    assert "ix_job_processing" in indexes
    [check] = inspector.get_check_constraints("job")
    assert "<>" in check["sqltext"]


def test_columns_of_ones_own_are_there_to_be_used(
    make_queue: MakeQueue,
) -> None:
    app, db, bq = make_queue(own_task_with_all_references)
    seen = []

    @bq.processor()
    def look(task: Any) -> None:
        seen.append((task.tenant, task.source))

    with app.app_context():
        task: Any = look.enqueue()
        task.tenant = "me"
        look.enqueue_many([{}])
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert sorted(seen, key=str) == [("me", "web"), (None, "web")]


def test_the_cascade_of_an_own_worker_model_is_the_apps(
    make_queue: MakeQueue, database_url: str
) -> None:
    app, db, bq = make_queue(as_in_the_readme_of_beanqueue)
    with app.app_context():
        worker = bq.Worker(name="w", channels=[], tasks=[bq.Task(module="a", name="b")])
        db.session.add(worker)
        db.session.commit()
        db.session.delete(worker)
        db.session.commit()
    assert query(database_url, "SELECT count(*) FROM task") == [(0,)]


# NOTIFY


def test_an_own_task_model_notifies_once_however_often_it_is_said(
    make_app: MakeApp, database_url: str
) -> None:
    db = SQLAlchemy()
    own = own_task(db)
    listen_events(own["task_model"])
    bq = BeanQueue(db=db, **own)
    listen_events(bq.Task)
    app = make_app(db, bq)
    statements = []
    with app.app_context():
        sa.event.listen(
            db.engine, "before_cursor_execute", lambda *event: statements.append(event[2])
        )
        db.session.add(bq.Task(module="a", name="b"))
        db.session.commit()
    assert sum("pg_notify" in statement for statement in statements) == 1


# What is refused.


def test_an_own_task_without_the_queues_columns_is_refused(db: Any) -> None:
    class Job(db.Model):  # type: ignore[misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        module: Mapped[str]

    with pytest.raises(TypeError) as caught:
        BeanQueue(db=db, task_model=Job)
    missing, _, advice = str(caught.value).partition(". Let it derive from ")
    assert ".Job has no column attempts, channel, " in missing
    assert "module" not in missing.rpartition("has no column")[2]
    assert advice == "flask_beanqueue.TaskModelMixin and TaskModelRefWorkerMixin."


def test_an_own_task_without_worker_id_is_told_the_mixin_for_it(db: Any) -> None:
    class Job(fbq.TaskModelMixin, db.Model):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=r"worker_id\. .* flask_beanqueue\.TaskModelRefWorkerMixin"):
        BeanQueue(db=db, task_model=Job)


def test_a_db_whose_first_queue_was_refused_takes_another(db: Any) -> None:
    class Job(fbq.TaskModelMixin, db.Model):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError):
        BeanQueue(db=db, task_model=Job)
    assert BeanQueue(db=db).Task


def test_an_own_worker_without_the_queues_columns_is_refused(db: Any) -> None:
    class Machine(db.Model):  # type: ignore[misc]
        id: Mapped[uuid.UUID] = mapped_column(primary_key=True)

    with pytest.raises(TypeError, match=r"Machine has no column .*, name, .*\.WorkerModelMixin"):
        BeanQueue(db=db, worker_model=Machine)


@pytest.mark.parametrize(
    ("column", "fits"),
    [
        (sa.Column(sa.Text), True),
        (sa.Column(sa.Text, nullable=False, server_default="unknown"), True),
        (sa.Column(sa.Text, sa.Computed("'text'"), nullable=False), True),
        (sa.Column(sa.Text, nullable=False, default="unknown"), False),
        (sa.Column(sa.Text, nullable=False), False),
    ],
    ids=["nullable", "server default", "computed", "default", "none"],
)
@pytest.mark.parametrize("kind", ["worker", "event"])
def test_an_own_column_that_the_queue_cannot_fill_is_refused(
    db: Any, kind: str, column: Any, fits: bool
) -> None:
    """It writes workers and events with SQL of its own, which knows no default of the ORM's."""
    mixins = {
        "worker": (fbq.WorkerModelMixin,),
        "event": (fbq.EventModelMixin, fbq.EventModelRefTaskMixin),
    }
    # Copied, for a column belongs to one table.
    body = {"__tablename__": "own", "site": column._copy()}
    model: Any = type("Own", (*mixins[kind], db.Model), body)
    own: dict[str, Any] = {f"{kind}_model": model}
    if fits:
        BeanQueue(db=db, **own)
        return
    with pytest.raises(TypeError, match=r"Own\.site cannot be empty.*server_default"):
        BeanQueue(db=db, **own)


def test_an_own_event_without_its_task_is_told_the_mixin_for_it(db: Any) -> None:
    class Happening(fbq.EventModelMixin, db.Model):  # type: ignore[misc]
        pass

    with pytest.raises(TypeError, match=r"no column task_id\. .*EventModelRefTaskMixin"):
        BeanQueue(db=db, event_model=Happening)


@pytest.mark.parametrize(
    "name",
    [
        "nowhere_to_be_found.Task",
        "house_models.Missing",
        "house_models",
        "Task",
        "",
        ".Task",
        ".models.Task",
        "house_models.function",
        "house_models.Plain",
        "house_models.TEXT",
    ],
)
@pytest.mark.parametrize("setting", ["BQ_TASK_MODEL", "BQ_WORKER_MODEL", "BQ_EVENT_MODEL"])
def test_a_wrong_dotted_name_is_refused_by_the_settings_name(
    db: SQLAlchemy, module: Any, setting: str, name: str
) -> None:
    module.function = lambda: None
    module.Plain = type("Plain", (), {})
    module.TEXT = "text"
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    app.config[setting] = name
    db.init_app(app)
    with pytest.raises(ConfigError, match=f"^{setting} ") as caught:
        BeanQueue(app)
    assert name in str(caught.value)


def test_a_name_in_config_that_comes_too_late_is_refused_with_the_way_out(
    db: SQLAlchemy, module: Any
) -> None:
    module.Job = own_task(db)["task_model"]
    bq = BeanQueue(db=db)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    app.config["BQ_TASK_MODEL"] = "house_models.Job"
    db.init_app(app)
    with pytest.raises(ConfigError, match=r"^BQ_TASK_MODEL is house_models\.Job.* constructor"):
        bq.init_app(app)


def test_a_name_in_config_that_says_what_the_constructor_got_is_fine(
    db: SQLAlchemy, module: Any
) -> None:
    own = own_task(db)
    module.Job = own["task_model"]
    bq = BeanQueue(db=db, **own)
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    app.config["BQ_TASK_MODEL"] = "house_models.Job"
    db.init_app(app)
    bq.init_app(app)
    assert bq.Task is module.Job


@pytest.mark.parametrize(
    "name", ["select", "a b", 'a"b', "a'b", "a\\b", "a%b", "%(a)s", "a :b", r"a \:b", "a::b", "{a}"]
)
def test_a_table_may_have_any_name(
    make_app: MakeApp, database_url: str, db: SQLAlchemy, name: str
) -> None:
    class Job(fbq.TaskModelMixin, fbq.TaskModelRefWorkerMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = name

    bq = BeanQueue(db=db, task_model=Job)

    @bq.processor()
    def double(number: int) -> int:
        return 2 * number

    app = make_app(db, bq)
    with app.app_context():
        double.enqueue(number=1)
        double.enqueue_many([{"number": 2}])
        db.session.add(Job(module="no", name="where"))
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    with app.app_context():
        found = db.session.execute(sa.select(Job.state, Job.result).order_by(Job.id)).all()
    assert found == [("DONE", 2), ("DONE", 4), ("PENDING", None)]
