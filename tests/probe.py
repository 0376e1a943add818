"""How a test hears what goes on in other processes, and holds them at chosen points.

A processor calls :func:`tell` to say that it has come somewhere, or :func:`pause` to say so and
wait there until the test opens the gate. Both use connections of their own, so that nothing of the
queue's is touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
from sqlalchemy.orm import object_session

from .triggers import trigger

TIMEOUT = 60.0


def connect(url: str | None = None) -> Any:
    # An app that goes through a pooler still has to reach the gates, which are locks of a session.
    url = url or os.environ.get("PROBE_DATABASE_URL") or os.environ["DATABASE_URL"]
    connection = psycopg2.connect(re.sub(r"^postgresql\+\w+:", "postgresql:", url))
    connection.autocommit = True
    return connection


def query(url: str, sql: str, *parameters: Any) -> list[Any]:
    with contextlib.closing(connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(sql, parameters or None)
        return cursor.fetchall() if cursor.description else []


def glance(left: float) -> None:
    """Sleep for a moment, where nobody tells when to look again."""
    time.sleep(min(left, 0.001))


def wait_until(
    condition: Callable[[], Any],
    timeout: float = TIMEOUT,
    sleep: Callable[[float], None] = glance,
) -> None:
    """Wait until a condition holds.

    :param sleep: returns when the condition may hold, after so many seconds at the latest.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        sleep(left)


def tell(message: str) -> None:
    """Say where a process has come."""
    with contextlib.closing(connect()) as connection:
        connection.cursor().execute("SELECT pg_notify('probe', %s)", (message,))


def pause(message: str) -> None:
    """Say where a process has come, and wait there while the test holds the gate of that name."""
    with contextlib.closing(connect()) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT pg_notify('probe', %s)", (message,))
        cursor.execute("SELECT pg_advisory_lock_shared(hashtext(%s))", (message,))


class Probe:
    """Hears what processes tell, and the states that tasks get."""

    def __init__(self, url: str, *channels: str) -> None:
        self.connection = connect(url)
        self.heard: list[str] = []
        for channel in channels or ("probe",):
            self.connection.cursor().execute(f'LISTEN "{channel}"')

    def close(self) -> None:
        self.connection.close()

    def listen_states(self, table: str = "bq_tasks", name: str = "func_name") -> None:
        """Hear ``func_name STATE`` whenever a committed change gives a task a state."""
        self.connection.cursor().execute(
            trigger(
                "tell_state_of_" + re.sub(r"\W+", "_", table),
                f"AFTER UPDATE OF state ON {table}",
                f"PERFORM pg_notify('probe', NEW.{name} || ' ' || NEW.state)",
            )
        )

    def poll(self) -> list[str]:
        """What has been heard by now, without waiting, and not been taken yet."""
        self.connection.poll()
        self.heard += [notify.payload for notify in self.connection.notifies]
        self.connection.notifies.clear()
        return self.heard

    def wait(self, message: str, timeout: float = TIMEOUT) -> None:
        """Wait until something has been heard, and take it."""
        self.wait_until(lambda: message in self.heard, timeout, message)
        self.heard.remove(message)

    def wait_until(
        self, condition: Callable[[], Any], timeout: float = TIMEOUT, what: str = "the condition"
    ) -> None:
        """Wait until a condition holds; it is tried whenever something has been heard."""
        self.poll()
        try:
            wait_until(condition, timeout, self._listen)
        except TimeoutError:
            raise TimeoutError(f"{what} did not come; heard: {self.heard}") from None

    def _listen(self, left: float) -> None:
        select.select([self.connection], [], [], left)
        self.poll()

    @contextlib.contextmanager
    def gate(self, message: str) -> Iterator[Callable[[], None]]:
        """Hold the gate that :func:`pause` waits at; the value opens it."""
        with contextlib.closing(connect(self.connection.dsn)) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT pg_advisory_lock(hashtext(%s))", (message,))
            yield lambda: cursor.execute("SELECT pg_advisory_unlock(hashtext(%s))", (message,))

    @contextlib.contextmanager
    def paused(
        self, message: str, processor: Any, **arguments: Any
    ) -> Iterator[Callable[[], None]]:
        """Make a task, and hold it at a gate; the value opens that, and the end does, too."""
        with self.gate(message) as open_gate:
            session = object_session(processor.enqueue(**arguments))
            assert session is not None
            session.commit()
            self.wait(message)
            yield open_gate
