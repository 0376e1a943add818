"""Sessions of the app's own: exchanged, routed, in two phases. What a task writes in them is one
with its completion, or it is refused with words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flask_sqlalchemy.session
import pytest
import sqlalchemy as sa
from flask import Flask, g
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from flask_beanqueue import (
    BeanQueue,
    EventModelMixin,
    EventModelRefTaskMixin,
    LimitAttempt,
    TaskModelMixin,
    TaskModelRefWorkerMixin,
    WorkerModelMixin,
    WorkerRefMixin,
    current_task,
)
from flask_beanqueue.engine import fence

from . import postgres
from .conftest import MakeApp, only_task, running, texts, with_driver
from .probe import Probe, query, wait_until

Work = Callable[..., None]


def flasks_own(app: Flask, db: Any) -> Any:
    return db._make_scoped_session({"autoflush": True})


def plain(app: Flask, db: Any) -> Any:
    with app.app_context():
        return scoped_session(sessionmaker(bind=db.engine))


def of_another_class(app: Flask, db: Any) -> Any:
    class Own(flask_sqlalchemy.session.Session):
        pass

    return db._make_scoped_session({"class_": Own})


exchanges = pytest.mark.parametrize("make", [flasks_own, plain, of_another_class])


#: As another worker does that takes the task over.
TAKE_AWAY = "UPDATE bq_tasks SET claims = 7"


def do_one(app: Flask, db: Any, bq: BeanQueue, act: Any) -> Any:
    """Do one task, and return it as it is committed."""

    @bq.processor()
    def do() -> None:
        act()

    with app.app_context():
        do.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    return only_task(app, bq)


@exchanges
def test_what_a_task_writes_in_an_exchanged_session_is_there_when_it_is_done(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, make: Any
) -> None:
    db.session = make(app, db)

    def act() -> None:
        db.session.add(Note(text="written"))
        db.session.flush()

    assert do_one(app, db, bq, act).state == "DONE"
    assert texts(app, db, Note) == ["written"]


@exchanges
@pytest.mark.parametrize("commits", [False, True])
def test_an_exchanged_session_is_fenced(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, make: Any, commits: bool, database_url: str
) -> None:
    db.session = make(app, db)

    def act() -> None:
        db.session.execute(sa.insert(Note).values(text="never"))
        query(database_url, TAKE_AWAY)
        if commits:
            db.session.commit()

    assert do_one(app, db, bq, act).state == "PROCESSING"  # as the other worker has it
    assert texts(app, db, Note) == []


@exchanges
def test_a_task_is_enqueued_through_an_exchanged_session_and_wakes_its_worker(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, make: Any, probe: Any
) -> None:
    @bq.processor(channel="probe")
    def nothing() -> None:
        pass

    db.session = make(app, db)
    with app.app_context():
        nothing.enqueue()
        db.session.rollback()
        nothing.enqueue()
        db.session.commit()
        probe.wait("")
        nothing.enqueue_many([{}])
        db.session.commit()
        probe.wait("")
        assert db.session.query(bq.Task).count() == 2


@exchanges
def test_a_session_may_be_exchanged_between_tasks_and_back(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, work: Work, make: Any
) -> None:
    sessions = [db.session, make(app, db)]
    locks = []

    @bq.processor()
    def write(text: str) -> None:
        db.session.execute(sa.insert(Note).values(text=text))
        db.session.commit()
        db.session.execute(sa.insert(Note).values(text=f"{text}, again"))

    @bq.processor()
    def exchange() -> None:
        """Past its own context, which has used no session."""
        g.exchanges = True

    def end(error: Any) -> None:
        if g.get("exchanges"):
            sessions.reverse()
            db.session = sessions[0]

    app.teardown_appcontext_funcs.insert(0, end)  # the last
    with app.app_context():
        for text in ("first", "second", "third"):
            write.enqueue(text=text)
            exchange.enqueue()
        db.session.commit()
        engine = db.engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def count(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "FOR NO KEY UPDATE" in statement and current_task:
            locks.append(statement)

    work(concurrency=1)
    assert texts(app, db, Note) == [
        each for text in ("first", "second", "third") for each in (text, f"{text}, again")
    ]
    assert len(locks) == 3  # one for each commit halfway


def a_session(app: Flask, db: Any) -> Any:
    with app.app_context():
        return Session(db.engine)


def of_a_function(app: Flask, db: Any) -> Any:
    session = a_session(app, db)
    return scoped_session(lambda: session)


@pytest.mark.parametrize("make", [a_session, of_a_function])
def test_a_session_that_cannot_be_watched_is_refused(
    app: Flask, db: Any, bq: BeanQueue, make: Any
) -> None:
    before = db.session
    db.session = make(app, db)
    with pytest.raises(RuntimeError, match=r"write db\.session = scoped_session\(sessionmaker\("):
        bq.process_tasks(["default"], app=app, burst=True)
    db.session = before


def test_a_session_that_cannot_be_watched_is_refused_before_a_task_begins(
    app: Flask, db: Any, bq: BeanQueue, work: Work, database_url: str
) -> None:
    ran = []
    sessions = of_a_function(app, db)

    @bq.processor()
    def exchange() -> None:
        app.teardown_appcontext_funcs.insert(0, lambda error: setattr(db, "session", sessions))

    @bq.processor()
    def run() -> None:
        ran.append(1)

    with app.app_context():
        exchange.enqueue()
        run.enqueue()
        db.session.commit()
    work(concurrency=1)
    [(state, error)] = query(
        database_url, "SELECT state, error_message FROM bq_tasks WHERE func_name = 'run'"
    )
    assert state == "FAILED"
    assert "in the place of db.session" in error
    assert ran == []


# Sessions that choose where they go.


class ByClause(flask_sqlalchemy.session.Session):
    """As SQLAlchemy's documentation has it: a replica is asked for all but flushes and writes."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **more: Any) -> Any:
        if self._flushing or isinstance(clause, sa.UpdateBase):  # type: ignore[attr-defined]
            return super().get_bind(mapper, clause, **more)
        return self._db.engines["replica"]


