"""The command line."""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from click.testing import Result
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_beanqueue
from flask_beanqueue import BeanQueue, LimitAttempt, WorkerModelMixin
from flask_beanqueue.cli import COMMANDS, bq_cli

from . import postgres
from .apps import faults
from .conftest import MakeApp
from .probe import Probe, query, wait_until
from .processes import READY, Process, Processes
from .triggers import trigger

Invoke = Callable[..., Result]

APP = "tests.apps.commands"
PACKAGES = json.dumps(["tests.apps.tasks"])


@pytest.fixture
def invoke(app: Flask) -> Invoke:
    """Runs ``flask bq …`` in this process."""
    runner = app.test_cli_runner()

    def invoke(*arguments: str) -> Result:
        return runner.invoke(args=["bq", *arguments])

    return invoke


@pytest.fixture
def double(bq: BeanQueue) -> Any:
    @bq.processor(channel="numbers")
    def double(number: int) -> int:
        return 2 * number

    return double


@pytest.fixture
def drop_tables(app: Flask, db: SQLAlchemy) -> None:
    with app.app_context():
        db.drop_all()


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that has no rights."""
    name = f"bq_{uuid.uuid4().hex}"
    query(database_url, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    query(database_url, f"CREATE ROLE {name}")
    yield name
    query(database_url, f"DROP OWNED BY {name}")
    query(database_url, f"DROP ROLE {name}")


@pytest.fixture
def role_url(database_url: str, role: str) -> str:
    """The database as that role sees it."""
    url = sa.engine.make_url(database_url).update_query_dict({"options": f"-c role={role}"})
    return url.render_as_string(hide_password=False)


# Help.


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_command_has_help(invoke: Invoke, name: str | None) -> None:
    result = invoke(*filter(None, [name]), "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    if name is None:
        for command in COMMANDS:
            assert f"\n  {command} " in result.output
        return
    command = bq_cli.get_command(click.Context(bq_cli), name)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} says nothing about {parameter.opts}"


# create-tables


@pytest.mark.usefixtures("drop_tables")
def test_create_tables_creates_them(invoke: Invoke, database_url: str) -> None:
    result = invoke("create-tables")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "bq_workers created",
        "bq_tasks created",
        "bq_events created",
    ]
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('a', 'b')")
    assert query(
        database_url, "SELECT count(*) FROM pg_indexes WHERE indexname = 'ix_bq_tasks_pending'"
    ) == [(1,)]


def test_create_tables_leaves_those_that_exist(invoke: Invoke, database_url: str) -> None:
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('a', 'b')")
    query(database_url, "DROP TABLE bq_events")
    result = invoke("create-tables")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "bq_workers exists",
        "bq_tasks exists",
        "bq_events created",
    ]
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(1,)]


def test_create_tables_names_all_that_old_tables_lack(invoke: Invoke, database_url: str) -> None:
    query(database_url, "ALTER TABLE bq_tasks DROP COLUMN crashes, DROP COLUMN parked")
    query(database_url, "ALTER TABLE bq_workers DROP CONSTRAINT ck_bq_workers_state")
    query(database_url, "DROP INDEX ix_bq_tasks_pending, ix_bq_events_task_id")
    result = invoke("create-tables")
    assert result.exit_code == 1
    assert result.output.startswith(
        "Error: The tables are older than this release: bq_workers has no CHECK"
        " ck_bq_workers_state; bq_tasks has no column crashes, parked; bq_tasks has no index"
        " ix_bq_tasks_pending, ix_bq_tasks_processing, ix_bq_tasks_suspect; bq_events has no index"
        " ix_bq_events_task_id. Change them with a migration"
    )


@pytest.mark.parametrize("lost", [None, "INDEX", "CONSTRAINT"])
def test_create_tables_knows_the_names_that_the_apps_convention_gives(
    make_app: MakeApp, database_url: str, lost: str | None
) -> None:
    """Also those that are too long for PostgreSQL, or need quotes."""
    convention = {"ix": f"An Index of {'%(column_0_name)s' * 9}", "ck": "Check %(constraint_name)s"}
    db = SQLAlchemy(metadata=sa.MetaData(naming_convention=convention))

    class Worker(WorkerModelMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "worker"
        __table_args__ = (sa.CheckConstraint("1 < 2", name="that"),)
        Room = sa.Column("The Room", sa.Text, index=True)

    app = make_app(db, BeanQueue(db=db, worker_model=Worker))
    if lost == "INDEX":
        find = "SELECT format('DROP INDEX %I', indexname) FROM pg_indexes WHERE indexname ~ '^An '"
        [[drop], _] = query(database_url, find)
        query(database_url, drop)
    elif lost:
        query(database_url, 'ALTER TABLE worker DROP CONSTRAINT "Check that"')
    result = app.test_cli_runner().invoke(args=["bq", "create-tables"])
    assert result.exit_code == (1 if lost else 0)


def test_create_tables_without_the_right_names_the_role(
    processes: Processes, role: str, role_url: str
) -> None:
    process = processes.flask("--app", APP, "bq", "create-tables", DATABASE_URL=role_url)
    assert process.wait() == 1
    line = process.output.splitlines()[0]  # psycopg 3 may warn of its pool afterwards
    assert line == (
        "Error: permission denied for schema public. Let its owner GRANT USAGE and CREATE on it to"
        f" {role}."
    )


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize(
    ("command", "rights"), [("worker", "USAGE"), ("create-tables", "USAGE and CREATE")]
)
def test_a_schema_that_the_role_may_not_use_is_not_taken_for_an_empty_one(
    processes: Processes, database_url: str, role: str, role_url: str, command: str, rights: str
) -> None:
    query(database_url, "REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    arguments = ["default"] if command == "worker" else []
    process = processes.flask("--app", APP, "bq", command, *arguments, DATABASE_URL=role_url)
    assert process.wait() == 1
    line = process.output.splitlines()[0]  # psycopg 3 may warn of its pool afterwards
    assert f". Let the owner of its schema GRANT {rights} on it to {role}, or let the" in line


@pytest.mark.parametrize(
    ("arguments", "rights"), [(["worker", "a"], "USAGE"), (["create-tables"], "USAGE and CREATE")]
)
def test_a_schema_of_its_own_that_the_role_may_not_use_is_named(
    database_url: str, role: str, role_url: str, arguments: list[str], rights: str
) -> None:
    db = SQLAlchemy()

    class Worker(WorkerModelMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "worker"
        __table_args__ = {"schema": "house"}  # noqa: RUF012

    query(database_url, "CREATE SCHEMA house")
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = role_url
    db.init_app(app)
    BeanQueue(db=db, worker_model=Worker).init_app(app)
    result = app.test_cli_runner().invoke(args=["bq", *arguments])
    with app.app_context():
        db.engine.dispose()
    assert result.exit_code == 1
    assert result.output == (
        f"Error: permission denied for schema house. Let its owner GRANT {rights} on it to {role}."
        "\n"
    )


@pytest.mark.usefixtures("drop_tables")
def test_create_tables_leaves_the_apps_own_tables_to_the_app(
    invoke: Invoke, database_url: str
) -> None:
    invoke("create-tables")
    assert query(database_url, "SELECT to_regclass('note')") == [(None,)]


def test_create_tables_of_own_models_in_a_bind(
    make_app: MakeApp, db: SQLAlchemy, other_database_url: str, database_url: str
) -> None:
    bq = BeanQueue(db=db, bind_key="queue")
    app = make_app(db, bq, SQLALCHEMY_BINDS={"queue": other_database_url})
    with app.app_context():
        db.drop_all()
    result = app.test_cli_runner().invoke(args=["bq", "create-tables"])
    assert "bq_tasks created" in result.output
    assert query(database_url, "SELECT to_regclass('bq_tasks')") == [(None,)]
    assert query(other_database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


CREATING_APP = """
import json, os
import sqlalchemy as sa
from flask import Flask
from flask_beanqueue import BeanQueue, WorkerModelMixin
from flask_sqlalchemy import SQLAlchemy
from tests.probe import pause

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
app.config["SQLALCHEMY_BINDS"] = {"queue": os.environ["DATABASE_URL"]}
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = json.loads(os.environ.get("OPTIONS", "{}"))
db = SQLAlchemy(app)

