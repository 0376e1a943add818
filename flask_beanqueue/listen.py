"""LISTEN on a connection of its own, with psycopg2 or psycopg 3."""

from __future__ import annotations

import contextlib
import hashlib
import time
import typing as t

from sqlalchemy.engine import Connection, Engine

from .connection import PoolerError, is_pooled, named, open_beside
from .errors import reason
from .log import log

#: Seconds between two attempts to listen again.
RETRY_AFTER = 1.0


def notify_name(channel: str) -> str:
    """The name to NOTIFY and LISTEN for a channel: itself, or a digest where it is too long.

    PostgreSQL takes names of at most 63 bytes.
    """
    if len(channel.encode("utf-8", "surrogatepass")) < 64:
        return channel
    return "bq_" + hashlib.sha256(channel.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def notifies(connection: Connection) -> bool:
    """Whether tasks that are written on this connection NOTIFY (``BQ_NOTIFY``)."""
    return connection.get_execution_options().get("bq_notify", True) is not False


class Source(t.Protocol):
    """What tells a process of news: a connection that LISTENs, or its parent, which has one."""

    @property
    def listens(self) -> bool:
        """Whether all news will come; if not, one must poll."""

    @property
    def next_try(self) -> float:
        """When :meth:`listen` may help again, by the monotonic clock."""

    def listen(self) -> bool:
        """Try to listen, if that is not so, and tell whether it listens anew."""

    def fileno(self) -> int:
        """For a selector: readable when there is something to drain; -1 if there is none."""

    def drain(self) -> bool:
        """Take the news that has come, and tell whether there were any."""

    def close(self) -> None: ...


class Listener:
    """A connection in autocommit that LISTENs, outside the pool and outside any transaction: an
    open one would keep vacuum from its work.

    :param engine: where to connect.
    :param channels: the queue's channels.
    :param name: what the database calls the connection, if the engine does not say.
    :param timeout: seconds within which it is to find out that the network is gone; with ``name``.
    :param trusted: whether news is known to come through, even if a pooler is in between.
    """

    def __init__(
        self,
        engine: Engine,
        channels: t.Iterable[str],
        *,
        name: str | None = None,
        timeout: float = 0.0,
        trusted: bool = False,
    ) -> None:
        self._engine = engine
        self._names = [notify_name(channel) for channel in channels]
        self._name = name
        self._timeout = timeout
        self._trusted = trusted
        self._connection: t.Any = None
        self._failing = False
        self.next_try = 0.0

    @property
    def listens(self) -> bool:
        return self._connection is not None

    def listen(self) -> bool:
        """Connect and LISTEN, unless that failed a moment ago; tell whether it listens anew."""
        if self.listens or time.monotonic() < self.next_try:
            return False
        try:
            self._connect()
            if self._failing:
                log.info("The worker LISTENs again")
            self._failing = False
            return True
        except Exception as error:
            if not self._failing:
                log.warning("LISTEN fails, polling meanwhile: %s", reason(error))
            self._failing = True
            self.close()
            hopeless = isinstance(error, PoolerError)
            self.next_try = float("inf") if hopeless else time.monotonic() + RETRY_AFTER
            return False

    def _connect(self) -> None:
        own = named([self._engine], self._name, self._timeout) if self._name else None
        with own or contextlib.nullcontext():
            borrowed = open_beside(self._engine)
        self._connection = borrowed.dbapi_connection
        borrowed.detach()
        self._connection.rollback()
        self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            if not self._trusted:
                cursor.execute("SELECT pg_backend_pid()")
                if is_pooled(self._connection, cursor.fetchone()[0]):
                    raise PoolerError(
                        "a pooler stands before the database. Set BQ_LISTEN_DATABASE_URL to the"
                        " database's own address (or to the pooler's, if it keeps a backend for"
                        " each session), or BQ_LISTEN=false to poll without this message."
                    )
            for name in self._names:
                quoted = name.replace('"', '""')
                cursor.execute(f'LISTEN "{quoted}"')

    def fileno(self) -> int:
        """For a selector: readable when notifications have come, or the connection has gone."""
        return -1 if self._connection is None else t.cast(int, self._connection.fileno())

    def drain(self) -> bool:
        """Take the notifications that have come, and tell whether there were any."""
        try:
            if self._engine.driver == "psycopg":
                self._connection.pgconn.consume_input()
                notified = 0
                while self._connection.pgconn.notifies():
                    notified += 1
            else:
                self._connection.poll()
                notified = len(self._connection.notifies)
                self._connection.notifies.clear()
            return notified > 0
        except Exception as error:
            log.warning("The LISTEN connection is lost: %s", reason(error))
            self.close()
            return False

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None