class ByFlush(flask_sqlalchemy.session.Session):
    """As its documentation once had it, for the ORM alone."""

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Any:  # type: ignore[override]
        if self._flushing:  # type: ignore[attr-defined]
            return super().get_bind(mapper, clause)
        return self._db.engines["replica"]


class ByMapper(flask_sqlalchemy.session.Session):
    """As it has it for models that lie elsewhere; what it is asked about is a mapper."""

    def get_bind(self, mapper: Any = None, *args: Any, **more: Any) -> Any:
        if mapper is not None and issubclass(mapper.class_, str):
            return self._db.engines["replica"]
        return super().get_bind(mapper, *args, **more)


class WithOptions(flask_sqlalchemy.session.Session):
    """For whom the same engine is to do something differently."""

    def get_bind(self, *args: Any, **more: Any) -> Any:
        engine = super().get_bind(*args, **more)
        return vars(engine).setdefault("for_sessions", engine.execution_options(mine=True))


class Routed(NamedTuple):
    app: Flask
    db: Any
    bq: BeanQueue
    Note: Any


@pytest.fixture(params=[ByClause, ByFlush, ByMapper, WithOptions])
def class_(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[None, "queue"], ids=["default", "bind"])
def routed(
    request: pytest.FixtureRequest, class_: Any, make_app: MakeApp, database_url: str
) -> Routed:
    """An app whose session sends reads to a replica, which takes no writes."""
    db = SQLAlchemy(session_options={"class_": class_})
    bq = BeanQueue(db=db, bind_key=request.param)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = request.param
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)
        __table_args__ = (sa.UniqueConstraint("text", deferrable=True, initially="DEFERRED"),)

    read_only = {"options": "-c default_transaction_read_only=on"}
    binds: dict[str, Any] = {"replica": {"url": database_url, "connect_args": read_only}}
    if request.param is not None:
        binds[request.param] = database_url
    return Routed(make_app(db, bq, SQLALCHEMY_BINDS=binds), db, bq, Note)


def test_what_a_task_does_in_a_routed_session_is_one_with_its_completion(routed: Routed) -> None:
    app, db, bq, Note = routed

    def act() -> None:
        db.session.add(Note(text="written"))
        db.session.flush()
        db.session.scalars(sa.select(Note)).all()

    assert do_one(app, db, bq, act).state == "DONE"
    assert texts(app, db, Note) == ["written"]


