"""Connections of the queue's own, outside the pool that the processors share."""

from __future__ import annotations

import contextlib
import threading
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from .queries import application_name


def connect(engine: Engine) -> Connection:
    """Open a connection in autocommit that is made as the engine's pool makes its own, and counts
    there no longer once it is open."""
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        connection.detach()
        # Autocommit follows the session's default, and a claim must see what was committed
        # meanwhile. SET only where it is needed: a pooler may not keep it.
        level = connection.scalar(
            sa.text("SELECT current_setting('default_transaction_isolation')")
        )
        if level != "read committed":
            connection.execute(
                sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED")
            )
    except BaseException:
        connection.close()
        raise
    return connection


class Line:
    """A connection of its own that is made when it is asked for, and again after it was lost.

    :param engine: where to connect.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = connect(self._engine)
        return self._connection

    def close(self) -> None:
        """Close the connection, if there is one, and even if it is broken."""
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


def renew(connection: t.Any, record: t.Any, proxy: t.Any) -> None:
    """When the pool hands out a connection that carries the name of a worker that has gone: let
    it connect anew."""
    gone = record.info.get("beanqueue")
    if gone is not None and gone.is_set():
        raise sa.exc.DisconnectionError


@contextlib.contextmanager
def named(engines: t.Iterable[Engine], worker_id: uuid.UUID) -> t.Iterator[None]:
    """Let all connections that the engines hand out carry the worker's name, so that another
    worker can end them when this one is frozen; and no longer, once it has gone."""
    name = application_name(worker_id)
    gone = threading.Event()

    def do_connect(
        dialect: t.Any, record: t.Any, args: list[t.Any], kwargs: dict[str, t.Any]
    ) -> t.Any:
        record.info["beanqueue"] = gone
        # Not changed in place: later connections may be made with the same ones.
        return dialect.connect(*args, **{**kwargs, "application_name": name})

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

    engines = [engine for engine in engines if engine.dialect.name == "postgresql"]
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
