"""The rights that docs/security.md names are enough, and each of them is needed."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, TaskModelMixin, TaskModelRefWorkerMixin
from flask_beanqueue.engine.checks import check_tables
from flask_beanqueue.engine.connection import connect
from flask_beanqueue.exceptions import SetupError

from . import postgres
from .apps import rights
from .conftest import with_driver
from .probe import Probe, query
from .processes import ZOMBIE, Process, Processes, done_by_the_next

APP = "tests.apps.rights"
DOCS = Path(__file__).parent.parent / "docs"
#: As PostgreSQL says it.
DENIED = "permission denied for table"


class Grant(NamedTuple):
    right: str
    on: str
    to: str

    def __str__(self) -> str:
        return f"{self.right} ON {self.on}"


def read_grants() -> list[list[Grant]]:
    """The page's GRANTs one by one, by paragraph."""
    [block] = re.findall(r"^```sql\n(.*?)^```", (DOCS / "security.md").read_text(), re.M | re.S)
    paragraphs = []
    for paragraph in block.split("\n\n"):
        grants = []
        for line in paragraph.splitlines():
            if not line.startswith("-- "):
                found = re.fullmatch(r"GRANT (.+) ON (.+) TO (.+);", line)
                assert found, line
                rights, on, roles = found.groups()
                grants += [
                    Grant(right, on, role)
                    for role in roles.split(", ")
                    for right in rights.split(", ")
                ]
        paragraphs.append(grants)
    return paragraphs


PARAGRAPHS = read_grants()
CONNECT, ENQUEUE, READ, END, WORK, MAKE = PARAGRAPHS
GRANTS = [grant for paragraph in PARAGRAPHS for grant in paragraph]


class Shop:
    """A database in which nobody has a right that was not granted here.

    :param url: the database, as a superuser sees it.
    """

    def __init__(self, url: str, processes: Processes) -> None:
        self.url = url
        self.processes = processes
        self.database: str = str(sa.make_url(url).database)
        self._apps: list[tuple[Flask, SQLAlchemy]] = []
        self.sql(f"REVOKE ALL ON DATABASE {self.database} FROM PUBLIC")
        self.sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        self.make_role("web")
        self.make_role("worker")
        owner = self.make_role("owner")
        self.sql(f"GRANT CONNECT ON DATABASE {self.database} TO {owner}")
        self.sql(f"GRANT USAGE, CREATE ON SCHEMA public TO {owner}")

    def sql(self, statement: str) -> list[Any]:
        return query(self.url, statement)

    def role(self, name: str) -> str:
        return f"{self.database}_{name.removeprefix('shop_')}"

    def make_role(self, name: str, grants: Iterable[Grant] = ()) -> str:
        self.sql(f"CREATE ROLE {self.role(name)} LOGIN PASSWORD 'secret'")
        self.grant([grant._replace(to=name) for grant in grants])
        return self.role(name)

    def url_of(self, name: str) -> str:
        url = sa.make_url(with_driver(self.url)).set(username=self.role(name), password="secret")
        return url.render_as_string(hide_password=False)

    def _change(self, words: str, grants: list[Grant]) -> None:
        for right, on, to in grants:
            on = on.replace("DATABASE shop", f"DATABASE {self.database}")
            self.sql(words.format(f"{right} ON {on}", self.role(to)))

    def grant(self, *paragraphs: list[Grant]) -> None:
        for paragraph in paragraphs:
            self._change("GRANT {} TO {}", paragraph)

    def revoke(self, grant: Grant) -> None:
        self._change("REVOKE {} FROM {}", [grant])

    @contextlib.contextmanager
    def context(self, role: str) -> Iterator[None]:
        """A context of the app, which logs in as a role."""
        app = rights.create_app(self.url_of(role))
        self.add(app, rights.db)
        with app.app_context():
            yield

    def enqueue(self, role: str, processor: Any, **arguments: Any) -> None:
        with self.context(role):
            processor.enqueue(**arguments)
            rights.db.session.commit()

    def add(self, app: Flask, db: SQLAlchemy) -> None:
        """Have an app's connections closed at the end."""
        self._apps.append((app, db))

    def make_tables(self) -> None:
        """The queue's, and the app's own with what is needed of it."""
        with self.context("owner"):
            rights.db.create_all()
        self.sql("GRANT SELECT, INSERT ON effect TO PUBLIC")

    def flask(self, role: str, *arguments: str, **env: Any) -> Process:
        return self.processes.flask(
            "--app", APP, "bq", *arguments, DATABASE_URL=self.url_of(role), **env
        )

    def worker(self, role: str = "worker") -> Process:
        return self.processes.worker(APP, DATABASE_URL=self.url_of(role), **ZOMBIE)

    def burst(self) -> Process:
        return self.flask("worker", "worker", "--burst")

    def effects(self) -> list[str]:
        return [text for [text] in self.sql("SELECT text FROM effect ORDER BY text")]

    def states(self) -> list[Any]:
        return self.sql("SELECT func_name, state FROM bq_tasks ORDER BY 1, 2")

    def close(self) -> None:
        for app, db in self._apps:
            with app.app_context():
                db.engine.dispose()