def test_a_routed_session_whose_commit_fails_commits_nothing(routed: Routed) -> None:
    """Had it a transaction for the completion alone, that might go through."""
    app, db, bq, Note = routed

    def act() -> None:
        db.session.add_all([Note(text="twice"), Note(text="twice")])

    task = do_one(app, db, bq, act)
    assert (task.state, texts(app, db, Note)) == ("FAILED", [])
    assert "IntegrityError" in task.error_message


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_commit_halfway_of_a_routed_session_is_fenced(
    routed: Routed, is_lost: bool, database_url: str
) -> None:
    app, db, bq, Note = routed

    def act() -> None:
        db.session.add(Note(text="halfway"))
        if is_lost:
            query(database_url, TAKE_AWAY)
        db.session.commit()

    assert do_one(app, db, bq, act).state == ("PROCESSING" if is_lost else "DONE")
    assert texts(app, db, Note) == ([] if is_lost else ["halfway"])


def test_a_task_sets_its_state_in_a_routed_session(routed: Routed) -> None:
    app, db, bq, _ = routed

    def act() -> None:
        current_task.state = "CANCELLED"

    assert do_one(app, db, bq, act).state == "CANCELLED"


def test_many_tasks_are_enqueued_in_a_routed_session_with_its_rows(
    routed: Routed, database_url: str
) -> None:
    app, db, bq, Note = routed

    @bq.processor()
    def nothing() -> None:
        pass

    with app.app_context():
        for text in ("never", "written"):
            db.session.add(Note(text=text))
            db.session.flush()
            nothing.enqueue_many([{}, {}])
            assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]
            if text == "never":
                db.session.rollback()
        db.session.add(Note(text="written"))
        with pytest.raises(sa.exc.IntegrityError):
            db.session.commit()
        assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_view_ends_a_task_in_a_routed_session(
    routed: Routed, end: str, database_url: str
) -> None:
    app, db, bq, Note = routed

    @bq.processor(auto_complete=False)
    def wait() -> None:
        db.session.add(Note(text="waits"))

    with app.app_context():
        wait.enqueue()
        db.session.commit()
        bq.process_tasks(app=app, burst=True)
        [(task_id,)] = query(database_url, "SELECT id FROM bq_tasks")
        if end == "complete":
            bq.complete(task_id)
        else:
            bq.fail(task_id, error="no")
        db.session.commit()
    assert query(database_url, "SELECT state FROM bq_tasks") == [
        ("DONE" if end == "complete" else "FAILED",)
    ]


def test_an_exchanged_session_with_an_engine_of_its_own_is_one_transaction_with_the_queue(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, database_url: str
) -> None:
    query(database_url, "ALTER TABLE note ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
    engine = sa.create_engine(database_url)
    db.session = scoped_session(sessionmaker(bind=engine))

    def act() -> None:
        db.session.add_all([Note(text="twice"), Note(text="twice")])

    assert do_one(app, db, bq, act).state == "FAILED"
    assert query(database_url, "SELECT * FROM note") == []
    engine.dispose()


@pytest.mark.parametrize("way", ["engines", "session"])
def test_a_test_that_is_rolled_back_enqueues_tasks_and_cannot_have_a_worker_do_them(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, database_url: str, way: str
) -> None:
    @bq.processor()
    def write(text: str) -> None:
        db.session.add(Note(text=text))

    with app.app_context():
        engine, sessions = db.engine, db.session
        with engine.connect() as connection, connection.begin() as transaction:
            if way == "engines":
                db.engines[None] = connection
            else:
                db.session = scoped_session(sessionmaker(bind=connection))
            db.session.add(Note(text="a row", task=write.run(text="never")))
            write.enqueue_many([{"text": "never"}] * 2)
            db.session.commit()
            assert db.session.query(bq.Task).count() == 3
            with pytest.raises(RuntimeError, match="Call the processor like a function, or let"):
                bq.process_tasks(burst=True)
            write(text="called")
            db.session.commit()
            assert {note.text for note in db.session.query(Note)} == {"a row", "called"}
            db.session.remove()
            transaction.rollback()
        db.engines[None], db.session = engine, sessions
        bq.process_tasks(burst=True)
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]
    assert texts(app, db, Note) == []


# Sessions for which tables are elsewhere.

TENANT = {"schema_translate_map": {None: "tenant_a"}}


def enqueue(db: Any, processor: Any) -> None:
    processor.enqueue()
    db.session.flush()


def add(db: Any, processor: Any) -> None:
    db.session.add(processor.run())
    db.session.flush()


def enqueue_many(db: Any, processor: Any) -> None:
    processor.enqueue_many([{}])


