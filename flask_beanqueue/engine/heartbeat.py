"""The heartbeat: tells that a worker lives, and finds out who does not."""

from __future__ import annotations

import threading
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from .. import clock as time
from ..config import Config
from ..log import log
from ..models.make import Models
from ..sql import Sql
from .connection import OwnConnection, application_name
from .database import reason

ADD_WORKER = Sql("""
    INSERT INTO {workers} (id, state, name, channels, last_heartbeat, created_at)
    VALUES (:id, 'RUNNING', :name, CAST(:channels AS text[]), now(), now())
""")

# The heartbeat, and with it the search for those who have none: one statement in autocommit, so
# that a worker that freezes in it holds no lock afterwards. A heartbeat that is yet to come is as
# good as none: the database's clock has been set back.
BEAT = Sql("""
    WITH beat AS (
        UPDATE {workers} SET last_heartbeat = now()
        WHERE id = :id AND state = 'RUNNING' RETURNING id
    ), patience AS (
        SELECT CAST(:patience AS float8) * interval '1 second' AS patience
    )
    SELECT true AS own, CAST(id AS text) AS id, '' AS name, '' AS beat FROM beat
    UNION ALL
    SELECT false, CAST(id AS text), name, CAST(last_heartbeat AS text) FROM {workers}, patience
    WHERE state = 'RUNNING' AND id <> :id
      AND last_heartbeat NOT BETWEEN now() - patience AND now() + patience
""")

# For those who have not beaten since. SKIP LOCKED: another worker may be about it.
DECLARE_SILENT_DEAD = Sql("""
    UPDATE {workers} SET state = 'NO_HEARTBEAT'
    WHERE id IN (
        SELECT w.id FROM {workers} AS w
        JOIN unnest(CAST(:ids AS uuid[]), CAST(:beats AS text[])) AS silent (id, beat)
            ON w.id = silent.id AND CAST(w.last_heartbeat AS text) = silent.beat
        WHERE w.state = 'RUNNING'
        FOR NO KEY UPDATE OF w SKIP LOCKED)
    RETURNING CAST(id AS text)
""")

# For those that have not beaten for so long, by the database's clock alone.
DECLARE_OVERDUE_DEAD = Sql("""
    UPDATE {workers} SET state = 'NO_HEARTBEAT'
    WHERE state = 'RUNNING'
      AND last_heartbeat < now() - CAST(:timeout AS float8) * interval '1 second'
""")

# For those of which it is known.
DECLARE_DEAD = Sql("""
    UPDATE {workers} SET state = 'NO_HEARTBEAT'
    WHERE id = ANY (CAST(:ids AS uuid[])) AND state = 'RUNNING'
""")

RETIRE = Sql("""
    UPDATE {workers} SET state = 'SHUTDOWN' WHERE id = :id AND state = 'RUNNING'
""")

# A frozen worker still holds locks on what it flushed; and so may one that has shut down without
# getting at a locked row, if its process then hangs. The process has given the name to its
# connections; PostgreSQL allows ending backends of the role that one has, if that is the one that
# they logged in as. So this drops a role that was SET, until the statement's end. The view has the
# backends of all databases, and a copy of this one holds rows of the same workers.
TERMINATE = Sql("""
    WITH gone AS MATERIALIZED (
        SELECT backend.pid, backend.usename, w.id, w.state
        FROM pg_stat_activity AS backend
        JOIN {workers} AS w ON backend.application_name = :prefix || CAST(w.id AS text)
        WHERE w.state <> 'RUNNING' AND backend.datname = current_database()
    )
    SELECT usename, CASE
        WHEN usename = session_user AND set_config('role', 'none', true) IS NOT NULL
        THEN pg_terminate_backend(pid, 1000) END AS ended
    FROM gone
    WHERE state = 'NO_HEARTBEAT' OR EXISTS (
        SELECT FROM {tasks} AS t
        WHERE t.worker_id = gone.id AND t.state = 'PROCESSING' AND NOT t.parked)
""")


class Silent(t.NamedTuple):
    """A worker that has not beaten for a while."""

    id: uuid.UUID
    name: str
    #: Its last heartbeat, as PostgreSQL writes the time.
    beat: str


def add_worker(
    connection: Connection,
    models: Models,
    worker_id: uuid.UUID,
    name: str,
    channels: t.Sequence[str],
) -> None:
    connection.execute(
        ADD_WORKER.on(models), {"id": worker_id, "name": name, "channels": list(channels)}
    )


def beat(
    connection: Connection, models: Models, worker_id: uuid.UUID, patience: float
) -> tuple[bool, list[Silent]]:
    """Tell that a worker lives, and ask which others did not tell so for ``patience`` seconds.

    :return: whether the worker itself still counts as alive; the others.
    """
    rows = connection.execute(BEAT.on(models), {"id": worker_id, "patience": patience}).all()
    silent = [Silent(uuid.UUID(row.id), row.name, row.beat) for row in rows if not row.own]
    return len(silent) < len(rows), silent