@pytest.fixture
def database_url(server_url: str) -> Iterator[str]:
    """A database of the test's own, whose roles go with it: they belong to the whole server."""
    with postgres.database(server_url) as url:
        yield with_driver(url)
    name = sa.make_url(url).database
    for role in ("owner", "web", "worker", "other"):
        query(server_url, f"DROP ROLE IF EXISTS {name}_{role}")


@pytest.fixture
def empty_shop(database_url: str, processes: Processes) -> Iterator[Shop]:
    with contextlib.closing(Shop(database_url, processes)) as shop:
        yield shop


@pytest.fixture
def closed_shop(empty_shop: Shop) -> Shop:
    """One with tables, and no right to use them."""
    empty_shop.make_tables()
    return empty_shop


@pytest.fixture
def shop(closed_shop: Shop) -> Shop:
    """One with all rights that the page grants."""
    closed_shop.grant(*PARAGRAPHS)
    return closed_shop


@pytest.fixture
def probe(shop: Shop, probe: Probe) -> Probe:
    probe.listen_states()
    return probe


def denied(words: str | None = None) -> Any:
    return pytest.raises(sa.exc.ProgrammingError, match=words)


# Enough.


def test_the_owner_makes_the_tables(empty_shop: Shop) -> None:
    process = empty_shop.flask("owner", "create-tables")
    assert process.wait() == 0
    assert empty_shop.sql("SELECT DISTINCT tableowner FROM pg_tables WHERE tablename ~ 'bq_'") == [
        (empty_shop.role("owner"),)
    ]


def test_to_make_tasks_takes_insert_alone(closed_shop: Shop) -> None:
    closed_shop.grant(CONNECT, ENQUEUE)
    with closed_shop.context("web"):
        rights.db.session.add(rights.write.run(text="run"))
        for text in ("enqueue", "enqueue again"):
            rights.write.enqueue(text=text)
        rights.write.enqueue_many([{"text": "many"}, {"text": "more"}])
        with rights.db.session.begin_nested():
            rights.db.session.add(rights.bq.Task(channel="rights", module=APP, name="nothing"))
        rights.db.session.add(rights.Effect(text="own row", task=rights.nothing.run()))
        rights.db.session.add(rights.Effect(text="another", task=(task := rights.nothing.run())))
        rights.db.session.flush()
        assert isinstance(task.id, uuid.UUID)
        rights.db.session.commit()
        with denied(f"{DENIED} bq_tasks"):
            _ = task.id
    submit = closed_shop.flask("web", "submit", "rights", APP, "nothing")
    assert submit.wait() == 0
    assert len(closed_shop.states()) == 9
    assert closed_shop.effects() == ["another", "own row"]


def test_the_web_role_makes_tasks_and_the_worker_role_does_them(shop: Shop) -> None:
    with shop.context("web"):
        task = rights.write.enqueue(text="written")
        rights.make.enqueue(texts=["made", "made too", "and made"])
        rights.stumble.enqueue()
        rights.fail.enqueue()
        rights.db.session.commit()
        worker = shop.burst()
        assert worker.wait() == 0
        assert (task.state, task.result) == ("DONE", "written")
    assert shop.effects() == ["and made", "made", "made too", "stumbled", "written"]
    assert shop.states() == [
        ("fail", "FAILED"),
        ("make", "DONE"),
        ("stumble", "DONE"),
        *[("write", "DONE")] * 4,
    ]
    assert shop.sql("SELECT type, error_message FROM bq_events ORDER BY 1") == [
        ("FAILED", "ValueError: no good"),
        ("RETRIED", "ValueError: not yet"),
    ]
    assert shop.sql("SELECT state FROM bq_workers") == [("SHUTDOWN",)]