class Worker(WorkerModelMixin, db.Model):
    __tablename__ = "worker"
    __table_args__ = {"schema": "house"}

own = {"worker_model": Worker} if "OWN" in os.environ else {}
bq = BeanQueue(app, bind_key=os.environ.get("BIND"), **own)

if "PAUSES" in os.environ:
    sa.event.listen(bq.Event.__table__, "after_create", lambda *_, **kw: pause("created"))
"""


@pytest.fixture
def create(processes: Processes, database_url: str, tmp_path: Path) -> Callable[..., Process]:
    """Start to create tables."""
    query(database_url, "CREATE SCHEMA house")
    path = tmp_path / "creating_app.py"
    path.write_text(CREATING_APP)
    return lambda **env: processes.flask("--app", str(path), "bq", "create-tables", **env)


def test_six_create_tables_at_once(create: Callable[..., Process]) -> None:
    all_six = [create() for _ in range(6)]
    assert [process.wait() for process in all_six] == [0] * 6
    assert sum(process.output.count("created") for process in all_six) == 3
    assert sum(process.output.count("exists") for process in all_six) == 15


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"OPTIONS": '{"isolation_level": "SERIALIZABLE"}', "OWN": 1},
        {"PGOPTIONS": r"-c default_transaction_isolation=repeatable\ read", "BIND": "queue"},
    ],
    ids=["as it is", "level of the engine", "level of the session"],
)
def test_who_creates_tables_waits_for_who_does_so_already(
    create: Callable[..., Process], database_url: str, probe: Probe, env: dict[str, Any]
) -> None:
    with probe.gate("created") as open_gate:
        first = create(**env, PAUSES=1)
        probe.wait("created")
        second = create(**env)
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        wait_until(lambda: len(query(database_url, waiting)) == 2)  # one of them at the gate
        open_gate()
        assert first.wait() == second.wait() == 0
    assert second.output.count("exists") == 3


# submit


def test_submit_makes_a_task_and_prints_its_id(
    invoke: Invoke, app: Flask, bq: BeanQueue, double: Any, work: Any
) -> None:
    result = invoke("submit", "express", __name__, "double", "-k", '{"number": 21}')
    assert result.exit_code == 0
    task_id = uuid.UUID(result.output.splitlines()[-1])
    work("express")
    with app.app_context():
        task = bq.db.session.get(bq.Task, task_id)
        assert (task.state, task.channel, task.result, task.priority) == ("DONE", "express", 42, 0)


def test_submit_takes_a_priority(invoke: Invoke, double: Any, database_url: str) -> None:
    result = invoke(
        "submit", "numbers", __name__, "double", "--kwargs", '{"number": 1}', "--priority", "-5"
    )
    assert result.exit_code == 0
    assert query(database_url, "SELECT priority FROM bq_tasks") == [(-5,)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["double", "-k", "{'number': 1}"], "Invalid value for '--kwargs': This is not JSON"),
        (["double", "-k", "[1]"], 'This is no JSON object, such as {"width": 200}'),
        (["double", "-k", "21"], "This is no JSON object"),
        (["double"], "missing a required argument: 'number'"),
        (["double", "-k", '{"n": 1}'], "missing a required argument: 'number'"),
        (["double", "-k", '{"number": "\\u0000"}'], "the argument 'number' cannot be stored"),
        (["double", "-k", '{"number": NaN}'], "the argument 'number' cannot be stored"),
        (["double", "-k", '{"number": 1}', "--priority", "99999999999"], "whole number of 32 bits"),
        (["double", "-k", '{"number": 1}', "--priority", "high"], "not a valid integer"),
    ],
)
def test_submit_says_what_is_wrong_with_the_arguments(
    invoke: Invoke, double: Any, database_url: str, arguments: list[str], words: str
) -> None:
    result = invoke("submit", "numbers", __name__, *arguments)
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert "Traceback" not in result.output
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


def test_submit_refuses_a_channel_without_a_name(invoke: Invoke, double: Any) -> None:
    result = invoke("submit", "", __name__, "double", "-k", '{"number": 1}')
    assert result.exit_code == 1
    assert "channel must not be empty" in result.output


def test_submit_lists_the_processors_that_it_knows(invoke: Invoke, double: Any) -> None:
    result = invoke("submit", "numbers", __name__, "triple")
    assert result.exit_code == 1
    assert f"No processor {__name__} triple is registered" in result.output
    assert f"There are:\n  {__name__} double\n" in result.output
    assert "BQ_PROCESSOR_PACKAGES" in result.output


def test_submit_says_that_it_knows_no_processors(invoke: Invoke) -> None:
    result = invoke("submit", "numbers", __name__, "double")
    assert result.exit_code == 1
    assert "There is none at all." in result.output


@pytest.mark.usefixtures("drop_tables")
def test_submit_without_tables_says_how_to_make_them(invoke: Invoke, double: Any) -> None:
    result = invoke("submit", "numbers", __name__, "double", "-k", '{"number": 1}')
    assert result.exit_code == 1
    assert "flask bq create-tables" in result.output


def test_submit_says_what_the_tables_own_rules_refuse(
    invoke: Invoke, double: Any, database_url: str
) -> None:
    query(database_url, "ALTER TABLE bq_tasks ADD CONSTRAINT polite CHECK (priority < 5)")
    result = invoke(
        "submit", "numbers", __name__, "double", "-k", '{"number": 1}', "--priority", "9"
    )
    assert result.exit_code == 1
    assert 'The database refuses this: new row for relation "bq_tasks"' in result.output


def test_submit_to_an_outdated_table_says_what_it_lacks(
    invoke: Invoke, double: Any, database_url: str
) -> None:
    query(database_url, "ALTER TABLE bq_tasks DROP COLUMN priority")
    result = invoke("submit", "numbers", __name__, "double", "-k", '{"number": 1}')
    assert result.exit_code == 1
    [line] = result.output.splitlines()
    assert line.startswith("Error: The table is older than this release: column ")
    assert "priority" in line
    assert "bq_tasks" in line


@pytest.mark.usefixtures("app")
def test_submit_without_the_right_names_the_table_and_the_role(
    processes: Processes, role: str, role_url: str
) -> None:
    process = processes.flask(
        *("--app", APP, "bq", "submit", "numbers", "tests.apps.tasks.numbers", "double"),
        *("-k", '{"number": 21}'),
        BQ_PROCESSOR_PACKAGES=PACKAGES,
        DATABASE_URL=role_url,
    )
    assert process.wait() == 1
    line = process.output.splitlines()[0]  # psycopg 3 may warn of its pool afterwards
    assert line == (
        f"Error: permission denied for table bq_tasks. Let its owner GRANT INSERT on it to {role}."
    )


# worker


def test_a_burst_does_all_that_is_due(
    invoke: Invoke, app: Flask, double: Any, database_url: str
) -> None:
    with app.app_context():
        for number in range(3):
            double.enqueue(number=number)
        double.queue.db.session.commit()
    result = invoke("worker", "--burst", "--name", "the-worker")
    assert (result.exit_code, result.exception) == (0, None)
    assert query(database_url, "SELECT result FROM bq_tasks ORDER BY id") == [(0,), (2,), (4,)]
    assert query(database_url, "SELECT name, state FROM bq_workers") == [("the-worker", "SHUTDOWN")]


def test_a_worker_is_called_after_its_host_and_process(
    invoke: Invoke, double: Any, database_url: str
) -> None:
    assert invoke("worker", "--burst").exit_code == 0
    [(name,)] = query(database_url, "SELECT name FROM bq_workers")
    assert re.fullmatch(re.escape(socket.gethostname()) + r"-\d+", name)


@pytest.mark.usefixtures("drop_tables")
def test_a_worker_without_tables_says_how_to_make_them(invoke: Invoke, double: Any) -> None:
    result = invoke("worker", "--burst")
    assert result.exit_code == 1
    assert "flask bq create-tables" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("table", "column"),
    [("bq_tasks", "parked"), ("bq_workers", "created_at"), ("bq_events", "traceback")],
)
def test_a_worker_on_an_outdated_table_says_what_it_lacks(
    invoke: Invoke, double: Any, database_url: str, table: str, column: str
) -> None:
    query(database_url, f"ALTER TABLE {table} DROP COLUMN {column}")
    result = invoke("worker", "--burst")
    assert result.exit_code == 1
    [line] = result.output.splitlines()
    assert line.startswith(
        f"Error: The table is older than this release: column {table}.{column} does not exist."
    )
    assert "migration" in line
    assert query(database_url, "SELECT count(*) FROM bq_workers") == [(0,)]


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize(
    ("granted", "table"),
    [
        ("USAGE ON SCHEMA public", "bq_workers"),
        ("SELECT ON ALL TABLES IN SCHEMA public", "bq_workers"),
        ("SELECT, INSERT, UPDATE ON bq_workers", "bq_tasks"),
        ("SELECT, INSERT, UPDATE ON bq_workers, bq_tasks", "bq_events"),
        (
            "SELECT ON bq_events TO {role}; GRANT SELECT, INSERT, UPDATE ON bq_workers, bq_tasks",
            "bq_events",
        ),
        ("SELECT, UPDATE ON bq_workers, bq_tasks, bq_events", "bq_workers"),
    ],
)
def test_a_worker_without_rights_names_the_table_and_the_role(
    processes: Processes, database_url: str, role: str, role_url: str, granted: str, table: str
) -> None:
    query(database_url, f"GRANT {granted.format(role=role)} TO {role}")
    process = processes.flask("--app", APP, "bq", "worker", "default", DATABASE_URL=role_url)
    assert process.wait() == 1
    line = process.output.splitlines()[0]  # psycopg 3 may warn of its pool afterwards
    assert line.startswith(f"Error: permission denied for table {table}. ")
    assert f"GRANT SELECT, INSERT and UPDATE on the queue's tables to {role}" in line
    assert query(database_url, "SELECT count(*) FROM bq_workers") == [(0,)]


@pytest.mark.usefixtures("app")
def test_a_worker_needs_no_other_rights(
    processes: Processes, database_url: str, role: str, role_url: str
) -> None:
    tables = "bq_workers, bq_tasks, bq_events"
    query(database_url, f"GRANT SELECT, INSERT, UPDATE ON {tables} TO {role}")
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('no', 'where')")
    process = processes.flask(
        "--app", APP, "bq", "worker", "default", "--burst", DATABASE_URL=role_url
    )
    assert process.wait() == 0
    process.wait_line("no.where")


@pytest.mark.parametrize("processes_wanted", [1, 2])
def test_what_tasks_print_is_not_lost(
    app: Flask, processes: Processes, database_url: str, processes_wanted: int
) -> None:
    """Also where it is kept back, for a file or a pipe gets it in larger pieces."""
    query(
        database_url,
        "INSERT INTO bq_tasks (channel, module, func_name) VALUES ('faults', %s, 'talk')",
        faults.__name__,
    )
    worker = processes.flask(
        *("--app", "tests.apps.faults", "bq", "worker", "--burst"),
        *("--processes", str(processes_wanted)),
        PYTHONUNBUFFERED="",
    )
    assert worker.wait() == 0
    assert worker.output.count("a word") == 1


@pytest.mark.usefixtures("drop_tables")
def test_processes_say_once_that_there_are_no_tables(processes: Processes) -> None:
    process = processes.flask("--app", APP, "bq", "worker", "default", "--processes", "2")
    assert process.wait() == 1
    [line] = process.output.splitlines()
    assert "flask bq create-tables" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "There is nothing to work on"),
        ([""], "channel must not be empty"),
        (["default", ""], "channel must not be empty"),
        (["default", "--concurrency", "1000"], "1000 tasks at once need as many connections"),
        (["default", "--concurrency", "0"], "Invalid value for '-c' / '--concurrency'"),
    ],
)
def test_a_worker_says_what_is_wrong(invoke: Invoke, arguments: list[str], words: str) -> None:
    result = invoke("worker", *arguments)
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_that_would_listen_with_a_driver_that_is_not_there_says_so_in_one_line(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    monkeypatch: pytest.MonkeyPatch,
    processes: str,
) -> None:
    app = make_app(db, bq, BQ_LISTEN_DATABASE_URL="postgresql+psycopg://me:secret@host/name")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    runner = app.test_cli_runner()
    result = runner.invoke(args=["bq", "worker", "default", "--processes", processes])
    assert result.exit_code == 1
    [line] = result.output.splitlines()
    assert line.startswith("Error: BQ_LISTEN_DATABASE_URL names a driver that cannot be imported: ")
    assert "psycopg" in line
    assert "secret" not in line


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_says_what_keeps_it_from_claiming_any_task(
    invoke: Invoke, double: Any, database_url: str, processes: str
) -> None:
    on, body = "BEFORE UPDATE ON bq_tasks", "RAISE EXCEPTION 'maintenance until six'"
    query(database_url, trigger("refuse", on, body, each="STATEMENT"))
    result = invoke("worker", "numbers", "--burst", "--processes", processes)
    assert result.exit_code == 1
    assert "Error: The database refuses this: maintenance until six" in result.output


@pytest.mark.parametrize(
    "instead",
    [
        "CREATE TABLE bq_tasks (LIKE kept INCLUDING ALL) PARTITION BY HASH (id)",
        "CREATE VIEW bq_tasks AS SELECT * FROM kept",
        "CREATE FOREIGN TABLE bq_tasks (id uuid) SERVER elsewhere",
    ],
    ids=["partitioned", "view", "foreign"],
)
def test_a_worker_refuses_tasks_that_are_in_no_ordinary_table(
    invoke: Invoke, double: Any, database_url: str, instead: str
) -> None:
    query(database_url, "ALTER TABLE bq_tasks RENAME TO kept")
    query(database_url, "CREATE FOREIGN DATA WRAPPER none")
    query(database_url, "CREATE SERVER elsewhere FOREIGN DATA WRAPPER none")
    query(database_url, instead)
    result = invoke("worker", "--burst")
    query(database_url, "DROP FOREIGN DATA WRAPPER none CASCADE")
    assert result.exit_code == 1
    assert result.output.startswith("Error: bq_tasks is not an ordinary table")
    assert query(database_url, "SELECT FROM bq_workers") == []


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_refuses_a_database_whose_texts_need_not_be_readable(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    server_url: str,
    database_url: str,
    processes: str,
) -> None:
    with postgres.database(
        server_url, "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    ) as other:
        url = sa.make_url(database_url).set(database=sa.make_url(other).database)
        if url.drivername == "postgresql+psycopg":  # or the app could not connect either
            url = url.update_query_dict({"client_encoding": "utf8"})
        app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=url)
        runner = app.test_cli_runner()
        result = runner.invoke(args=["bq", "worker", "a", "--burst", "--processes", processes])
        assert result.exit_code == 1
        [line] = result.output.splitlines()
        assert line.startswith("Error: The database's encoding is SQL_ASCII")
        assert "ENCODING 'UTF8'" in line
        assert query(other, "SELECT count(*) FROM bq_workers") == [(0,)]
        with app.app_context():
            db.engine.dispose()


def test_a_worker_takes_a_database_of_another_encoding(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, server_url: str, database_url: str
) -> None:
    with postgres.database(
        server_url, "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    ) as other:
        url = sa.make_url(database_url).set(database=sa.make_url(other).database)
        app = make_app(db, bq, SQLALCHEMY_DATABASE_URI=url)
        arguments = ["bq", "worker", "default", "--burst", "--name", "Zoë"]
        assert app.test_cli_runner().invoke(args=arguments).exit_code == 0
        assert query(other, "SELECT name, state FROM bq_workers") == [("Zoë", "SHUTDOWN")]
        with app.app_context():
            db.engine.dispose()


def test_a_worker_whose_database_is_out_of_reach_says_so_in_one_line(
    processes: Processes,
) -> None:
    url = "postgresql+psycopg2://nobody@localhost:1/none"
    process = processes.flask("--app", APP, "bq", "worker", "default", DATABASE_URL=url)
    assert process.wait() == 1
    [line] = process.output.splitlines()
    assert line.startswith("Error: The database cannot be used: ")
    assert "refused" in line


@pytest.mark.parametrize("command", [["worker", "default"], ["create-tables"]])
def test_a_url_that_the_driver_refuses_is_told_in_one_line(
    processes: Processes, database_url: str, command: list[str]
) -> None:
    url = sa.make_url(database_url).update_query_dict({"sslmod": "require"})
    process = processes.flask(
        *("--app", APP, "bq", *command), DATABASE_URL=url.render_as_string(hide_password=False)
    )
    assert process.wait() == 1
    line = process.output.splitlines()[0]
    assert line.startswith("Error: The database cannot be used: ")
    assert "sslmod" in line


#: Replaces threads before anything else is imported, as its documentation wants it.
GREEN = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "gevent without threads": "from gevent import monkey; monkey.patch_all(thread=False)",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "eventlet without threads": "import eventlet; eventlet.monkey_patch(thread=False)",
}
with_each_patch = pytest.mark.parametrize("patch", GREEN.values(), ids=GREEN)


def green(processes: Processes, patch: str, what: str, *arguments: str) -> Process:
    """Run something in a process that has been patched."""
    ignore = "import warnings; warnings.simplefilter('ignore')"  # eventlet is deprecated
    return processes.python("-c", f"{ignore}; {patch}; {what}", "--app", APP, "bq", *arguments)


FLASK = "from flask.cli import main; main()"


@with_each_patch
def test_a_worker_refuses_greenlets_in_place_of_threads(processes: Processes, patch: str) -> None:
    process = green(processes, patch, FLASK, "worker", "numbers", "--burst")
    assert process.wait() == 1
    [line] = [line for line in process.output.splitlines() if line.startswith("Error: ")]
    assert ("gevent" if "gevent" in patch else "eventlet") in line
    assert "a worker needs real threads" in line


def test_workers_of_several_processes_refuse_greenlets_once(processes: Processes) -> None:
    arguments = "worker", "numbers", "--processes", "2"
    process = green(processes, GREEN["gevent"], FLASK, *arguments)
    assert process.wait() == 1
    assert process.output.count("a worker needs real threads") == 1


@with_each_patch
def test_a_worker_of_the_apps_own_refuses_greenlets(processes: Processes, patch: str) -> None:
    run = f"from {APP} import create_app as make; from {APP} import bq; app = make()"
    process = green(processes, patch, f"{run}; bq.process_tasks(['numbers'], app=app)")
    assert process.wait() == 1
    process.wait_line("SetupError: ")


def test_tasks_are_made_among_greenlets_and_done_where_none_are(
    processes: Processes, database_url: str
) -> None:
    """To import the library is no harm."""
    assert processes.flask("--app", APP, "bq", "create-tables").wait() == 0
    create = f"import os; os.environ['BQ_PROCESSOR_PACKAGES'] = {PACKAGES!r}; {FLASK}"
    submit = ("submit", "numbers", "tests.apps.tasks.numbers", "double", "-k", '{"number": 21}')
    assert green(processes, GREEN["gevent"], create, *submit).wait() == 0
    assert green(processes, "import gevent.monkey", create, "worker", "--burst").wait() == 0
    assert query(database_url, "SELECT state, result FROM bq_tasks") == [("DONE", 42)]


URL_APP = """
import os
from flask import Flask
from flask_beanqueue import BeanQueue
from flask_sqlalchemy import SQLAlchemy

