"""Checks: what would keep the queue from its promises, found before it starts."""

from __future__ import annotations

import sys
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..config import PREFIX, Config
from ..exceptions import ConfigError, SetupError
from ..models.make import Models
from ..sql import Sql, quote
from . import settle
from .claim import claim_nothing
from .database import reason
from .handover import check_schema

# What a worker would not be told of by any error: rows that row-level security hides from it, and a
# relation in which ctid is no identity. What is not there is left to those who use it.
OBSTACLES = Sql("""
    SELECT needed.name, c.relkind = 'r' AS ordinary, quote_ident(current_user) AS role,
        row_security_active(c.oid) AND (
            SELECT bool_or(NOT p.polpermissive) OR bool_or(
                p.polpermissive AND p.polcmd = '*'
                AND pg_get_expr(p.polqual, p.polrelid) = 'true') IS NOT TRUE
            FROM pg_policy AS p
            WHERE p.polrelid = c.oid AND EXISTS (
                SELECT FROM unnest(p.polroles) AS held (role)
                WHERE CASE WHEN held.role = 0 THEN true
                    ELSE pg_has_role(held.role, 'USAGE') END)
        ) AS hidden
    FROM unnest(CAST(:names AS text[])) AS needed (name)
    JOIN pg_class AS c ON c.oid = to_regclass(needed.name)
    ORDER BY needed.name
""")


def check_tables(connection: Connection, models: Models) -> None:
    """See whether the tables are there with all columns, and may be used; read no row.

    :raises SetupError: if rows are hidden from the role, or the tasks are in no ordinary table.
    :raises sqlalchemy.exc.DBAPIError: naming what is not; a ProgrammingError, unless it comes
        from a trigger.
    """
    worker, task, event = models.tables
    check_obstacles(connection, models)
    for table in (worker, task, event):
        nothing = sa.select(*table.columns).where(sa.false())
        if table is not event:  # which also takes the right to UPDATE
            nothing = nothing.with_for_update(key_share=True)
        connection.execute(nothing).close()
    for table in (worker, event):  # and here the right to INSERT
        nothing = sa.select(table.c.id).where(sa.false())
        connection.execute(sa.insert(table).from_select(["id"], nothing))
    # And what is done all the time: it names the columns, and triggers may be in its way.
    claim_nothing(connection, models)
    for plain in (True, False):
        settle.check(connection, models, plain=plain)


def check_obstacles(connection: Connection, models: Models) -> None:
    """See whether a worker would miss rows without being told.

    :raises SetupError: if so.
    """
    names = [quote(table).replace(r"\:", ":") for table in models.tables]
    rows = connection.execute(OBSTACLES.on(models), {"names": names}).all()
    if hidden := [row.name for row in rows if row.hidden]:
        tables, role = ", ".join(hidden), rows[0].role
        raise SetupError(
            f"Row-level security keeps {role} from rows of {tables}: a worker would find"
            f" nothing to do, and say nothing. ALTER ROLE {role} BYPASSRLS; or, for each table,"
            f" CREATE POLICY … FOR ALL TO {role} USING (true), and let no restrictive policy"
            " apply to it; or ALTER TABLE … DISABLE ROW LEVEL SECURITY."
        )
    if not all(row.ordinary for row in rows if row.name == names[1]):
        raise SetupError(
            f"{names[1]} is not an ordinary table (it is partitioned, say, or a view), and a"
            " worker finds its tasks by ctid, which identifies rows of ordinary tables alone."
            " Let the queue have such a table, and copy what has ended to a partitioned one of"
            " yours."
        )