@pytest.mark.parametrize("well", [True, False])
def test_the_web_role_ends_a_parked_task(shop: Shop, well: bool) -> None:
    with shop.context("web"):
        task = rights.park.enqueue()
        rights.db.session.commit()
        assert shop.burst().wait() == 0
        if well:
            rights.bq.complete(task.id, result=5)
        else:
            rights.bq.fail(task.id, error="no good")
        rights.db.session.commit()
        seen = task.state, task.result, task.error_message
    assert seen == (("DONE", 5, None) if well else ("FAILED", None, "no good"))


def test_a_killed_workers_task_is_taken_over(shop: Shop, probe: Probe) -> None:
    with shop.context("web"):
        done_by_the_next(
            shop.worker().kill, shop.worker, probe, "waiting", rights.wait, text="waited"
        )
    assert shop.effects() == ["waited"]
    assert shop.sql("SELECT claims, crashes FROM bq_tasks") == [(2, 1)]


def test_the_connections_of_a_frozen_worker_are_ended(shop: Shop, probe: Probe) -> None:
    first = shop.worker()
    with shop.context("web"):
        # The second cannot do it while the first keeps the unique value locked.
        second = done_by_the_next(
            first.freeze, shop.worker, probe, "waiting", rights.wait, text="waited"
        )
    first.thaw()
    assert first.wait() == 1
    assert "declared dead" in first.output
    assert "cannot be ended" not in second.output
    assert shop.effects() == ["waited"]


@pytest.mark.parametrize("how", ["as it connects", "in the URL", "by default"])
def test_the_connections_of_a_frozen_worker_that_has_set_its_role_are_ended(
    closed_shop: Shop, processes: Processes, how: str
) -> None:
    """The role that it works as is not the one that it logged in as, and may not end anybody's."""
    shop = closed_shop
    group = shop.make_role("other", [grant for grant in GRANTS if grant.to == "shop_worker"])
    shop.grant(*PARAGRAPHS[:-2])
    shop.sql(f"GRANT {group} TO {shop.role('worker')}")
    url, env = sa.make_url(shop.url_of("worker")), {"PROBE_DATABASE_URL": shop.url}
    if how == "as it connects":
        env["CONNECT_AS"] = group
    elif how == "in the URL":
        url = url.update_query_dict({"options": f"-c role={group}"})
    else:
        shop.sql(f"ALTER ROLE {shop.role('worker')} SET role = {group}")
    env["DATABASE_URL"] = url.render_as_string(hide_password=False)

    def start() -> Process:
        return processes.worker(APP, **env, **ZOMBIE)

    with contextlib.closing(Probe(shop.url)) as probe, shop.context("web"):
        probe.listen_states()
        first = start()
        second = done_by_the_next(first.freeze, start, probe, "waiting", rights.wait, text="waited")
    assert "cannot be ended" not in second.output
    assert shop.effects() == ["waited"]


def test_a_dead_worker_of_another_role_keeps_its_connections_and_not_its_tasks(
    shop: Shop, probe: Probe
) -> None:
    other = shop.make_role("other", [grant for grant in GRANTS if grant.to == "shop_worker"])
    first = shop.worker("other")
    with shop.context("web"):
        second = done_by_the_next(
            first.freeze, shop.worker, probe, "thinking", rights.think, text="thought"
        )
    second.wait_line(f"The backends of dead workers cannot be ended: they belong to {other}")
    kept = f"SELECT 1 FROM pg_stat_activity WHERE usename = '{other}' AND application_name ~ 'bean'"
    assert shop.sql(kept)
    first.thaw()
    assert first.wait() == 1
    assert shop.effects() == ["thought"]


