"""The wire between a client and PostgreSQL, on which round trips can be counted."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator

import sqlalchemy as sa


@dataclasses.dataclass
class Counts:
    """What the server has answered meanwhile."""

    #: ReadyForQuery: the client could go on.
    round_trips: int = 0
    #: CommandComplete: a statement was executed, ``BEGIN`` and ``COMMIT`` among them.
    statements: int = 0


class Wire:
    """Passes on what a client and PostgreSQL say to each other, and counts the answers."""

    def __init__(self, url: str) -> None:
        self._server = sa.make_url(url)
        self._folder = tempfile.TemporaryDirectory(prefix="wire-", dir="/tmp")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self._folder.name}/.s.PGSQL.5432")
        self._listener.listen()
        self._sockets = [self._listener]
        self._counts = Counts()
        self._counting = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """The database as it is reached over the wire."""
        url = self._server.set(host=None, port=None).update_query_dict({"host": self._folder.name})
        return url.render_as_string(hide_password=False)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count from now on. What comes after is not counted."""
        counts = self._counts = Counts()
        yield counts
        self._counts = Counts()

    def close(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._folder.cleanup()

    def _connect(self) -> socket.socket:
        host, port = self._server.host or self._server.query.get("host"), self._server.port or 5432
        assert isinstance(host, str)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = self._connect()
                self._sockets += [client, server]
                for pump, *ends in (self._ask, client, server), (self._answer, server, client):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        rest = b""
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                rest = self._count(rest + data)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def _count(self, data: bytes) -> bytes:
        """Count the messages that are whole; return the beginning of the next one."""
        start = 0
        while len(data) >= start + 5:
            kind, length = struct.unpack_from("!cI", data, start)
            if len(data) < start + 1 + length:
                break
            start += 1 + length
            with self._counting:
                self._counts.round_trips += kind == b"Z"
                self._counts.statements += kind == b"C"
        return data[start:]