def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db = SQLAlchemy(app)
    BeanQueue(app)
    return app
"""


@pytest.fixture(params=["", "app = create_app()"], ids=["factory", "app"])
def url_app(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "url_app.py"
    path.write_text(URL_APP + request.param)
    return str(path)


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:secret@host/name",
        "postgresql+psycopgg://me:secret@host/name",
        "me:secret@host",
        "postgresql+psycopg2://me:secret@host:port/name",
    ],
)
def test_a_url_that_sqlalchemy_does_not_know_is_told_in_one_line(
    processes: Processes, url_app: str, url: str
) -> None:
    process = processes.flask("--app", url_app, "bq", "worker", DATABASE_URL=url)
    assert process.wait() == 1
    [line] = process.output.splitlines()
    assert line.startswith("Error: The database's URL cannot be used")
    assert "Let it begin with postgresql+psycopg2://" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("scheme", "driver", "mend"),
    [
        ("postgresql+psycopg", "psycopg", "pip install 'psycopg[binary]'"),
        ("postgresql+psycopg2", "psycopg2", "pip install psycopg2-binary"),
    ],
)
def test_a_driver_that_is_not_there_is_told_in_one_line(
    processes: Processes, url_app: str, scheme: str, driver: str, mend: str
) -> None:
    without = f"import sys; sys.modules[{driver!r}] = None; {FLASK}"
    process = processes.python(
        *("-c", without, "--app", url_app, "bq", "worker"), DATABASE_URL=f"{scheme}://me@host/name"
    )
    assert process.wait() == 1
    [line] = process.output.splitlines()
    assert line.startswith(f"Error: The database's driver, {driver}, cannot be imported (")
    assert mend in line


def test_a_driver_that_is_broken_is_told_in_one_line(processes: Processes, url_app: str) -> None:
    process = processes.flask(
        *("--app", url_app, "bq", "worker"),
        DATABASE_URL="postgresql+psycopg://me@host/name",
        PSYCOPG_IMPL="none such",
    )
    assert process.wait() == 1
    [line] = process.output.splitlines()
    assert line.startswith("Error: The database's driver, psycopg, cannot be imported (")


@pytest.mark.parametrize("source", ["import no_such_module", "raise ValueError('no app')"])
def test_what_else_keeps_the_app_from_being_loaded_is_told_as_flask_tells_it(
    processes: Processes, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "broken_app.py"
    path.write_text(source)
    process = processes.flask("--app", str(path), "bq", "worker")
    assert process.wait() != 0
    process.wait_line("no_such_module" if "import" in source else "ValueError: no app")
    assert "Traceback" in process.output


def test_an_app_without_a_queue_says_so(processes: Processes, tmp_path: Path) -> None:
    path = tmp_path / "no_queue_app.py"
    path.write_text("import flask; app = flask.Flask(__name__)")
    process = processes.flask("--app", str(path), "bq", "worker")
    assert process.wait() == 1
    assert process.output.startswith("Error: This app has no BeanQueue. Call bq.init_app(app)")


def test_submit_warns_of_a_channel_that_no_processor_names(invoke: Invoke, double: Any) -> None:
    arguments = [__name__, "double", "-k", '{"number": 1}']
    assert "spelt" not in invoke("submit", "numbers", *arguments).output
    result = invoke("submit", "nubmers", *arguments)
    assert result.exit_code == 0
    assert "No processor has 'nubmers' as its channel; is it spelt right?" in result.output


def test_a_worker_introduces_itself(processes: Processes, database_url: str) -> None:
    assert processes.flask("--app", APP, "bq", "create-tables").wait() == 0
    process = processes.flask(
        *("--app", APP, "bq", "worker", "--burst", "--name", "the-worker", "-c", "3"),
        BQ_PROCESSOR_PACKAGES=PACKAGES,
    )
    assert process.wait() == 0
    [(worker_id,)] = query(database_url, "SELECT id::text FROM bq_workers")
    line = process.wait_line("flask_beanqueue")
    assert f"flask_beanqueue {flask_beanqueue.__version__}: worker the-worker ({worker_id})" in line
    # The package's submodules have been imported, however deep, and so the channels are known.
    assert " on depth, numbers; 3 at once; 2 processors known; LISTEN" in line


def test_a_worker_that_polls_says_so(processes: Processes) -> None:
    assert processes.flask("--app", APP, "bq", "create-tables").wait() == 0
    process = processes.flask(
        *("--app", APP, "bq", "worker", "--burst", "numbers", "images"),
        BQ_LISTEN=0,
        BQ_POLL_TIMEOUT=2.5,
    )
    assert process.wait() == 0
    line = process.wait_line("flask_beanqueue")
    assert " on numbers, images; 4 at once; 0 processors known; polling every 2.5 s" in line


def test_submit_and_worker_find_the_processors_of_packages(
    processes: Processes, database_url: str
) -> None:
    assert processes.flask("--app", APP, "bq", "create-tables").wait() == 0
    submit = processes.flask(
        *("--app", APP, "bq", "submit", "numbers", "tests.apps.tasks.numbers", "double"),
        *("-k", '{"number": 21}'),
        BQ_PROCESSOR_PACKAGES=PACKAGES,
    )
    assert submit.wait() == 0
    task_id = submit.output.splitlines()[0]  # psycopg 3 may warn of its pool afterwards
    worker = processes.flask(
        *("--app", APP, "bq", "worker", "--burst", "-v"), BQ_PROCESSOR_PACKAGES=PACKAGES
    )
    assert worker.wait() == 0
    found = query(database_url, "SELECT id::text, state, result FROM bq_tasks")
    assert found == [(task_id, "DONE", 42)]
    name = f"tests.apps.tasks.numbers.double {task_id}"
    worker.wait_line(f"{name} starts")
    worker.wait_line(f"{name} is done")


@pytest.mark.parametrize("command", ["worker", "submit"])
def test_a_package_that_cannot_be_imported_is_named(processes: Processes, command: str) -> None:
    arguments = ["numbers", "a", "b"] if command == "submit" else []
    process = processes.flask(
        *("--app", APP, "bq", command, *arguments), BQ_PROCESSOR_PACKAGES='["no_such_package"]'
    )
    assert process.wait() == 1
    assert "no_such_package" in process.output
    assert "BQ_PROCESSOR_PACKAGES" in process.output
    assert "Traceback" not in process.output


# Logging


LOGGING_APP = """
import atexit, logging, os
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_beanqueue import BeanQueue