def cancel(db: Any, processor: Any) -> None:
    task = db.session.query(processor.queue.Task).one()
    task.state = "CANCELLED"
    db.session.flush()


@pytest.mark.parametrize("way", [enqueue, add, enqueue_many, cancel])
@pytest.mark.parametrize("whose", ["session", "engine", "connection"])
def test_tasks_are_not_written_where_no_worker_looks(
    app: Flask, db: Any, bq: BeanQueue, way: Any, whose: str, database_url: str
) -> None:
    @bq.processor()
    def nothing() -> None:
        pass

    query(database_url, "CREATE SCHEMA tenant_a")
    if way is cancel:
        query(database_url, "CREATE TABLE tenant_a.bq_tasks (LIKE bq_tasks INCLUDING ALL)")
        query(database_url, "INSERT INTO tenant_a.bq_tasks (module, func_name) VALUES ('a', 'b')")
    with app.app_context():
        if whose == "session":
            db.session.connection(execution_options=TENANT)
        elif whose == "engine":
            db.engine.update_execution_options(**TENANT)
        else:
            db.session.connection().execution_options(**TENANT)
        with pytest.raises(RuntimeError, match="moves bq_tasks to the schema 'tenant_a'"):
            way(db, nothing)
        db.session.rollback()
        if whose == "engine":
            with pytest.raises(RuntimeError, match="moves bq_workers to the schema 'tenant_a'"):
                bq.process_tasks(burst=True)


def test_a_map_that_leaves_the_queues_schema_alone_is_fine(
    make_app: MakeApp, database_url: str
) -> None:
    db: Any = SQLAlchemy()

    class Task(TaskModelMixin, TaskModelRefWorkerMixin, db.Model):
        __tablename__ = "tasks"
        __table_args__ = {"schema": "queue"}  # noqa: RUF012
        bq_worker_table = "queue.workers"
        bq_worker_class = "Worker"

    class Worker(WorkerModelMixin, WorkerRefMixin, db.Model):
        __tablename__ = "workers"
        __table_args__ = {"schema": "queue"}  # noqa: RUF012
        bq_task_class = "Task"

    class Event(EventModelMixin, EventModelRefTaskMixin, db.Model):
        __tablename__ = "events"
        __table_args__ = {"schema": "queue"}  # noqa: RUF012
        bq_task_table = "queue.tasks"
        bq_task_class = "Task"
        bq_task_events = None

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)

    bq = BeanQueue(db=db, task_model=Task, worker_model=Worker, event_model=Event)
    query(database_url, "CREATE SCHEMA queue")
    query(database_url, "CREATE SCHEMA tenant_a")
    options = {"execution_options": TENANT}
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options)

    @bq.processor()
    def more(task: Any) -> None:
        assert task.created_at is not None

    def act() -> None:
        db.session.add(Note(text="written"))
        more.enqueue()
        more.enqueue_many([{}])

    @bq.processor()
    def do() -> None:
        act()

    with app.app_context():
        do.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert query(database_url, "SELECT state FROM queue.tasks") == [("DONE",)] * 3
    assert query(database_url, "SELECT text FROM tenant_a.note") == [("written",)]


def test_a_task_may_work_for_a_tenant_whose_tables_have_another_schema(
    app: Flask, db: Any, bq: BeanQueue, Note: Any, database_url: str
) -> None:
    query(database_url, "CREATE SCHEMA tenant_a CREATE TABLE note (LIKE public.note INCLUDING ALL)")

    def act() -> None:
        db.session.connection(execution_options=TENANT)
        db.session.execute(sa.insert(Note).values(id=1, text="a tenant's"))

    assert do_one(app, db, bq, act).state == "DONE"
    assert query(database_url, "SELECT text FROM tenant_a.note") == [("a tenant's",)]


# Sessions whose commit has two phases.


@pytest.fixture(scope="module")
def preparing_server() -> Iterator[postgres.Server]:
    """A PostgreSQL that prepares transactions, as it does only if it is told so."""
    settings = [*postgres.FAST, "max_prepared_transactions=10"]
    with postgres.running(settings=settings) as server:
        yield server


class TwoPhases(NamedTuple):
    app: Flask
    db: Any
    bq: BeanQueue
    Note: Any
    url: str


@pytest.fixture
def two_phases(make_app: MakeApp, preparing_server: postgres.Server) -> Iterator[TwoPhases]:
    db = SQLAlchemy(session_options={"twophase": True})
    bq = BeanQueue(db=db)

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)

    with postgres.database(preparing_server.url) as url:
        app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=with_driver(url))
        yield TwoPhases(app, db, bq, Note, url)


