"""LISTEN on a connection of its own, with psycopg2 or psycopg 3."""

from __future__ import annotations

import concurrent.futures
import contextlib
import selectors
import threading
import typing as t
import uuid

from sqlalchemy.engine import Engine

from .. import clock as time
from ..exceptions import PoolerError
from ..log import log
from .connection import is_pooled, named, open_beside
from .database import reason
from .notify import notify_name

#: Seconds between two attempts to listen again: after the first that fails, and at most.
RETRY_AFTER = 1.0
RETRY_WITHIN = 30.0
#: Seconds within which a connection that is lost counts as an attempt that has failed.
LASTS = 0.1
#: Seconds that the first attempt is waited for, so that a worker can say whether it listens.
FIRST_ATTEMPT = 2.0
#: Seconds that connecting may take in a process that must have no threads.
SHORT = 2
#: Seconds that the listener waits for what it has told itself: less, so that it can say why not.
ECHO_WITHIN = 1.0


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


def beside(make: t.Callable[[], t.Any]) -> concurrent.futures.Future[t.Any]:
    """Make something in a thread of its own, for which nobody waits at the end of the process."""
    future: concurrent.futures.Future[t.Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="beanqueue-listen", daemon=True).start()
    return future


def close_made(future: concurrent.futures.Future[t.Any]) -> None:
    """Close the connection that nobody waits for any more, if there is one."""
    with contextlib.suppress(BaseException):
        future.result().close()


def notifications(connection: t.Any) -> list[str]:
    """Take the notifications that have come; return their names.

    :param connection: the driver's.
    """
    names = []
    if hasattr(connection, "pgconn"):  # psycopg 3
        connection.pgconn.consume_input()
        while (notified := connection.pgconn.notifies()) is not None:
            names.append(notified.relname.decode())
    else:
        connection.poll()
        names += [notified.channel for notified in connection.notifies]
        connection.notifies.clear()
    return names


def hears(connection: t.Any, teller: Engine) -> bool:
    """Whether what is told in the database that an engine leads to is heard on a connection."""
    name = f"bq_{uuid.uuid4().hex}"
    with connection.cursor() as cursor:
        cursor.execute(f'LISTEN "{name}"')
    told = open_beside(teller)
    told.detach()
    with contextlib.closing(told), told.cursor() as cursor:
        cursor.execute(f'NOTIFY "{name}"')
        told.commit()
    until = time.monotonic() + ECHO_WITHIN
    heard = False
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        while not heard and (left := until - time.monotonic()) > 0.0:
            selector.select(left)
            heard = name in notifications(connection)
    with connection.cursor() as cursor:
        cursor.execute("UNLISTEN *")
    return heard