def declare_silent_dead(
    connection: Connection, models: Models, silent: t.Sequence[Silent]
) -> set[uuid.UUID]:
    """Declare workers dead that have not beaten since, and return their ids."""
    wanted = {"ids": [each.id for each in silent], "beats": [each.beat for each in silent]}
    ids = connection.scalars(DECLARE_SILENT_DEAD.on(models), wanted)
    return {uuid.UUID(worker_id) for worker_id in ids}


def declare_overdue_dead(connection: Connection, models: Models, timeout: float) -> None:
    """Declare workers dead that have not beaten for ``timeout`` seconds."""
    connection.execute(DECLARE_OVERDUE_DEAD.on(models), {"timeout": timeout})


def declare_dead(connection: Connection, models: Models, worker_ids: t.Iterable[uuid.UUID]) -> None:
    """Declare workers dead whose processes have ended, unless they left in order."""
    connection.execute(DECLARE_DEAD.on(models), {"ids": list(worker_ids)})


def retire(connection: Connection, models: Models, worker_id: uuid.UUID) -> None:
    """Mark a worker as shut down."""
    connection.execute(RETIRE.on(models), {"id": worker_id})


def terminate(connection: Connection, models: Models) -> set[str]:
    """End the backends of workers that are dead, or gone and have left tasks behind, and with them
    their locks; return the other roles to which some of them belong, which go on."""
    rows = connection.execute(TERMINATE.on(models), {"prefix": application_name("")})
    return {row.usename for row in rows if row.ended is None}


class Heartbeat(threading.Thread):
    """A thread with a connection of its own, so that nothing that tasks do can hold it up.

    :param on_death: called when the worker finds itself declared dead, unless it leaves.
    :param on_loss: called when the thread ends for any other reason, unless it is to end.
    :param on_others_dead: called when it has declared others dead.
    """

    def __init__(
        self,
        engine: Engine,
        models: Models,
        config: Config,
        worker_id: uuid.UUID,
        *,
        on_death: t.Callable[[], None],
        on_loss: t.Callable[[], None],
        on_others_dead: t.Callable[[], None],
    ) -> None:
        super().__init__(name="beanqueue-heartbeat", daemon=True)
        self.own = OwnConnection(engine)
        self._models = models
        self._config = config
        self._worker_id = worker_id
        self._on_death = on_death
        self._on_loss = on_loss
        self._on_others_dead = on_others_dead
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
            self.own.close()

    def _keep_beating(self) -> None:
        failing = False
        while True:
            try:
                if not self.beat():
                    # A beat that hung may come after the goodbye, and finds nobody.
                    if not self._stopped.is_set():
                        self._on_death()
                    break
                failing = False
            except Exception as error:  # whatever it is: without heartbeats the worker is dead
                if not failing:
                    log.warning("The heartbeat fails, and goes on trying: %s", reason(error))
                failing = True
                self.own.close()
            pause = min(1.0, self._config.WORKER_HEARTBEAT_PERIOD) if failing else None
            if self._stopped.wait(pause or self._config.WORKER_HEARTBEAT_PERIOD):
                break

    def beat(self) -> bool:
        """Beat once, and declare dead those that are silent for too long.

        :return: whether this worker itself still counts as alive.
        """
        connection = self.own.connection
        timeout = self._config.WORKER_HEARTBEAT_TIMEOUT
        patience = timeout / 2
        now = time.monotonic()
        if now - self._last_beat > self._config.WORKER_HEARTBEAT_PERIOD + timeout / 4:
            # The database was out of reach, perhaps for all workers: let the others beat first.
            self._silent.clear()
            self._modest_until = now + patience
        alive, silent = beat(connection, self._models, self._worker_id, patience)
        if not alive:
            return False
        self._last_beat = now
        since = max(now, self._modest_until)
        self._silent = {each: self._silent.get(each, since) for each in silent}
        dead = [each for each, at in self._silent.items() if now - at >= patience]
        found = self._declare_dead(connection, dead) if dead else set()
        try:
            if found or now >= self._next_termination:
                self._next_termination = now + timeout
                start = time.monotonic()
                self._terminate(connection)
                # Backends may take their time to end; the database is not out of reach meanwhile.
                self._last_beat += time.monotonic() - start
        finally:  # whatever becomes of their backends
            if found:
                self._on_others_dead()
            self._silent = {each: at for each, at in self._silent.items() if each.id not in found}
        return True

    def _declare_dead(self, connection: Connection, dead: list[Silent]) -> set[uuid.UUID]:
        """Declare workers dead, unless another one does so; return the ids of those that it was."""
        found = declare_silent_dead(connection, self._models, dead)
        for each in dead:
            if each.id in found:
                log.warning(
                    "Worker %s (%s) sent no heartbeat for %g s",
                    each.name,
                    each.id,
                    self._config.WORKER_HEARTBEAT_TIMEOUT,
                )
        return found

    def _terminate(self, connection: Connection) -> None:
        """End the backends of dead workers, and with them their locks."""
        try:
            others = terminate(connection, self._models)
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
