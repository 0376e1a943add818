"""The extension: ways to set it up, and wrong ways."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_beanqueue
from flask_beanqueue import BeanQueue, Config

from .conftest import MakeApp
from .probe import query

Work = Callable[..., None]

#: A database that is not there.
URL = "postgresql+psycopg2://nowhere.invalid/none"


@pytest.fixture
def plain_app() -> Flask:
    """An app whose database is not there, for what must not need it."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = URL
    return app


def does_a_task(app: Flask, bq: BeanQueue) -> None:
    seen = []

    @bq.processor()
    def look(db: Any, number: int) -> None:
        seen.append((db.scalar(sa.text("SELECT current_database()")), number))

    with app.app_context():
        bq.db.create_all()
        look.enqueue(number=1)
        bq.db.session.commit()
        name = bq.engine(app).url.database
    bq.process_tasks(app=app, burst=True)
    assert seen == [(name, 1)]


# What it is called.


def test_a_worker_is_the_model_and_the_loop_is_not_exported(bq: BeanQueue) -> None:
    assert issubclass(bq.Worker, flask_beanqueue.WorkerModelMixin)
    assert not hasattr(flask_beanqueue, "Worker")


def test_all_that_is_exported_is_there() -> None:
    assert len(set(flask_beanqueue.__all__)) == len(flask_beanqueue.__all__)
    for name in flask_beanqueue.__all__:
        assert hasattr(flask_beanqueue, name)


# Ways to set it up.


def test_with_the_app_alone(make_app: MakeApp) -> None:
    app = make_app(SQLAlchemy())
    does_a_task(app, BeanQueue(app))


def test_with_the_db_and_the_app_later(make_app: MakeApp) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db)
    assert bq.Task.__table__ in db.metadata.tables.values()  # at once, for migrations
    does_a_task(make_app(db, bq), bq)


def test_with_nothing_and_the_app_later(make_app: MakeApp) -> None:
    bq = BeanQueue()
    does_a_task(make_app(SQLAlchemy(), bq), bq)


def test_with_both(make_app: MakeApp) -> None:
    db = SQLAlchemy()
    app = make_app(db)
    bq = BeanQueue(app, db=db)
    assert bq.db is db
    does_a_task(app, bq)


def test_processors_may_be_registered_before_the_db_is_known(make_app: MakeApp) -> None:
    bq = BeanQueue()

    @bq.processor()
    def look() -> None:
        pass

    make_app(SQLAlchemy(), bq)
    assert look.run().func_name == "look"


def test_setting_it_up_needs_no_database(plain_app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    db.init_app(plain_app)
    bq.init_app(plain_app)
    assert plain_app.extensions["beanqueue"] is bq
    assert "bq" in plain_app.cli.commands


def test_the_settings_are_in_the_apps_config(
    plain_app: Flask, db: SQLAlchemy, bq: BeanQueue
) -> None:
    plain_app.config["BQ_BATCH_SIZE"] = 7
    db.init_app(plain_app)
    bq.init_app(plain_app)
    assert bq.config(plain_app) == Config(BATCH_SIZE=7)
    for name, value in vars(Config(BATCH_SIZE=7)).items():
        assert plain_app.config[f"BQ_{name}"] == value


def test_two_apps_share_a_queue_and_do_their_own_tasks(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    Note: Any,
    database_url: str,
    other_database_url: str,
) -> None:
    @bq.processor()
    def write(text: str) -> None:
        bq.db.session.add(Note(text=text))

    one = make_app(db, bq)
    other = make_app(db, bq, SQLALCHEMY_DATABASE_URI=other_database_url, BQ_BATCH_SIZE=3)
    assert (bq.config(one).BATCH_SIZE, bq.config(other).BATCH_SIZE) == (1000, 3)
    for app, text in ((one, "one"), (other, "other")):
        with app.app_context():
            write.enqueue(text=text)
            db.session.commit()
    bq.process_tasks(app=one, burst=True)
    assert query(database_url, "SELECT text FROM note") == [("one",)]
    assert query(other_database_url, "SELECT text FROM note") == []
    bq.process_tasks(app=other, burst=True)
    assert query(database_url, "SELECT text FROM note") == [("one",)]
    assert query(other_database_url, "SELECT text FROM note") == [("other",)]


# Wrong ways.


def test_the_db_in_the_apps_place_is_refused(db: SQLAlchemy) -> None:
    with pytest.raises(TypeError, match=r"Write BeanQueue\(db=db\)"):
        BeanQueue(db)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"app": "app"}, "app must be a Flask app, not 'app'"),
        ({"app": False}, "app must be a Flask app, not False"),
        ({"db": "db"}, r"db must be Flask-SQLAlchemy's SQLAlchemy\(\), not 'db'"),
        (
            {"db": Flask("demo")},
            r"db must be Flask-SQLAlchemy's SQLAlchemy\(\), not <Flask 'demo'>",
        ),
        (
            {"task_model": "a.Task"},
            "task_model must be a model's class, not 'a.Task'.*BQ_TASK_MODEL",
        ),
        ({"worker_model": "a.Worker"}, "worker_model must be a model's class.*BQ_WORKER_MODEL"),
        ({"event_model": 5}, "event_model must be a model's class, not 5"),
    ],
)
def test_arguments_of_wrong_types_are_refused_and_leave_no_trace(
    plain_app: Flask, db: SQLAlchemy, arguments: dict[str, Any], message: str
) -> None:
    db.init_app(plain_app)
    with pytest.raises(TypeError, match=message):
        BeanQueue(**{"app": plain_app, "db": db, **arguments})
    assert BeanQueue(plain_app, db).db is db