class Listener:
    """A connection in autocommit that LISTENs, outside the pool and outside any transaction: an
    open one would keep vacuum from its work.

    :param engine: where to connect.
    :param channels: the queue's channels.
    :param name: what the database calls the connection, if the engine does not say.
    :param timeout: seconds within which it is to find out that the network is gone; with ``name``.
    :param teller: the app's engine, if it connects elsewhere. What is told there must be heard
        here; a pooler may be in between.
    :param ring: called from another thread when :meth:`listen` is to be called, for it connects
        there. Without it, it does so itself: a process that forks must have no threads.
    """

    def __init__(
        self,
        engine: Engine,
        channels: t.Iterable[str],
        *,
        name: str | None = None,
        timeout: float = 0.0,
        teller: Engine | None = None,
        ring: t.Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._names = [notify_name(channel) for channel in channels]
        self._name = name
        self._timeout = timeout
        self._teller = teller
        self._ring = ring
        self._connection: t.Any = None
        #: What another thread is at.
        self._attempt: concurrent.futures.Future[t.Any] | None = None
        self._first = True
        #: Since when it listens, or did so last.
        self._since: float | None = None
        self._failures = 0
        #: Why it does not listen, by the last that was logged of it.
        self._said = ""
        self._next_try = 0.0

    @property
    def listens(self) -> bool:
        return self._connection is not None

    @property
    def next_try(self) -> float:
        if self._attempt is not None:
            return 0.0 if self._attempt.done() else float("inf")
        return self._next_try

    def listen(self) -> bool:
        """Connect and LISTEN, unless that failed a moment ago; tell whether it listens anew."""
        if self.listens or time.monotonic() < self.next_try:
            return False
        try:
            if self._ring is None:
                self._connection = self._connect()
            elif (connection := self._connect_beside(self._ring)) is None:
                return False
            else:
                self._connection = connection
        except Exception as error:
            if self._said != "fails":
                log.warning("LISTEN fails, polling meanwhile: %s", reason(error))
            self._said = "fails"
            self._fail(hopeless=isinstance(error, PoolerError))
            return False
        if self._said:
            log.info("The worker LISTENs%s", "" if self._since is None else " again")
        self._since = time.monotonic()
        self._said = ""
        return True

    def _connect_beside(self, ring: t.Callable[[], None]) -> t.Any:
        """The connection that another thread has made; None while it is at it. Where an address
        accepts and is silent, that takes as long as the driver waits."""
        if self._attempt is None:
            self._attempt = beside(self._connect)
            self._attempt.add_done_callback(lambda _: ring())
            if self._first:
                self._first = False
                concurrent.futures.wait([self._attempt], FIRST_ATTEMPT)
                self._said = "" if self._attempt.done() else "polls"
        if not self._attempt.done():
            return None
        attempt, self._attempt = self._attempt, None
        return attempt.result()

    def _fail(self, *, hopeless: bool = False) -> None:
        """Try again later."""
        pause = min(RETRY_AFTER * 2 ** min(self._failures, 10), RETRY_WITHIN)
        self._failures += 1
        self._next_try = float("inf") if hopeless else time.monotonic() + pause

    def _connect(self) -> t.Any:
        """Make a connection that LISTENs."""
        own = None
        if self._name:
            engines = [self._engine, self._teller or self._engine]
            own = named(engines, self._name, self._timeout, connect_timeout=SHORT)
        with own or contextlib.nullcontext():
            borrowed = open_beside(self._engine)
            connection = borrowed.dbapi_connection
            borrowed.detach()
            try:
                connection.rollback()
                connection.autocommit = True
                self._check(connection)
                with connection.cursor() as cursor:
                    cursor.execute("SET idle_session_timeout = 0")  # silence is no reason to end
                    for name in self._names:
                        quoted = name.replace('"', '""')
                        cursor.execute(f'LISTEN "{quoted}"')
            except BaseException:
                connection.close()
                raise
        return connection

    def _check(self, connection: t.Any) -> None:
        """See whether what the app's database tells will come through.

        :raises PoolerError: if a pooler is in between.
        :raises RuntimeError: if it is not heard for another reason.
        """
        if self._teller is not None:
            if not hears(connection, self._teller):
                raise RuntimeError(
                    "at BQ_LISTEN_DATABASE_URL, nothing is heard of what the app's database tells."
                    " It must lead to the same database of the same server, and through no pooler"
                    " unless that keeps a backend for each session"
                )
            return
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            [pid] = cursor.fetchone()
        if is_pooled(connection, pid):
            raise PoolerError(
                "a pooler stands before the database. Set BQ_LISTEN_DATABASE_URL to the database's"
                " own address (or to the pooler's, if it keeps a backend for each session), or"
                " BQ_LISTEN=false to poll without this message."
            )

    def fileno(self) -> int:
        """For a selector: readable when notifications have come, or the connection has gone."""
        return -1 if self._connection is None else t.cast(int, self._connection.fileno())

    def drain(self) -> bool:
        """Take the notifications that have come, and tell whether there were any."""
        try:
            return bool(notifications(self._connection))
        except Exception as error:
            log.warning("The LISTEN connection is lost: %s", reason(error))
            self.close()
            self._lose()
            return False

    def _lose(self) -> None:
        """Listen again at once, unless the connection has not lasted."""
        self._said = "lost"
        if self._since is not None and time.monotonic() - self._since >= LASTS:
            self._failures = 0
            self._next_try = 0.0
        else:
            self._fail()

    def close(self) -> None:
        if self._attempt is not None:
            self._attempt.add_done_callback(close_made)
            self._attempt = None
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None
