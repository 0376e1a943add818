"""LISTEN on a connection of its own, with psycopg2 or psycopg 3."""

from __future__ import annotations

import typing as t

from sqlalchemy.engine import Engine

from .queries import notify_name


class Listener:
    """A connection in autocommit that LISTENs, outside the pool and outside any transaction: an
    open one would keep vacuum from its work.

    :param engine: where to connect.
    :param channels: the queue's channels.
    """

    def __init__(self, engine: Engine, channels: t.Iterable[str]) -> None:
        connection = engine.raw_connection()
        connection.detach()
        self._connection: t.Any = connection.dbapi_connection
        try:
            self._connection.rollback()
            self._connection.autocommit = True
            with self._connection.cursor() as cursor:
                for channel in channels:
                    name = notify_name(channel).replace('"', '""')
                    cursor.execute(f'LISTEN "{name}"')
        except BaseException:
            self._connection.close()
            raise
        self._drain = self._drain_psycopg if engine.driver == "psycopg" else self._drain_psycopg2

    def fileno(self) -> int:
        """For a selector: readable when notifications have come, or the connection has gone."""
        return t.cast(int, self._connection.fileno())

    def drain(self) -> bool:
        """Take what has come, and tell whether it was anything.

        :raises Exception: the driver's own, if the connection is lost.
        """
        return self._drain()

    def _drain_psycopg2(self) -> bool:
        self._connection.poll()
        if self._connection.closed:
            raise ConnectionError("The LISTEN connection is closed.")
        notified = bool(self._connection.notifies)
        self._connection.notifies.clear()
        return notified

    def _drain_psycopg(self) -> bool:
        connection = self._connection.pgconn
        connection.consume_input()
        notified = False
        while connection.notifies():
            notified = True
        return notified

    def close(self) -> None:
        self._connection.close()