def test_what_is_no_app_is_refused_by_init_app(db: SQLAlchemy, bq: BeanQueue) -> None:
    with pytest.raises(TypeError, match=r"The app must be a Flask app\. Write BeanQueue\(db=db\)"):
        bq.init_app(db)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="app must be a Flask app, not 'app'"):
        bq.init_app("app")  # type: ignore[arg-type]


def test_an_app_without_flask_sqlalchemy_is_refused(plain_app: Flask, bq: BeanQueue) -> None:
    with pytest.raises(RuntimeError, match=r"Call db\.init_app\(app\) before bq\.init_app\(app\)"):
        bq.init_app(plain_app)
    with pytest.raises(RuntimeError, match=r"make SQLAlchemy\(app\) first"):
        BeanQueue(plain_app)


def test_one_app_twice_is_refused(plain_app: Flask, db: SQLAlchemy) -> None:
    db.init_app(plain_app)
    bq = BeanQueue(plain_app, db=db)
    with pytest.raises(RuntimeError, match=r"already registered on this app.*drop the second"):
        bq.init_app(plain_app)
    with pytest.raises(RuntimeError, match="already registered on this app"):
        BeanQueue(plain_app)


def test_two_queues_on_one_db_are_refused(plain_app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    with pytest.raises(RuntimeError, match="has a BeanQueue already"):
        BeanQueue(db=db)
    db.init_app(plain_app)
    with pytest.raises(RuntimeError, match="has a BeanQueue already"):
        BeanQueue(plain_app)


def test_another_db_than_the_apps_is_refused(plain_app: Flask, bq: BeanQueue) -> None:
    SQLAlchemy(plain_app)
    with pytest.raises(RuntimeError, match=r"belongs to another SQLAlchemy\(\) than the app's"):
        bq.init_app(plain_app)


@pytest.mark.parametrize("name", ["Task", "Worker", "Event", "models"])
def test_models_of_an_unknown_db_say_how_to_have_them(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"Write BeanQueue\(db=db\) to have them at once"):
        getattr(BeanQueue(), name)


def test_an_unknown_db_says_how_to_have_it() -> None:
    with pytest.raises(RuntimeError, match=r"Write BeanQueue\(db=db\), or use it after"):
        _ = BeanQueue().db


def test_an_app_that_is_not_set_up_is_refused(plain_app: Flask, bq: BeanQueue) -> None:
    with pytest.raises(RuntimeError, match=rf"'{__name__}' is not set up.*bq\.init_app\(app\)"):
        bq.config(plain_app)
    with pytest.raises(RuntimeError, match=rf"'{__name__}' is not set up"):
        bq.process_tasks(["default"], app=plain_app)


def refused(app: Flask, db: SQLAlchemy, bq: BeanQueue, message: str, **config: Any) -> None:
    app.config.update(config)
    db.init_app(app)
    with pytest.raises(RuntimeError, match=message):
        bq.init_app(app)
    assert "beanqueue" not in app.extensions
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


def test_another_kind_of_database_is_refused(
    plain_app: Flask, db: SQLAlchemy, bq: BeanQueue
) -> None:
    message = r"needs PostgreSQL, but the database is sqlite\. .*bind_key"
    refused(plain_app, db, bq, message, SQLALCHEMY_DATABASE_URI="sqlite://")


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "autocommit"},
        {"execution_options": {"isolation_level": "AUTOCOMMIT"}},
    ],
    ids=str,
)
def test_autocommit_is_refused(
    plain_app: Flask, db: SQLAlchemy, bq: BeanQueue, options: Any
) -> None:
    refused(plain_app, db, bq, "The engine is in AUTOCOMMIT", SQLALCHEMY_ENGINE_OPTIONS=options)


