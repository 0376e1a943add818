"""Flask-Migrate finds the queue's tables with the app's own."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .probe import query
from .processes import Process, Processes

APP = """
import os
import warnings

import sqlalchemy as sa
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

# From the env.py that Flask-Migrate writes.
warnings.filterwarnings("ignore", "'get_engine' is deprecated", DeprecationWarning)

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
db = SQLAlchemy(METADATA)
bq = BeanQueue(db=db)
db.init_app(app)
bq.init_app(app)
Migrate(app, db)


class Image(db.Model):
    id = sa.Column(sa.Integer, primary_key=True)
    task_id = sa.Column(sa.ForeignKey("bq_tasks.id"))


@bq.processor()
def resize(db, width):
    db.add(Image())
    return width
"""

NAMING = """
    metadata=sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
"""


Flask = Callable[..., Process]


@pytest.fixture
def make_flask(processes: Processes, tmp_path: Path) -> Callable[[str], Flask]:
    """Writes the app, and returns what runs its commands until their end."""

    def make_flask(metadata: str) -> Flask:
        path = tmp_path / "images.py"
        path.write_text(APP.replace("METADATA", metadata))

        def flask(*arguments: str) -> Process:
            directory = ("-d", str(tmp_path / "migrations")) if arguments[0] == "db" else ()
            process = processes.flask("--app", str(path), *arguments, *directory)
            assert process.wait() == 0, process.output
            return process

        return flask

    return make_flask


@pytest.mark.parametrize("metadata", ["", NAMING], ids=["plain", "naming convention"])
def test_a_migration_has_all_that_the_tables_have(
    make_flask: Callable[[str], Flask], tmp_path: Path, metadata: str
) -> None:
    flask = make_flask(metadata)
    flask("db", "init")
    flask("db", "migrate")
    [version] = (tmp_path / "migrations" / "versions").glob("*.py")
    migration = version.read_text()
    for table in ("bq_workers", "bq_tasks", "bq_events", "image"):
        assert f"op.create_table('{table}'" in migration
    checks = re.findall(r"CheckConstraint\(\"(state IN .*?)\", name=.*'(\w+)'", migration)
    assert sorted(checks) == [
        (
            "state IN ('PENDING', 'PROCESSING', 'DONE', 'FAILED', 'CANCELLED')",
            "ck_bq_tasks_state",
        ),
        ("state IN ('RUNNING', 'SHUTDOWN', 'NO_HEARTBEAT')", "ck_bq_workers_state"),
    ]
    for index, where in {
        "pending": "state = 'PENDING'",
        "processing": "state = 'PROCESSING' AND NOT parked",
        "suspect": "crashes > 0 AND state IN ('PENDING', 'PROCESSING')",
        "parent": "parent_id IS NOT NULL",
    }.items():
        found = re.findall(
            rf"create_index\('ix_bq_tasks_{index}', .*postgresql_where=sa\.text\((.*)\)\)",
            migration,
        )
        assert [ast.literal_eval(each) for each in found] == [where]


@pytest.mark.slow
def test_the_tables_go_up_and_down_and_up_again(
    make_flask: Callable[[str], Flask], database_url: str
) -> None:
    flask = make_flask(NAMING)

    def do_a_task() -> None:
        flask("bq", "submit", "default", "images", "resize", "-k", '{"width": 200}')
        flask("bq", "worker", "--burst")
        assert query(database_url, "SELECT state, result FROM bq_tasks") == [("DONE", 200)]
        assert query(database_url, "SELECT count(*) FROM image") == [(1,)]

    flask("db", "init")
    flask("db", "migrate")
    flask("db", "upgrade")
    assert "No new upgrade operations detected" in flask("db", "check").output
    do_a_task()

    flask("db", "downgrade")
    assert query(database_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [
        ("alembic_version",)
    ]

    flask("db", "upgrade")
    do_a_task()


def test_tables_that_the_command_made_need_no_migration(
    make_flask: Callable[[str], Flask], database_url: str
) -> None:
    flask = make_flask("")
    flask("bq", "create-tables")
    query(
        database_url,
        "CREATE TABLE image (id serial PRIMARY KEY, task_id uuid REFERENCES bq_tasks (id))",
    )
    flask("db", "init")
    assert "No new upgrade operations detected" in flask("db", "check").output