def test_to_hear_of_tasks_takes_no_right_and_tells_the_channel_alone(closed_shop: Shop) -> None:
    closed_shop.grant(CONNECT[:1])
    with contextlib.closing(Probe(closed_shop.url_of("web"), "rights")) as ears:
        closed_shop.enqueue("owner", rights.write, text="a word")
        ears.wait_until(lambda: ears.heard)
        assert ears.heard == [""]


def test_to_cancel_and_to_try_again_by_hand_takes_two_columns(closed_shop: Shop) -> None:
    closed_shop.grant(CONNECT, ENQUEUE, READ)
    web = closed_shop.role("web")
    closed_shop.sql(f"GRANT UPDATE (state, finished_at) ON bq_tasks TO {web}")
    with closed_shop.context("web"):
        task = rights.nothing.enqueue()
        rights.db.session.commit()
        for state in ("CANCELLED", "PENDING"):
            task.state = state
            rights.db.session.commit()
        task.kwargs = {"text": "another"}
        with denied(f"{DENIED} bq_tasks"):
            rights.db.session.flush()


def test_to_show_events_takes_the_right_to_read_them(shop: Shop) -> None:
    with shop.context("web"):
        task = rights.nothing.enqueue()
        rights.db.session.commit()
        with denied(f"{DENIED} bq_events"):
            _ = task.events
        rights.db.session.rollback()
        shop.sql(f"GRANT SELECT ON bq_events TO {shop.role('web')}")
        assert task.events == []


def test_to_clear_up_takes_select_and_delete(shop: Shop) -> None:
    section = (DOCS / "deployment.md").read_text().partition("## Tables")[2]
    statements = re.findall(r"^DELETE [^;]*;", section, re.M)
    assert len(statements) == 2
    other = shop.make_role("other", CONNECT[::2])
    shop.sql(f"GRANT SELECT, DELETE ON bq_tasks, bq_workers TO {other}")
    shop.enqueue("web", rights.nothing)
    assert shop.burst().wait() == 0
    shop.sql("UPDATE bq_tasks SET finished_at = finished_at - interval '31 days'")
    shop.sql("UPDATE bq_workers SET last_heartbeat = last_heartbeat - interval '31 days'")
    for statement in statements:
        query(shop.url_of("other"), statement)
    assert shop.sql("SELECT 1 FROM bq_tasks UNION ALL SELECT 1 FROM bq_workers") == []


def test_to_refer_to_tasks_takes_references_when_the_table_is_made_and_no_more(
    closed_shop: Shop,
) -> None:
    closed_shop.grant(CONNECT, ENQUEUE)
    web = closed_shop.role("web")
    closed_shop.sql(f"GRANT CREATE ON SCHEMA public TO {web}")
    table = "CREATE TABLE own (task_id uuid REFERENCES bq_tasks (id))"
    with denied(f"{DENIED} bq_tasks"), closed_shop.context("web"):
        rights.db.session.execute(sa.text(table))
    closed_shop.sql(f"GRANT REFERENCES ON bq_tasks TO {web}")
    query(closed_shop.url_of("web"), table)
    closed_shop.sql(f"REVOKE REFERENCES ON bq_tasks FROM {web}")
    with closed_shop.context("web"):
        task = rights.nothing.enqueue()
        rights.db.session.flush()
        rights.db.session.execute(sa.text("INSERT INTO own VALUES (:id)"), {"id": task.id})
        rights.db.session.commit()


