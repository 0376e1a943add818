"""Flask-Migrate finds the queue's tables with the app's own."""

from __future__ import annotations

import ast
import re
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


@pytest.mark.parametrize("metadata", ["", NAMING], ids=["plain", "naming convention"])
def test_the_tables_go_up_and_down_and_up_again(
    processes: Processes, tmp_path: Path, database_url: str, metadata: str
) -> None:
    path = tmp_path / "images.py"
    path.write_text(APP.replace("METADATA", metadata))
    migrations = tmp_path / "migrations"

    def flask(*arguments: str) -> Process:
        process = processes.flask("--app", str(path), *arguments)
        assert process.wait() == 0, process.output
        return process

    def db(command: str, *arguments: str) -> Process:
        return flask("db", command, "--directory", str(migrations), *arguments)

    def do_a_task() -> None:
        flask("bq", "submit", "default", "images", "resize", "-k", '{"width": 200}')
        flask("bq", "worker", "--burst")
        assert query(database_url, "SELECT state, result FROM bq_tasks") == [("DONE", 200)]
        assert query(database_url, "SELECT count(*) FROM image") == [(1,)]

    db("init")
    db("migrate")
    [version] = (migrations / "versions").glob("*.py")
    migration = version.read_text()
    compile(migration, version, "exec")
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
        "processing": "state = 'PROCESSING'",
        "suspect": "crashes > 0 AND state IN ('PENDING', 'PROCESSING')",
        "parent": "parent_id IS NOT NULL",
    }.items():
        found = re.findall(
            rf"create_index\('ix_bq_tasks_{index}', .*postgresql_where=sa\.text\((.*)\)\)",
            migration,
        )
        assert [ast.literal_eval(each) for each in found] == [where]

    db("upgrade")
    assert "No new upgrade operations detected" in db("check").output
    do_a_task()

    db("downgrade")
    assert query(database_url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [
        ("alembic_version",)
    ]

    db("upgrade")
    do_a_task()


def test_tables_that_the_command_made_need_no_migration(
    processes: Processes, tmp_path: Path, database_url: str
) -> None:
    path = tmp_path / "images.py"
    path.write_text(APP.replace("METADATA", ""))
    migrations = str(tmp_path / "migrations")

    assert processes.flask("--app", str(path), "bq", "create-tables").wait() == 0
    query(
        database_url,
        "CREATE TABLE image (id serial PRIMARY KEY, task_id uuid REFERENCES bq_tasks (id))",
    )
    assert processes.flask("--app", str(path), "db", "init", "-d", migrations).wait() == 0
    check = processes.flask("--app", str(path), "db", "check", "-d", migrations)
    assert check.wait() == 0, check.output
    assert "No new upgrade operations detected" in check.output
