from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import settings

from flask_beanqueue import BeanQueue

from . import postgres, stage
from .probe import Probe
from .processes import Processes
from .stage import End

# A machine under load may be slow at any time.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
# Under nohup, what the tests start would outlive its terminal; and in the background of a shell it
# would ignore SIGINT, as the shell has it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and "processes" in item.fixturenames:
            item.add_marker("processes")


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The PostgreSQL to test on: TEST_DATABASE_URL, or one of our own."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with postgres.server(fast=True) as url:
            yield url


def with_driver(url: str) -> str:
    driver = os.environ.get("TEST_DRIVER", "psycopg2")
    return f"postgresql+{driver}://{url.partition('://')[2]}"


@pytest.fixture(scope="session")
def own_databases(server_url: str) -> Iterator[list[str]]:
    """The two databases of this test process."""
    with postgres.database(server_url) as first, postgres.database(server_url) as second:
        yield [first, second]


@pytest.fixture
def database_url(own_databases: list[str]) -> Iterator[str]:
    """An empty database; TEST_DRIVER=psycopg reaches it with psycopg 3."""
    yield with_driver(own_databases[0])
    postgres.empty(own_databases[0])


@pytest.fixture
def other_database_url(own_databases: list[str]) -> Iterator[str]:
    """A second one."""
    yield with_driver(own_databases[1])
    postgres.empty(own_databases[1])


@pytest.fixture(scope="module")
def end_all(own_databases: list[str]) -> Callable[..., dict[str, End]]:
    """Let a worker do acts, each in a task, and tell how they ended."""
    return functools.partial(stage.end_all, with_driver(own_databases[0]))


MakeApp = Callable[..., Flask]


@pytest.fixture
def make_app(database_url: str) -> Iterator[MakeApp]:
    """Makes apps on the test's database whose extensions and tables are set up."""
    apps: list[tuple[Flask, SQLAlchemy]] = []

    def make(db: SQLAlchemy, bq: BeanQueue | None = None, **config: Any) -> Flask:
        app = Flask("tests", root_path=str(Path(__file__).parent))
        app.config.from_mapping(SQLALCHEMY_DATABASE_URI=database_url, TESTING=True)
        app.config.update(config)
        db.init_app(app)
        if bq is not None:
            bq.init_app(app)
        apps.append((app, db))
        with app.app_context():
            db.create_all()
        return app

    yield make
    for app, db in apps:
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()


@pytest.fixture
def db() -> SQLAlchemy:
    return SQLAlchemy()


@pytest.fixture
def bq(db: SQLAlchemy) -> BeanQueue:
    return BeanQueue(db=db)


@pytest.fixture
def Note(db: SQLAlchemy, bq: BeanQueue) -> Any:
    """A table of the app's own, for effects to show in."""

    class Note(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        text = sa.Column(sa.Text, nullable=False)
        task_id = sa.Column(sa.ForeignKey("bq_tasks.id"))
        task = sa.orm.relationship("BQTask")

    return Note


def texts(app: Flask, db: SQLAlchemy, Note: Any) -> list[str]:
    """What processors have written."""
    with app.app_context():
        return list(db.session.scalars(sa.select(Note.text).order_by(Note.id)))


def only_task(app: Flask, bq: BeanQueue) -> Any:
    """The only task there is, as it was committed."""
    with app.app_context():
        return bq.db.session.scalars(sa.select(bq.Task)).one()


@pytest.fixture
def app(make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, Note: Any) -> Flask:
    return make_app(db, bq)


@pytest.fixture
def work(app: Flask, bq: BeanQueue) -> Callable[..., None]:
    """Do all tasks that are due, in a worker in this process."""

    def work(*channels: str, **options: Any) -> None:
        bq.process_tasks(channels, app=app, burst=True, **options)

    return work


@contextlib.contextmanager
def running(app: Flask, bq: BeanQueue, *channels: str, **options: Any) -> Iterator[Any]:
    """A worker in a thread of this process."""
    worker = bq.worker(channels, app=app, **options)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(30)
        assert not thread.is_alive()


def parameters(connection: Any) -> dict[str, str]:
    """What libpq was given for a connection of the driver's."""
    info = connection.info
    return dict(info.get_parameters() if hasattr(info, "get_parameters") else info.dsn_parameters)


@pytest.fixture
def probe(database_url: str) -> Iterator[Probe]:
    with contextlib.closing(Probe(database_url)) as probe:
        yield probe


@pytest.fixture
def processes(database_url: str) -> Iterator[Processes]:
    with contextlib.closing(Processes(database_url)) as processes:
        yield processes