@pytest.mark.parametrize("eager", [True, False])
def test_own_models_are_inserted_without_select_where_the_orm_asks_for_nothing(
    closed_shop: Shop, eager: bool
) -> None:
    db = SQLAlchemy()

    class Task(TaskModelMixin, TaskModelRefWorkerMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "task"
        bq_worker_tasks = None
        if not eager:
            __mapper_args__ = {"eager_defaults": False}

    bq = BeanQueue(db=db, task_model=Task)

    @bq.processor()
    def look() -> None:
        pass

    closed_shop.grant(CONNECT)
    for role in ("owner", "web"):
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = closed_shop.url_of(role)
        db.init_app(app)
        bq.init_app(app)
        closed_shop.add(app, db)
        with app.app_context():
            if role == "owner":
                db.create_all()
                closed_shop.sql(f"GRANT INSERT ON task TO {closed_shop.role('web')}")
            else:
                look.enqueue()
                with denied(f"{DENIED} task") if eager else contextlib.nullcontext():
                    db.session.commit()


# Needed.


def test_all_rights_that_are_granted_are_tried_without() -> None:
    assert set(WITHOUT) == set(GRANTS)
    assert len(GRANTS) == len(WITHOUT)


def submit(shop: Shop) -> str:
    process = shop.flask("web", "submit", "rights", APP, "nothing")
    assert process.wait() == 1
    return process.output


def read(shop: Shop) -> str:
    with shop.context("web"), denied() as caught:
        task = rights.nothing.enqueue()
        rights.db.session.commit()
        _ = task.state
    return str(caught.value.orig)


def end(shop: Shop) -> str:
    shop.sql(
        "INSERT INTO bq_tasks (module, func_name, state, parked)"
        " VALUES ('a', 'b', 'PROCESSING', true)"
    )
    [(task_id,)] = shop.sql("SELECT id::text FROM bq_tasks")
    with shop.context("web"), denied() as caught:
        rights.bq.complete(task_id)
    return str(caught.value.orig)


def work(shop: Shop) -> str:
    process = shop.burst()
    assert process.wait() == 1
    assert shop.sql("SELECT 1 FROM bq_workers") == []
    return process.output


def make(shop: Shop) -> str:
    shop.enqueue("web", rights.make, texts=["made"])
    assert shop.burst().wait() == 0
    [(state, message)] = shop.sql("SELECT state, error_message FROM bq_tasks")
    assert state == "FAILED"
    return str(message)


#: What one cannot do without a right, and what is said then.
WITHOUT: dict[Grant, Any] = {
    Grant("CONNECT", "DATABASE shop", "shop_web"): (submit, "permission denied for database"),
    Grant("CONNECT", "DATABASE shop", "shop_worker"): (work, "permission denied for database"),
    Grant("USAGE", "SCHEMA public", "shop_web"): (
        submit,
        "Let the owner of its schema GRANT USAGE on it to {web}",
    ),
    Grant("USAGE", "SCHEMA public", "shop_worker"): (
        work,
        "Let the owner of its schema GRANT USAGE on it to {worker}",
    ),
    Grant("INSERT", "bq_tasks", "shop_web"): (submit, "Let its owner GRANT INSERT on it to {web}"),
    Grant("SELECT", "bq_tasks", "shop_web"): (read, f"{DENIED} bq_tasks"),
    Grant("UPDATE", "bq_tasks", "shop_web"): (end, f"{DENIED} bq_tasks"),
    Grant("INSERT", "bq_events", "shop_web"): (end, f"{DENIED} bq_events"),
    Grant("INSERT", "bq_tasks", "shop_worker"): (make, f"{DENIED} bq_tasks"),
} | {
    Grant(right, table, "shop_worker"): (
        work,
        f"{DENIED} {table}. Let its owner GRANT SELECT, INSERT and UPDATE on the queue's tables"
        " to {worker}",
    )
    for right, table in [
        ("SELECT", "bq_workers"),
        ("INSERT", "bq_workers"),
        ("UPDATE", "bq_workers"),
        ("SELECT", "bq_tasks"),
        ("UPDATE", "bq_tasks"),
        ("SELECT", "bq_events"),
        ("INSERT", "bq_events"),
    ]
}


@pytest.mark.parametrize("grant", GRANTS, ids=lambda grant: f"{grant} TO {grant.to}")
def test_without_one_right_something_is_refused_and_says_what(shop: Shop, grant: Grant) -> None:
    shop.revoke(grant)
    refused, words = WITHOUT[grant]
    assert words.format(web=shop.role("web"), worker=shop.role("worker")) in refused(shop)


# And no more.


NEITHER = [
    "DELETE FROM bq_tasks",
    "DELETE FROM bq_workers",
    "DELETE FROM bq_events",
    "UPDATE bq_events SET type = ''",
    "TRUNCATE bq_tasks CASCADE",
    "DROP TABLE bq_events",
    "ALTER TABLE bq_tasks DISABLE TRIGGER ALL",
    "CREATE TABLE own (id int)",
    "CREATE TEMPORARY TABLE own (id int)",
    "CREATE TABLE own (task_id uuid REFERENCES bq_tasks (id))",
]


@pytest.mark.parametrize(
    ("role", "paragraphs", "statements"),
    [
        ("web", [ENQUEUE], ["SELECT kwargs FROM bq_tasks"]),
        (
            "web",
            [ENQUEUE, READ],
            [
                "UPDATE bq_tasks SET state = 'CANCELLED'",
                "UPDATE bq_tasks SET kwargs = '{}'",
                "SELECT FROM bq_tasks FOR KEY SHARE",
                "INSERT INTO bq_events (task_id, type) SELECT id, '' FROM bq_tasks",
            ],
        ),
        (
            "web",
            PARAGRAPHS,
            [
                "SELECT traceback FROM bq_events",
                "SELECT FROM bq_workers",
                "UPDATE bq_workers SET state = 'NO_HEARTBEAT'",
                "INSERT INTO bq_workers (name, channels) VALUES ('', '{}')",
                *NEITHER,
            ],
        ),
        ("worker", PARAGRAPHS, NEITHER),
    ],
    ids=["web that makes tasks", "web that reads them, too", "web", "worker"],
)
def test_the_roles_may_do_no_more(
    closed_shop: Shop, role: str, paragraphs: list[list[Grant]], statements: list[str]
) -> None:
    closed_shop.grant(CONNECT, *paragraphs)
    closed_shop.sql(
        "INSERT INTO bq_tasks (module, func_name, state) VALUES ('no', 'where', 'PROCESSING')"
    )
    with closed_shop.context(role):
        for statement in statements:
            with denied("permission denied|must be owner"):
                rights.db.session.execute(sa.text(statement))
            rights.db.session.rollback()


def test_the_web_role_cannot_end_a_workers_connections(shop: Shop) -> None:
    with shop.context("worker"):
        pid = rights.db.session.scalar(sa.select(sa.func.pg_backend_pid()))
        # As PostgreSQL 16 and later put it, and 15.
        with shop.context("web"), denied("permission denied|must be a member of the role"):
            rights.db.session.scalar(sa.select(sa.func.pg_terminate_backend(pid)))


# Row-level security, which lets a worker see no task and says nothing of it.

QUEUE = ("bq_tasks", "bq_workers", "bq_events")


@pytest.fixture
def hidden_shop(shop: Shop) -> Shop:
    """One whose rows are hidden from all but the owner of the tables."""
    for table in QUEUE:
        shop.sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    return shop


def allow(shop: Shop, *policies: str, role: str = "worker") -> None:
    """Make policies for all tables of the queue.

    :param policies: what comes after the name of the table; ``{role}`` is the role.
    """
    for table in QUEUE:
        for number, policy in enumerate(policies):
            policy = policy.format(role=shop.role(role))
            shop.sql(f"CREATE POLICY p{number} ON {table} {policy}")


def check(shop: Shop, role: str = "worker", **changes: Any) -> None:
    """Check the tables as a worker does when it starts.

    :param changes: of the URL.
    """
    engine = sa.create_engine(sa.make_url(shop.url_of(role)).set(**changes))
    with contextlib.closing(connect(engine)) as connection:
        check_tables(connection, rights.bq.models)


HIDDEN = "Row-level security keeps {role} from rows of {tables}"


@pytest.mark.parametrize("arguments", [[], ["--burst"], ["--processes", "2"]])
def test_a_worker_from_which_rows_are_hidden_says_so(
    hidden_shop: Shop, arguments: list[str]
) -> None:
    process = hidden_shop.flask("worker", "worker", *arguments)
    assert process.wait() == 1
    [line] = [line for line in process.output.splitlines() if line.startswith("Error: ")]
    role = hidden_shop.role("worker")
    assert HIDDEN.format(role=role, tables="bq_events, bq_tasks, bq_workers") in line
    assert f"ALTER ROLE {role} BYPASSRLS" in line
    assert f"FOR ALL TO {role} USING (true)" in line
    assert hidden_shop.sql("SELECT FROM bq_workers") == []


@pytest.mark.parametrize("table", QUEUE)
def test_one_table_whose_rows_are_hidden_is_refused(shop: Shop, table: str) -> None:
    shop.sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    words = HIDDEN.format(role=shop.role("worker"), tables=table)
    with pytest.raises(SetupError, match=re.escape(words)):
        check(shop)
    shop.sql(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    check(shop)


@pytest.mark.parametrize(
    "policies",
    [
        ["TO {role} USING (true)"],
        ["USING (true)"],  # to all
        ["TO {role} USING (true) WITH CHECK (true)"],
        ["TO {role} USING (true)", "TO {role} USING (id IS NULL)"],  # one of them is enough
    ],
)
def test_a_policy_that_shows_all_rows_lets_a_worker_work(
    hidden_shop: Shop, policies: list[str]
) -> None:
    allow(hidden_shop, *policies)
    check(hidden_shop)


def test_a_worker_to_which_a_policy_shows_all_rows_does_tasks(hidden_shop: Shop) -> None:
    allow(hidden_shop, "TO {role} USING (true)")
    web = hidden_shop.role("web")
    hidden_shop.sql(f"CREATE POLICY web ON bq_tasks FOR INSERT TO {web} WITH CHECK (true)")
    hidden_shop.enqueue("web", rights.make, texts=["one", "two"])
    hidden_shop.enqueue("web", rights.stumble)
    assert hidden_shop.burst().wait() == 0
    assert hidden_shop.effects() == ["one", "stumbled", "two"]


@pytest.mark.parametrize(
    "policies",
    [
        ["TO {role} USING (false)"],
        ["TO {role} USING (id IS NULL)"],
        ["TO {role}"],  # which shows none
        [
            "FOR SELECT TO {role} USING (true)",
            "FOR UPDATE TO {role} USING (true)",
            "FOR INSERT TO {role} WITH CHECK (true)",
        ],
        ["FOR INSERT TO {role} WITH CHECK (true)"],
        ["TO {role} USING (true)", "AS RESTRICTIVE TO {role} USING (id IS NOT NULL)"],
        ["TO {role} USING (true)", "AS RESTRICTIVE FOR INSERT WITH CHECK (id IS NOT NULL)"],
    ],
)
def test_a_policy_that_may_hide_a_row_is_refused(hidden_shop: Shop, policies: list[str]) -> None:
    allow(hidden_shop, *policies)
    with pytest.raises(SetupError, match="Row-level security"):
        check(hidden_shop)


def test_a_policy_of_a_role_holds_for_its_members_alone(hidden_shop: Shop) -> None:
    group = hidden_shop.make_role("other")
    allow(hidden_shop, "TO {role} USING (true)", role="other")
    with pytest.raises(SetupError, match="Row-level security"):
        check(hidden_shop)
    hidden_shop.sql(f"GRANT {group} TO {hidden_shop.role('worker')}")
    check(hidden_shop)


def test_who_passes_row_level_security_works(hidden_shop: Shop) -> None:
    hidden_shop.sql(f"ALTER ROLE {hidden_shop.role('worker')} BYPASSRLS")
    check(hidden_shop)
    check(hidden_shop, "owner")


def test_an_owner_that_is_held_to_its_own_policies_is_refused(hidden_shop: Shop) -> None:
    hidden_shop.sql("ALTER TABLE bq_tasks FORCE ROW LEVEL SECURITY")
    with pytest.raises(SetupError, match="from rows of bq_tasks:"):
        check(hidden_shop, "owner")


def test_rows_that_would_raise_instead_of_hide_are_refused_in_the_same_words(
    hidden_shop: Shop,
) -> None:
    hidden_shop.sql(f"ALTER ROLE {hidden_shop.role('worker')} SET row_security = off")
    with pytest.raises(SetupError, match="Row-level security"):
        check(hidden_shop)


def test_a_role_with_an_odd_name_is_named_as_sql_takes_it(hidden_shop: Shop) -> None:
    name, worker = f"{hidden_shop.role('worker')} or'so:x%s", hidden_shop.role("worker")
    hidden_shop.sql(f'ALTER ROLE {worker} RENAME TO "{name}"')
    try:
        with pytest.raises(SetupError, match=re.escape(f'ALTER ROLE "{name}" BYPASSRLS')):
            check(hidden_shop, username=name)
    finally:
        hidden_shop.sql(f'ALTER ROLE "{name}" RENAME TO {worker}')