@pytest.mark.parametrize("bind_key", [None, "queue"])
def test_a_map_that_renames_the_schema_of_the_queues_tables_is_refused(
    plain_app: Flask, db: SQLAlchemy, bind_key: str | None
) -> None:
    """Workers would look into another table than the ORM."""
    options = {"execution_options": {"schema_translate_map": {None: "tenant_a"}}}
    refused(
        plain_app,
        db,
        BeanQueue(db=db, bind_key=bind_key),
        "moves bq_workers to the schema 'tenant_a', where no worker looks: make tables",
        SQLALCHEMY_BINDS={"queue": {"url": URL, **(options if bind_key else {})}},
        SQLALCHEMY_ENGINE_OPTIONS={} if bind_key else options,
    )


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_isolation_levels_of_the_apps_own_are_fine(make_app: MakeApp, level: str) -> None:
    bq = BeanQueue()
    options = {"isolation_level": level}
    does_a_task(make_app(SQLAlchemy(), bq, SQLALCHEMY_ENGINE_OPTIONS=options), bq)


def test_an_unknown_driver_is_refused(plain_app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    driver = types.SimpleNamespace(paramstyle="format", __version__="1.31.0", Error=Exception)
    refused(
        plain_app,
        db,
        bq,
        r"psycopg2 and psycopg 3, not with pg8000\. Use a postgresql\+psycopg2://",
        SQLALCHEMY_DATABASE_URI="postgresql+pg8000://nowhere.invalid/none",
        SQLALCHEMY_ENGINE_OPTIONS={"module": driver},
    )


def test_a_bind_that_is_missing_is_named(plain_app: Flask, db: SQLAlchemy) -> None:
    bq = BeanQueue(db=db, bind_key="queue")
    refused(plain_app, db, bq, r"lives in the bind 'queue': set SQLALCHEMY_BINDS\['queue'\]")


def test_a_default_database_that_is_missing_is_named(db: SQLAlchemy, bq: BeanQueue) -> None:
    app = Flask(__name__)
    binds = {"other": URL}
    refused(app, db, bq, "set SQLALCHEMY_DATABASE_URI", SQLALCHEMY_BINDS=binds)


def test_a_queue_in_a_bind_does_not_mind_the_default_database(
    make_app: MakeApp, database_url: str
) -> None:
    db = SQLAlchemy()
    bq = BeanQueue(db=db, bind_key="queue")
    app = make_app(
        db,
        bq,
        SQLALCHEMY_DATABASE_URI="sqlite://",
        SQLALCHEMY_BINDS={"queue": database_url},
    )
    seen = []

    @bq.processor()
    def look() -> None:
        seen.append(1)

    with app.app_context():
        look.enqueue()
        db.session.commit()
    bq.process_tasks(app=app, burst=True)
    assert seen == [1]


# process_tasks


def test_a_worker_takes_the_current_app(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    seen = []

    @bq.processor()
    def look() -> None:
        seen.append(1)

    with app.app_context():
        look.enqueue()
        db.session.commit()
        bq.process_tasks(burst=True)
    assert seen == [1]


def test_a_worker_without_an_app_is_refused(bq: BeanQueue) -> None:
    with pytest.raises(RuntimeError, match=r"Give app=, or call this in an app context"):
        bq.process_tasks(["default"])


def test_one_channel_as_plain_text_is_refused(app: Flask, bq: BeanQueue) -> None:
    with pytest.raises(TypeError, match=r"write channels=\('images',\)"):
        bq.process_tasks("images", app=app)


def test_a_worker_with_nothing_to_work_on_is_refused(app: Flask, bq: BeanQueue) -> None:
    with pytest.raises(RuntimeError, match=r"no processor is registered.*BQ_PROCESSOR_PACKAGES"):
        bq.process_tasks(app=app)


def test_a_worker_does_only_the_channels_that_it_is_given(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []

    def make(channel: str) -> Any:
        def look() -> None:
            seen.append(channel)

        look.__name__ = f"look_{channel}"
        return bq.processor(channel=channel)(look)

    with app.app_context():
        for channel in ("a", "b", "c"):
            make(channel).enqueue()
        db.session.commit()
    work("c", "a", "c")
    assert sorted(seen) == ["a", "c"]
    work()
    assert sorted(seen) == ["a", "b", "c"]


@pytest.mark.parametrize("way", ["argument", "config"])
def test_more_tasks_at_once_than_connections_are_refused(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, way: str
) -> None:
    options = {"pool_size": 2, "max_overflow": 2}
    config = {"BQ_CONCURRENCY": 5} if way == "config" else {}
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options, **config)
    concurrency = 5 if way == "argument" else None
    with pytest.raises(ValueError, match=r'5 tasks at once .* at most 4\. .*"pool_size": 5'):
        bq.process_tasks(["default"], app=app, concurrency=concurrency)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 2, "max_overflow": 2},
        {"pool_size": 1, "max_overflow": -1},
        {"pool_size": 0},
        {"poolclass": sa.NullPool},
    ],
    ids=str,
)
def test_as_many_tasks_at_once_as_connections_are_fine(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, options: Any
) -> None:
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS=options)
    bq.process_tasks(["default"], app=app, concurrency=4, burst=True)