def test_tasks_are_enqueued_in_two_phases_and_done_in_two(two_phases: TwoPhases) -> None:
    """Without NOTIFY, which cannot be prepared."""
    app, db, bq, Note, url = two_phases
    told = []

    @bq.processor(retry_policy=LimitAttempt(2))
    def write(db: Any, task: Any, text: str) -> None:
        db.add(Note(text=f"{text} {task.attempts}"))
        db.commit()
        db.add(Note(text=f"{text} {task.attempts}, again"))
        more.enqueue()
        more.enqueue_many([{}])
        db.flush()
        if text == "fails" and task.attempts == 0:
            raise ValueError

    @bq.processor(auto_complete=False)
    def more() -> None:
        pass

    @bq.processor()
    def again(task: Any) -> None:
        if task.claims == 1:
            task.state = "PENDING"

    with contextlib.closing(Probe(url, "default")) as ears, app.app_context():
        write.enqueue(text="works")
        write.enqueue_many([{"text": "fails"}])
        again.enqueue()
        with db.session.begin_nested():
            again.enqueue()
        db.session.commit()
        told.append(ears.poll())
        bq.process_tasks(burst=True)
        for task in db.session.scalars(sa.select(bq.Task).filter_by(func_name="more")):
            bq.complete(task.id)
        db.session.commit()
        states = db.session.scalars(sa.select(bq.Task.state)).all()
        assert list(states) == ["DONE"] * 8
    assert told == [[]]
    assert sorted(texts(app, db, Note)) == [
        *("fails 0", "fails 1", "fails 1, again", "works 0", "works 0, again")
    ]
    assert query(url, "SELECT gid FROM pg_prepared_xacts") == []


def test_a_commit_of_two_phases_is_fenced(two_phases: TwoPhases) -> None:
    app, db, bq, Note, url = two_phases

    def act() -> None:
        db.session.add(Note(text="never"))
        query(url, TAKE_AWAY)
        db.session.commit()

    assert do_one(app, db, bq, act).state == "PROCESSING"
    assert texts(app, db, Note) == []
    assert query(url, "SELECT gid FROM pg_prepared_xacts") == []


def test_a_worker_polls_for_what_is_enqueued_in_two_phases(two_phases: TwoPhases) -> None:
    app, db, bq, Note, url = two_phases
    app.config["BQ_POLL_TIMEOUT"] = 0.2

    @bq.processor()
    def write(db: Any) -> None:
        db.add(Note(text="written"))

    with running(app, bq), app.app_context():
        write.enqueue()
        db.session.commit()
        wait_until(lambda: query(url, "SELECT text FROM note"))


def test_a_task_that_is_enqueued_in_a_prepared_transaction_is_refused(
    two_phases: TwoPhases,
) -> None:
    """It would not be committed with it."""
    app, db, bq, _, url = two_phases

    @bq.processor()
    def nothing() -> None:
        pass

    with app.app_context():
        nothing.enqueue()
        db.session().prepare()
        with pytest.raises(RuntimeError, match="Enqueue before the commit"):
            nothing.enqueue()
        db.session.commit()
    assert query(url, "SELECT count(*) FROM bq_tasks") == [(1,)]


def test_a_task_whose_transaction_cannot_be_prepared_fails(
    make_app: MakeApp, database_url: str
) -> None:
    """As any commit of the app's does."""
    db = SQLAlchemy(session_options={"twophase": True})
    bq = BeanQueue(db=db)
    app = make_app(db, bq)

    @bq.processor()
    def read(db: Any) -> None:
        db.execute(sa.text("SELECT 1"))

    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES (%s, 'read')", __name__)
    bq.process_tasks(app=app, burst=True)
    [(state, error)] = query(database_url, "SELECT state, error_message FROM bq_tasks")
    assert state == "FAILED"
    # The second is how an early SQLAlchemy 2.0 goes on after the first.
    assert "prepared transaction" in error or "IllegalStateChangeError" in error


def test_a_session_is_watched_that_lies_where_another_was(
    app: Flask, db: SQLAlchemy, bq: BeanQueue
) -> None:
    for _ in range(300):
        db.session = db._make_scoped_session({})
        fence.watch(bq)
        with app.app_context():
            assert fence.before_commit in db.session().dispatch.before_commit
