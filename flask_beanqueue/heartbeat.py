"""The heartbeat: tells that a worker lives, and finds out who does not."""

from __future__ import annotations

import threading
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from . import clock as time
from .config import Config
from .connection import Line
from .errors import reason
from .log import log
from .queries import Queries, Silent


class Heartbeat(threading.Thread):
    """A thread with a connection of its own, so that nothing that tasks do can hold it up.

    :param on_death: called when the worker finds itself declared dead, unless it leaves.
    :param on_loss: called when the thread ends for any other reason, unless it is to end.
    :param on_burial: called when it has declared others dead.
    """

    def __init__(
        self,
        engine: Engine,
        queries: Queries,
        config: Config,
        worker_id: uuid.UUID,
        *,
        on_death: t.Callable[[], None],
        on_loss: t.Callable[[], None],
        on_burial: t.Callable[[], None],
    ) -> None:
        super().__init__(name="beanqueue-heartbeat", daemon=True)
        self.line = Line(engine)
        self._queries = queries
        self._config = config
        self._worker_id = worker_id
        self._on_death = on_death
        self._on_loss = on_loss
        self._on_burial = on_burial
        self._stopped = threading.Event()
        self._last_beat = time.monotonic()
        self._modest_until = 0.0
        #: Who was silent when it looked last, and since when by its own clock. The database's may
        #: be set forward or back, which is nobody's death.
        self._silent: dict[Silent, float] = {}
        self._next_termination = 0.0
        #: Why backends of dead workers go on, by the last that was logged of it.
        self._said = ""

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=5)

    def run(self) -> None:
        try:
            self._keep_beating()
        except BaseException:  # of whatever kind: the others will take it for dead
            if not self._stopped.is_set():
                self._on_loss()
            raise
        finally:
            self.line.close()

    def _keep_beating(self) -> None:
        failing = False
        while True:
            try:
                if not self.beat():
                    # Or a beat that hung comes after the goodbye, and finds nobody.
                    if not self._stopped.is_set():
                        self._on_death()
                    break
                failing = False
            except Exception as error:  # whatever it is: without heartbeats the worker is dead
                if not failing:
                    log.warning("The heartbeat fails, and goes on trying: %s", reason(error))
                failing = True
                self.line.close()
            pause = min(1.0, self._config.WORKER_HEARTBEAT_PERIOD) if failing else None
            if self._stopped.wait(pause or self._config.WORKER_HEARTBEAT_PERIOD):
                break

    def beat(self) -> bool:
        """Beat once, and bury who is silent; False if this worker has been buried itself."""
        connection = self.line.connection
        timeout = self._config.WORKER_HEARTBEAT_TIMEOUT
        patience = timeout / 2
        now = time.monotonic()
        if now - self._last_beat > self._config.WORKER_HEARTBEAT_PERIOD + timeout / 4:
            # The database was out of reach, perhaps for all workers: let the others beat first.
            self._silent.clear()
            self._modest_until = now + patience
        alive, silent = self._queries.beat(connection, self._worker_id, patience)
        if not alive:
            return False
        self._last_beat = now
        since = max(now, self._modest_until)
        self._silent = {each: self._silent.get(each, since) for each in silent}
        dead = [each for each, at in self._silent.items() if now - at >= patience]
        buried = self._bury(connection, dead) if dead else set()
        try:
            if buried or now >= self._next_termination:
                self._next_termination = now + timeout
                start = time.monotonic()
                self._terminate(connection)
                # Backends may take their time to end; the database is not out of reach meanwhile.
                self._last_beat += time.monotonic() - start
        finally:  # whatever becomes of their backends
            if buried:
                self._on_burial()
            self._silent = {each: at for each, at in self._silent.items() if each.id not in buried}
        return True

    def _bury(self, connection: Connection, dead: list[Silent]) -> set[uuid.UUID]:
        """Declare workers dead, unless another one does so; return the ids of those that it was."""
        buried = self._queries.bury_silent(connection, dead)
        for each in dead:
            if each.id in buried:
                log.warning(
                    "Worker %s (%s) sent no heartbeat for %g s",
                    each.name,
                    each.id,
                    self._config.WORKER_HEARTBEAT_TIMEOUT,
                )
        return buried

    def _terminate(self, connection: Connection) -> None:
        """End the backends of dead workers, and with them their locks."""
        try:
            others = self._queries.terminate(connection)
            why = f"they belong to {', '.join(sorted(others))}" if others else ""
        except sa.exc.ProgrammingError as error:  # the right to do so may have been revoked
            why = reason(error)
        if why and why != self._said:
            log.warning(
                "The backends of dead workers cannot be ended: %s. Let all workers of the queue log"
                " in as one role that may execute pg_terminate_backend.",
                why,
            )
        self._said = why