SETUP

def show():
    root = logging.getLogger()
    print("root:", len(root.handlers), logging.getLevelName(root.level))

atexit.register(show)
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
db = SQLAlchemy(app)
bq = BeanQueue(app)

@bq.processor()
def fail():
    raise ValueError("no good")
"""


@pytest.mark.usefixtures("app")
@pytest.mark.parametrize(
    ("setup", "root", "line"),
    [
        ("", "root: 0 WARNING", "INFO in worker: flask_beanqueue "),
        (
            "logging.basicConfig(format='own %(message)s')",
            "root: 1 WARNING",
            "own flask_beanqueue ",
        ),
    ],
    ids=["left alone", "set up by the app"],
)
def test_a_worker_logs_once_and_leaves_the_root_logger_alone(
    processes: Processes, tmp_path: Path, setup: str, root: str, line: str
) -> None:
    path = tmp_path / "logging_app.py"
    path.write_text(LOGGING_APP.replace("SETUP", setup))
    process = processes.flask("--app", str(path), "bq", "worker", "--burst")
    assert process.wait() == 0
    assert root in process.output.splitlines()
    introductions = [each for each in process.output.splitlines() if "flask_beanqueue" in each]
    assert len(introductions) == 1
    assert line in introductions[0]


@pytest.mark.usefixtures("app")
def test_a_level_that_the_app_has_set_is_kept(
    processes: Processes, tmp_path: Path, database_url: str
) -> None:
    path = tmp_path / "logging_app.py"
    setup = "logging.getLogger('flask_beanqueue').setLevel('ERROR')"
    path.write_text(LOGGING_APP.replace("SETUP", setup))
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('logging_app', 'fail')")
    process = processes.flask("--app", str(path), "bq", "worker", "--burst")
    assert process.wait() == 0
    assert "INFO" not in process.output
    [(task_id,)] = query(database_url, "SELECT id FROM bq_tasks")
    process.wait_line(f"logging_app.fail {task_id} failed: ValueError: no good")


def test_log_records_say_which_task_they_are_about(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @bq.processor(channel="numbers", retry_policy=LimitAttempt(2))
    def fail() -> None:
        raise ValueError("no good")

    @bq.processor(channel="numbers")
    def succeed() -> object:
        return object()

    with app.app_context():
        ids = {
            "fail": str(fail.enqueue().id),
            "succeed": str(succeed.enqueue().id),
            "unknown": str(uuid.uuid4()),
        }
        db.session.add(
            bq.Task(id=ids["unknown"], channel="numbers", module=__name__, name="unknown")
        )
        db.session.commit()
    with caplog.at_level(logging.DEBUG, "flask_beanqueue"):
        work("numbers", concurrency=1)
    records: Any = [record for record in caplog.records if hasattr(record, "task_id")]
    messages = [(record.levelname, record.getMessage()) for record in records]
    called = {name: f"{__name__}.{name} {task_id}" for name, task_id in ids.items()}
    for level, words in [
        ("DEBUG", f"{called['fail']} starts"),
        ("WARNING", f"{called['fail']} will be retried: ValueError: no good"),
        ("ERROR", f"{called['fail']} failed: ValueError: no good"),
        ("DEBUG", f"{called['succeed']} starts"),
        ("WARNING", f"The result of {called['succeed']} is not stored"),
        ("DEBUG", f"{called['succeed']} is done"),
        ("WARNING", f"{called['unknown']} waits again"),
    ]:
        assert any(level == each[0] and words in each[1] for each in messages), words
    for record in records:
        name = record.task_name.removeprefix(f"{__name__}.")
        assert called[name] in record.getMessage()
        assert (record.task_id, record.task_channel) == (ids[name], "numbers")


# --reload


class Reloaded:
    """A worker with --reload, on a file that the test writes."""

    def __init__(self, processes: Processes, path: Path) -> None:
        self._processes = processes
        self._path = path

    def write(self, version: str, more: str = "") -> None:
        self._path.write_text(RELOADED_APP.replace("VERSION", repr(version)) + more)

    def start(self, *arguments: str, **env: Any) -> Process:
        self.write("one")
        return self._processes.flask(
            *("--app", str(self._path), "bq", "worker", "--reload", *arguments), **env
        )


RELOADED_APP = (
    LOGGING_APP.replace("SETUP", "from tests.probe import pause")
    + """