def test_a_pool_of_one_connection_for_all_threads_is_refused(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue
) -> None:
    """What one of them rolls back, all others lose."""
    app = make_app(db, bq, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.StaticPool})
    with pytest.raises(ValueError, match=r"is a StaticPool, .* SQLALCHEMY_ENGINE_OPTIONS"):
        bq.process_tasks(["default"], app=app)


@pytest.mark.parametrize("make", ["worker", "process_tasks"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": [""]}, ValueError, r"channel must not be empty or hold U\+0000: ''"),
        ({"channels": ["a", "b\0"]}, ValueError, r"channel must not be empty or hold U\+0000: 'b"),
        ({"channels": ["a", 5]}, TypeError, "channel must be text, not 5"),
        ({"channels": [["a"]]}, TypeError, r"channel must be text, not \['a'\]"),
        ({"channels": b"a"}, TypeError, "channel must be text, not 97"),
        ({"channels": None}, TypeError, r"not None: write channels=\('default',\), or leave it"),
        ({"concurrency": 0}, ValueError, "concurrency must be 1 or more, not 0"),
        ({"concurrency": -1}, ValueError, "concurrency must be 1 or more, not -1"),
        ({"concurrency": True}, TypeError, "concurrency must be a whole number, not True"),
        ({"concurrency": 2.0}, TypeError, r"concurrency must be a whole number, not 2\.0"),
        ({"concurrency": "2"}, TypeError, "concurrency must be a whole number, not '2'"),
        ({"name": ""}, ValueError, r"name must not be empty or hold U\+0000: ''"),
        ({"name": "a\0b"}, ValueError, r"name must not be empty or hold U\+0000: 'a"),
        ({"name": 5}, TypeError, "name must be text, not 5"),
        ({"app": "app"}, TypeError, "app must be a Flask app, not 'app'"),
        ({"treads": 2}, TypeError, r"unexpected keyword argument 'treads'"),
    ],
)
def test_a_worker_with_wrong_options_is_refused(
    app: Flask,
    bq: BeanQueue,
    make: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        getattr(bq, make)(**{"channels": ["default"], "app": app, **options})


def test_a_name_of_ones_own_is_in_the_workers_row(
    app: Flask, bq: BeanQueue, work: Work, database_url: str
) -> None:
    work("default", "images", "default", name="the-worker")
    assert query(database_url, "SELECT name, channels, state FROM bq_workers") == [
        ("the-worker", ["default", "images"], "SHUTDOWN")
    ]
