"""Connections of the queue's own, outside the pool that the processors share."""

from __future__ import annotations

import contextlib
import threading
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..exceptions import EncodingError, PoolerError

#: What the levels of autocommit are called.
READ_COMMITTED = "read committed"


def open_beside(engine: Engine) -> t.Any:
    """Open a connection of the driver's as the engine's pool does, listeners included.

    It never waits for the pool: a worker that waits there would miss its heartbeats.

    :return: the connection as a pool hands it out, one that is not the engine's.
    """
    return engine.pool.recreate().connect()


def connect(engine: Engine) -> Connection:
    """Open a connection in autocommit that is made as the engine's pool makes its own, and does not
    count there.

    :raises PoolerError: if it can be used through no pooler.
    :raises EncodingError: if the database takes bytes of any kind for text.
    """
    try:
        opened = open_beside(engine)
    except engine.dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError.instance(
            None, None, error, engine.dialect.loaded_dbapi.Error, dialect=engine.dialect
        ) from error
    connection = Connection(engine, connection=opened)
    try:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()
        raw = connection.connection.dbapi_connection
        level, pid, encoding, _ = connection.execute(
            sa.text(
                "SELECT current_setting('default_transaction_isolation'), pg_backend_pid(),"
                " current_setting('server_encoding'),"
                # Idle timeouts must not end it. Behind a pooler, the setting would stay on a
                # connection that others use.
                " CASE pg_backend_pid() WHEN :pid"
                " THEN set_config('idle_session_timeout', '0', false) END"
            ),
            {"pid": t.cast(t.Any, raw).info.backend_pid},
        ).one()
        if encoding == "SQL_ASCII":
            # The driver raises UnicodeDecodeError when it reads such a row, and the claim, which
            # has been committed by then, is lost with the worker.
            raise EncodingError(
                "The database's encoding is SQL_ASCII, in which any bytes pass for text, also such"
                " as nobody can read. Move what it holds to a database with ENCODING 'UTF8'."
            )
        pooled = is_pooled(raw, pid)
        if engine.driver == "psycopg":
            # A statement that psycopg 3 has prepared keeps its plan while the table grows from ten
            # rows to a million; and behind a pooler the next backend would not know it.
            t.cast(t.Any, raw).prepare_threshold = None
        if level != READ_COMMITTED:
            # Autocommit follows the session's default, and a claim must see what was committed
            # meanwhile.
            if pooled:
                raise PoolerError(
                    f"The database's default_transaction_isolation is {level!r}, and a pooler keeps"
                    " no other setting for the queue. Let it be 'read committed' (ALTER ROLE … SET"
                    " default_transaction_isolation), and give your app its level with"
                    " SQLALCHEMY_ENGINE_OPTIONS = {'isolation_level': …}."
                )
            connection.execute(
                sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED")
            )
    except BaseException:
        connection.close()
        raise
    return connection


def is_pooled(raw: t.Any, pid: int) -> bool:
    """Whether a pooler stands before the database: it answers for a backend of its own making.

    :param raw: the driver's connection.
    :param pid: the backend that answered on it.
    """
    return bool(raw.info.backend_pid != pid)


def codec_of(connection: Connection) -> str | None:
    """Return Python's codec for what encodes the database's texts; None if it has all letters."""
    raw: t.Any = connection.connection.dbapi_connection
    name = raw.info.parameter_status("server_encoding")
    if name in (None, "UTF8"):
        return None
    from psycopg2.extensions import encodings

    return encodings.get(name, "ascii")


class OwnConnection:
    """A connection of its own that is made when it is asked for, and again after it was lost.

    :param engine: where to connect.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None
        self._has_opened = False

    @property
    def connection(self) -> Connection:
        """The connection, which is opened if there is none.

        :raises sqlalchemy.exc.OperationalError: for whatever the app's own way to connect raises
            when it is opened again: what has worked before may do so again. The first time, that
            comes as it is.
        """
        if self._connection is None:
            try:
                self._connection = connect(self._engine)
            except Exception as error:
                if isinstance(error, sa.exc.DBAPIError) or not self._has_opened:
                    raise
                raise sa.exc.OperationalError(None, None, error) from error
            self._has_opened = True
        return self._connection

    def close(self) -> None:
        """Close the connection, if there is one, and even if it is broken."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


def limits(timeout: float) -> dict[str, int]:
    """libpq's settings by which a connection ends that no answer can come through any more, and an
    attempt to connect.

    Without them, a client whose network is cut waits for an answer for two hours.

    :param timeout: seconds within which that is found out.
    """
    return {
        "connect_timeout": min(max(int(timeout / 3), 2), 10),
        "keepalives_idle": max(int(timeout / 4), 1),
        "keepalives_interval": max(int(timeout / 8), 1),
        "keepalives_count": 3,
        "tcp_user_timeout": int(timeout * 500),
    }


def renew(connection: t.Any, record: t.Any, proxy: t.Any) -> None:
    """When the pool hands out a connection that carries the name of a worker that has gone: let
    it connect anew."""
    gone = record.info.get("beanqueue")
    if gone is not None and gone.is_set():
        raise sa.exc.DisconnectionError


@contextlib.contextmanager
def named(
    engines: t.Iterable[Engine], name: str, timeout: float, **settings: int
) -> t.Iterator[None]:
    """Let all connections that the engines hand out carry a name, so that another worker can end
    them when this one is frozen; and no longer, once it has gone.

    :param name: their ``application_name``.
    :param timeout: seconds within which they find out that the network is gone, unless the app
        has settings of its own for that.
    :param settings: of libpq, in place of those that follow from it.
    """
    gone = threading.Event()

    def do_connect(
        dialect: t.Any, record: t.Any, args: list[t.Any], kwargs: dict[str, t.Any]
    ) -> t.Any:
        record.info["beanqueue"] = gone
        # Not changed in place: later connections may be made with the same ones.
        kwargs = {**limits(timeout), **settings, **kwargs, "application_name": name}
        if dialect.driver == "psycopg":  # tasks are completed on the app's connections
            kwargs.setdefault("prepare_threshold", None)
        return dialect.connect(*args, **kwargs)

    def connect(connection: t.Any, record: t.Any) -> None:
        if record.info.get("beanqueue") is gone:
            return
        # The app connects by itself, with a creator or a do_connect of its own.
        connection.cursor().execute(f"SET application_name = '{name}'")
        connection.commit()
        record.info["beanqueue"] = gone

    def checkout(connection: t.Any, record: t.Any, proxy: t.Any) -> None:
        if "beanqueue" not in record.info:  # connected before: the pool connects it anew
            raise sa.exc.DisconnectionError

    engines = {engine for engine in engines if engine.dialect.name == "postgresql"}
    listeners = (do_connect, connect, checkout)
    for engine in engines:
        for listener in listeners:
            sa.event.listen(engine, listener.__name__, listener)
        if not sa.event.contains(engine, "checkout", renew):
            sa.event.listen(engine, "checkout", renew)
    try:
        yield
    finally:
        gone.set()
        for engine in engines:
            for listener in listeners:
                sa.event.remove(engine, listener.__name__, listener)


def application_name(worker_id: uuid.UUID | str) -> str:
    """Return what a worker's connections are called in ``pg_stat_activity``."""
    return f"beanqueue {worker_id}"