@bq.processor()
def wait():
    pause("waiting")
    return VERSION

@bq.processor()
def kill():
    os.kill(os.getpid(), 9)

print("this is", VERSION)
"""
)


@pytest.fixture
def reloaded(app: Flask, processes: Processes, tmp_path: Path) -> Reloaded:
    return Reloaded(processes, tmp_path / "reloaded_app.py")


def enqueue(url: str, func_name: str) -> None:
    query(url, "INSERT INTO bq_tasks (module, func_name) VALUES ('reloaded_app', %s)", func_name)
    query(url, 'NOTIFY "default"')


def rows(url: str, columns: str) -> list[Any]:
    return query(url, f"SELECT {columns} FROM bq_tasks ORDER BY id")


def test_a_reloading_worker_starts_again_when_code_changes(
    reloaded: Reloaded, database_url: str, probe: Probe
) -> None:
    probe.listen_states()
    worker = reloaded.start("--name", "reloading")
    worker.wait_line("this is one")
    worker.wait_line("flask_beanqueue")
    reloaded.write("the second")
    worker.wait_line("this is the second")
    enqueue(database_url, "wait")
    probe.wait("wait DONE")
    assert rows(database_url, "result") == [("the second",)]
    # The first one has left in good order, so that nothing looks like a crash.
    states = query(database_url, "SELECT state FROM bq_workers ORDER BY id")
    assert states == [("SHUTDOWN",), ("RUNNING",)]
    assert worker.stop() == 0


def test_a_task_that_runs_when_code_changes_is_done_once(
    reloaded: Reloaded, database_url: str, probe: Probe
) -> None:
    worker = reloaded.start()
    with probe.gate("waiting") as open_gate:
        enqueue(database_url, "wait")
        probe.wait("waiting")
        reloaded.write("the second")
        worker.wait_line("stops")
        open_gate()
        worker.wait_line("this is the second")
    assert rows(database_url, "state, result, claims, attempts") == [("DONE", "one", 1, 1)]


def test_a_reloading_worker_lets_running_tasks_end(
    reloaded: Reloaded, database_url: str, probe: Probe
) -> None:
    worker = reloaded.start()
    with probe.gate("waiting") as open_gate:
        enqueue(database_url, "wait")
        probe.wait("waiting")
        worker.send(signal.SIGTERM)
        worker.wait_line("stops")
        open_gate()
        assert worker.wait() == 0
    assert rows(database_url, "state, claims") == [("DONE", 1)]


def test_code_that_cannot_be_loaded_is_waited_for(reloaded: Reloaded) -> None:
    worker = reloaded.start()
    worker.wait_line("flask_beanqueue")
    reloaded.write("the second", "and this is no code")
    worker.wait_line("SyntaxError")
    reloaded.write("the third")
    worker.wait_line("this is the third")
    worker.wait_line(READY, times=2)
    assert worker.stop() == 0


def test_reload_says_what_it_needs(reloaded: Reloaded, tmp_path: Path) -> None:
    (tmp_path / "watchfiles.py").write_text("raise ImportError('not installed')")
    worker = reloaded.start(PYTHONPATH=str(tmp_path))
    assert worker.wait() == 2
    worker.wait_line("--reload needs watchfiles: pip install")