def check_engine(engine: Engine, tables: t.Iterable[sa.Table]) -> None:
    """Refuse an engine with which the queue cannot keep its promises.

    :param tables: the queue's.
    :raises RuntimeError: saying why.
    """
    if engine.dialect.name != "postgresql":
        raise RuntimeError(
            f"The queue needs PostgreSQL, but the database is {engine.dialect.name}. Set"
            " SQLALCHEMY_DATABASE_URI to a postgresql+psycopg2:// URL, or name the bind that is"
            " one with BeanQueue(bind_key=…)."
        )
    if engine.driver not in ("psycopg2", "psycopg"):
        raise RuntimeError(
            f"The queue works with psycopg2 and psycopg 3, not with {engine.driver}. Use a"
            " postgresql+psycopg2:// or postgresql+psycopg:// URL."
        )
    levels = (
        engine.get_execution_options().get("isolation_level"),
        getattr(engine.dialect, "_on_connect_isolation_level", None),
    )
    if "AUTOCOMMIT" in (str(level).upper() for level in levels):
        raise RuntimeError(
            "The engine is in AUTOCOMMIT, where a task and its data cannot be committed together."
            " Take isolation_level out of SQLALCHEMY_ENGINE_OPTIONS."
        )
    check_schema(engine.get_execution_options(), *tables)


def check_pool_is_there(engine: t.Any, sessions: t.Any) -> None:
    """Refuse to work where a test holds a connection in the place of an engine, and rolls it back.

    :param sessions: ``db.session``.
    :raises RuntimeError: if that is so.
    """
    if any(isinstance(each, Connection) for each in (engine, sessions.session_factory.kw["bind"])):
        raise RuntimeError(
            "A worker has connections of its own and would see nothing of this test, whose"
            " connection is rolled back. Call the processor like a function, or let the test really"
            " commit (docs/guide.md, Testing)."
        )


def make_listen_engine(engine: Engine, config: Config) -> Engine:
    """An engine for LISTEN: the app's, unless it has an address of its own.

    :raises ConfigError: if the address's driver is not there; none but a worker needs it.
    """
    if config.LISTEN_DATABASE_URL is None:
        return engine
    try:
        return sa.create_engine(config.LISTEN_DATABASE_URL, poolclass=sa.NullPool)
    except ImportError as error:
        raise ConfigError(
            f"{PREFIX}LISTEN_DATABASE_URL names a driver that cannot be imported: {reason(error)}"
        ) from error


def check_threads() -> None:
    """Refuse a process in which greenlets stand in for threads: one that waits for the database
    would hold up all others.

    :raises SetupError: naming the library that has replaced them.
    """
    # By library: debuggers put functions of their own there, too, and their threads are real.
    for library, module, asks in (
        ("gevent", "gevent.monkey", "is_module_patched"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched"),
    ):
        is_patched = getattr(sys.modules.get(module), asks, None)
        # What a worker sleeps with is as bad as its threads.
        if is_patched and any(map(is_patched, ("threading", "thread", "select"))):
            raise SetupError(
                f"{library} has patched threads, or what waits, with greenlets, and a worker needs"
                " real threads. Let the web server patch (as gunicorn -k does), and not a module"
                " that the worker imports, too. Tasks can be made in a process that is patched."
            )


def check_pool(engine: sa.Engine, concurrency: int) -> None:
    """Refuse more threads than the app's pool has connections.

    :raises ValueError: naming both numbers; or the kind of pool, if all threads get the same one.
    """
    pool = engine.pool
    if isinstance(pool, sa.pool.StaticPool):
        raise ValueError(
            "The app's pool is a StaticPool, with one connection, and so one transaction, for all"
            ' that it does. Take "poolclass" out of SQLALCHEMY_ENGINE_OPTIONS.'
        )
    if not isinstance(pool, sa.pool.QueuePool) or pool._max_overflow < 0:
        return
    most = pool.size() + pool._max_overflow
    if concurrency > most:
        raise ValueError(
            f"{concurrency} tasks at once need as many connections, but the app's pool has at most"
            f" {most}. Lower --concurrency (BQ_CONCURRENCY), or give it more with"
            f' SQLALCHEMY_ENGINE_OPTIONS = {{"pool_size": {concurrency}}}.'
        )
