"""All SQL of the queue, side by side, each statement with the reason for its shape."""

from __future__ import annotations

import json
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection

from .claim import Claim
from .connection import SetupError
from .listen import notifies, notify_name
from .marks import EARLIEST, LATEST, Front, Level, Look
from .models import Models

# The NOTIFY of a flush, as the driver takes it: to compile it, or to find what was compiled, takes
# SQLAlchemy as long as the server takes for the whole.
NOTIFY = "SELECT pg_notify(%(name)s, '')"


class Silent(t.NamedTuple):
    """A worker that has not beaten for a while."""

    id: uuid.UUID
    name: str
    #: Its last heartbeat, as PostgreSQL writes the time.
    beat: str


class Queries:
    """The statements for one set of models."""

    def __init__(self, models: Models) -> None:
        self.models = models
        # ONLY: rows are found by ctid, which tells them apart within one table. So what lies in
        # tables that inherit from this one, an archive perhaps, is not the queue's.
        self._names = {
            "tasks": f"ONLY {quote(models.task.__table__)}",
            "task_table": quote(models.task.__table__),
            "workers": quote(models.worker.__table__),
            "events": quote(models.event.__table__),
        }
        self._names["now"] = micros("now()")
        self._names["front_at"] = micros("front.scheduled_at")
        self._names["next_at"] = micros("next.scheduled_at")
        self._names["picked_at"] = micros("picked.scheduled_at")
        self._names["level_at"] = moment("level.at")
        # How long the statement may wait for a lock, as lock_timeout says it; NULL: as the session
        # has it. Beside it, that the check of an event's foreign key is planned each time: its plan
        # would be kept while the tasks grow from ten to a million. Both hold for the statement's
        # own transaction, so no pooler is in their way, and they are part of the statement, so they
        # cost no round trip.
        self._names["patience"] = """patience AS MATERIALIZED (
            SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
                CASE WHEN CAST(:lock_timeout AS text) IS NOT NULL
                    THEN set_config('lock_timeout', :lock_timeout, true) END
        )"""
        has_parent = "parent_id" in models.task.__table__.c
        # What tells a claim from others, see Claim.token.
        self._names["token"] = "CAST(t.id AS text) || '/' || t.claims"

        # A claim is one statement in autocommit: one round trip, and no transaction that a frozen
        # worker could hold open. The inner part walks the levels in turn and stops at the limit;
        # LATERAL gives each level both ends of its range in the index, so that neither what was
        # claimed earlier (dead entries before the mark) nor what is scheduled for later is read.
        # NO KEY: rows that an open transaction refers to by foreign key are not skipped. The rows
        # are found again by ctid, which costs no index. Tasks that were in a crash are left out,
        # see claim_suspect. A row that was touched between the two parts comes back as nothing,
        # so zero rows do not prove an empty queue.
        claim = """
            UPDATE {tasks} SET state = 'PROCESSING', worker_id = :worker_id,
                claims = claims + 1, parked = false, started_at = now()
            WHERE ctid = ANY (ARRAY(SELECT picked.ctid {due})) RETURNING {claim}
        """
        due = """
            FROM unnest(
                CAST(:channels AS text[]), CAST(:priorities AS int[]),
                CAST(:ats AS bigint[]), CAST(:ids AS uuid[])
            ) AS level (channel, priority, at, id)
            CROSS JOIN LATERAL (
                SELECT t.ctid, t.scheduled_at, t.id FROM {tasks} AS t
                WHERE t.state = 'PENDING'
                  AND t.channel = level.channel AND t.priority = level.priority
                  AND (t.scheduled_at, t.id) > ({level_at}, level.id)
                  AND t.scheduled_at <= now() AND t.crashes < 1
                ORDER BY t.scheduled_at, t.id LIMIT :limit
                FOR NO KEY UPDATE SKIP LOCKED
            ) AS picked
            LIMIT :limit
        """
        self._names["due"] = due.format(**self._names)
        self._claim = self._returning_claims(claim, arguments=True)

        # What such a claim would take first, to step over what cannot be claimed.
        self._next = self._text("""
            SELECT level.channel, level.priority, {picked_at} AS at, CAST(picked.id AS text) AS id,
                {picked_at} - {now} AS due_in
            {due}
        """)

        # The arguments of a claim that is without. NULL if they are larger than any task's may be.
        self._arguments = self._text("""
            SELECT CASE WHEN octet_length(CAST(kwargs AS text)) <= :largest
                THEN CAST(kwargs AS text) END
            FROM {tasks} WHERE id = :id AND claims = :claims
        """)

        # The channels in which no task that was in a crash runs. OFFSET keeps them by themselves:
        # asked anew for each of the thousand tasks that a crash may leave, it would be asked a
        # thousand times a thousand rows.
        self._names["free"] = """(
            SELECT wanted.channel
            FROM unnest(CAST(:channels AS text[])) AS wanted (channel)
            WHERE NOT EXISTS (
                SELECT FROM {tasks} AS t
                WHERE t.state = 'PROCESSING' AND t.crashes > 0
                  AND t.channel = wanted.channel AND NOT t.parked)
            OFFSET 0
        ) AS free""".format(**self._names)
        suspects = """{tasks} AS t
            WHERE t.state = 'PENDING' AND t.crashes > 0
              AND t.channel = free.channel AND t.scheduled_at <= now()
        """
        self._names["suspects"] = suspects.format(**self._names)

        # A task that was in a crash is claimed and run alone. One worker at a time is so occupied
        # in a channel, however many tasks a crash left, so that the rest goes on meanwhile.
        suspect = """
            FROM {free} CROSS JOIN LATERAL (
                SELECT t.ctid, t.id FROM {suspects}
                ORDER BY t.scheduled_at, t.id LIMIT 1
                FOR NO KEY UPDATE SKIP LOCKED
            ) AS picked
            LIMIT 1
        """
        self._claim_suspect = self._returning_claims(
            claim.replace("{due}", suspect), arguments=True
        )

        # The look from the front: the first waiting row of each channel and priority, by hopping
        # through the index from one to the next (a loose index scan), and when the next task
        # falls due. It wades through the dead entries that the claims left, so it is not for
        # every turn.
        self._look = self._text("""
            SELECT front.channel, front.priority,
                {front_at} AS at, CAST(front.id AS text) AS id, {front_at} - {now} AS due_in,
                {next_at} - {now} AS next_due
            FROM unnest(CAST(:channels AS text[])) AS wanted (channel)
            CROSS JOIN LATERAL (
                WITH RECURSIVE front AS (
                    (SELECT channel, priority, scheduled_at, id FROM {tasks} AS t
                     WHERE state = 'PENDING' AND channel = wanted.channel
                     ORDER BY priority, scheduled_at, id LIMIT 1)
                    UNION ALL
                    SELECT later.* FROM front CROSS JOIN LATERAL (
                        SELECT channel, priority, scheduled_at, id FROM {tasks} AS t
                        WHERE state = 'PENDING' AND channel = wanted.channel
                          AND priority > front.priority
                        ORDER BY priority, scheduled_at, id LIMIT 1
                    ) AS later
                )
                SELECT * FROM front
            ) AS front
            LEFT JOIN LATERAL (
                SELECT scheduled_at FROM {tasks}
                WHERE state = 'PENDING' AND channel = front.channel AND priority = front.priority
                  AND scheduled_at > now()
                ORDER BY scheduled_at LIMIT 1
            ) AS next ON true
        """)

        self._suspects = self._text("""
            SELECT EXISTS (SELECT FROM {free} WHERE EXISTS (SELECT FROM {suspects}))
        """)

        # The fence of many tasks at once. The rows are found by the ctid that the claim returned:
        # by id, every version that a row has had since the last vacuum would be visited. The id
        # and claims prove that it is the row meant. The state is compared as an expression,
        # because a plain comparison lets the planner choose the index of PROCESSING rows, which
        # is as full of dead entries as the other. The arrays stand in subqueries, because the
        # planner, if it sees how many ctids there are, prefers to read a whole table of some
        # ten thousand rows.
        self._finish = self._text("""
            WITH {patience}
            UPDATE {tasks} AS t SET state = 'DONE', attempts = t.attempts + 1,
                result = COALESCE(CAST(done.result AS jsonb), t.result), error_message = NULL,
                unknown_since = NULL, finished_at = clock_timestamp()
            FROM unnest(
                (SELECT CAST(:ctids AS tid[])), (SELECT CAST(:ids AS uuid[])),
                (SELECT CAST(:claims AS int[])), (SELECT CAST(:results AS text[]))
            ) AS done (ctid, id, claims, result)
            CROSS JOIN patience
            WHERE t.ctid = done.ctid AND t.id = done.id AND t.claims = done.claims
              AND t.state || '' = 'PROCESSING'
            RETURNING CAST(t.id AS text), t.claims
        """)

        # The same for the one task whose transaction this is: planned in a third of the time.
        self._finish_one = self._text("""
            UPDATE {tasks} SET state = 'DONE', attempts = attempts + 1,
                result = COALESCE(CAST(:result AS jsonb), result), error_message = NULL,
                unknown_since = NULL, finished_at = clock_timestamp()
            WHERE ctid = CAST(:ctid AS tid) AND id = CAST(:id AS uuid) AND claims = :claims
              AND state || '' = 'PROCESSING'
        """)

        # Every other outcome, with its event and, where the task waits again, its NOTIFY. By id,
        # for these are few; and as JSON, for they have many parts. It is also the second chance of
        # a row that has moved since its claim.
        self._settle = self._text("""
            WITH {patience}, outcome AS MATERIALIZED (
                SELECT outcome.* FROM patience
                CROSS JOIN jsonb_to_recordset(CAST(:outcomes AS jsonb)) AS outcome (
                    id uuid, claims int, state text, result text, error_message text,
                    attempts int, crashes int, interruptions int,
                    parked bool, was_parked bool, unknown bool,
                    delay float8, scheduled_at timestamptz, channel text,
                    event_id uuid, event text, traceback text)
            ), settled AS (
                UPDATE {tasks} AS t SET state = outcome.state,
                    result = COALESCE(CAST(outcome.result AS jsonb), t.result),
                    error_message = CASE WHEN outcome.state = 'PENDING'
                        THEN COALESCE(outcome.error_message, t.error_message)
                        ELSE outcome.error_message END,
                    attempts = t.attempts + outcome.attempts,
                    crashes = t.crashes + outcome.crashes,
                    interruptions = t.interruptions + outcome.interruptions,
                    parked = outcome.parked,
                    unknown_since = CASE WHEN outcome.unknown
                        THEN COALESCE(t.unknown_since, clock_timestamp()) END,
                    worker_id = CASE WHEN outcome.state IN ('PENDING', 'PROCESSING')
                        THEN NULL ELSE t.worker_id END,
                    scheduled_at = CASE WHEN outcome.state = 'PENDING' THEN COALESCE(
                        outcome.scheduled_at,
                        clock_timestamp() + outcome.delay * interval '1 second',
                        t.scheduled_at) ELSE t.scheduled_at END,
                    finished_at = CASE WHEN outcome.state NOT IN ('PENDING', 'PROCESSING')
                        THEN clock_timestamp() END
                FROM outcome
                WHERE t.id = outcome.id AND t.claims = outcome.claims AND t.state = 'PROCESSING'
                  AND t.parked = outcome.was_parked
                RETURNING t.id, t.claims, t.state, t.scheduled_at, t.error_message,
                    outcome.channel, outcome.event_id, outcome.event, outcome.traceback
            ), written AS (
                INSERT INTO {events}
                    (id, task_id, type, error_message, traceback, scheduled_at, created_at)
                SELECT event_id, id, event, error_message, traceback,
                    CASE WHEN state = 'PENDING' THEN scheduled_at END, clock_timestamp()
                FROM settled WHERE event IS NOT NULL
            ), notified AS (
                SELECT count(pg_notify(channel, '')) AS channels
                FROM (
                    SELECT DISTINCT channel FROM settled
                    WHERE state = 'PENDING' AND channel IS NOT NULL
                ) AS waiting
                WHERE :notify
            )
            SELECT CAST(id AS text), claims FROM settled CROSS JOIN notified
        """)

        # What a worker would not be told of by any error: rows that row-level security hides from
        # it, and a relation in which ctid is no identity. What is not there is left to those who
        # use it.
        self._obstacles = self._text("""
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

        # Whoever creates tables waits until nobody else does so, and sees them then.
        self._lock_tables = self._text("""
            SELECT pg_advisory_xact_lock(hashtextextended('flask_beanqueue tables', 0))
        """)

        # Which rows somebody else has locked, without waiting for them.
        self._locked = self._text("""
            WITH unlocked AS MATERIALIZED (
                SELECT id FROM {tasks} WHERE id = ANY (CAST(:ids AS uuid[]))
                FOR NO KEY UPDATE SKIP LOCKED)
            SELECT CAST(id AS text) FROM {tasks} WHERE id = ANY (CAST(:ids AS uuid[]))
              AND id NOT IN (SELECT id FROM unlocked)
        """)

        # Of the tasks that are no longer a worker's, those that somebody has cancelled.
        self._cancelled = self._text("""
            SELECT CAST(id AS text) FROM {tasks}
            WHERE id = ANY (CAST(:ids AS uuid[])) AND state = 'CANCELLED'
        """)

        # The fence of a commit that is not the task's last, and of one whose processor set the
        # task's state itself: the row stays locked until that commit, so that take-over cannot
        # come between.
        self._hold = self._text("""
            SELECT state FROM {tasks} WHERE id = :id AND claims = :claims FOR NO KEY UPDATE
        """)

        # What a call from outside needs to know of a task that it ends.
        self._held = self._returning_claims(
            """
            SELECT {claim}, state, parked FROM {tasks} WHERE id = :id FOR NO KEY UPDATE
            """,
        )

        # Many tasks in one statement, their NOTIFY included. Two long values are read much faster
        # than a list of a hundred thousand short ones.
        self._insert = self._text(f"""
            WITH made AS (
                INSERT INTO {{task_table}} (id, channel, module, func_name, kwargs, priority,
                    scheduled_at{", parent_id" if has_parent else ""})
                SELECT id, :channel, :module, :func_name, CAST(kwargs AS jsonb), :priority,
                    COALESCE(CAST(:scheduled_at AS timestamptz),
                        clock_timestamp() + CAST(:delay AS interval), now())
                    {", CAST(:parent_id AS uuid)" if has_parent else ""}
                FROM ROWS FROM (
                    unnest(CAST(:ids AS uuid[])), json_array_elements(CAST(:kwargs AS json))
                ) AS new (id, kwargs)
            )
            SELECT CASE WHEN :notify THEN CAST(pg_notify(:notify_name, '') AS text) END
        """)

        self._add_worker = self._text("""
            INSERT INTO {workers} (id, state, name, channels, last_heartbeat, created_at)
            VALUES (:id, 'RUNNING', :name, CAST(:channels AS text[]), now(), now())
        """)

        # The heartbeat, and with it the search for those who have none: one statement in
        # autocommit, so that a worker that freezes in it holds no lock afterwards. A heartbeat that
        # is yet to come is none: the database's clock has been set back.
        self._beat = self._text("""
            WITH beat AS (
                UPDATE {workers} SET last_heartbeat = now()
                WHERE id = :id AND state = 'RUNNING' RETURNING id
            ), patience AS (
                SELECT CAST(:patience AS float8) * interval '1 second' AS patience
            )
            SELECT true AS own, id, '' AS name, '' AS beat FROM beat
            UNION ALL
            SELECT false, id, name, CAST(last_heartbeat AS text) FROM {workers}, patience
            WHERE state = 'RUNNING' AND id <> :id
              AND last_heartbeat NOT BETWEEN now() - patience AND now() + patience
        """).columns(id=postgresql.UUID(as_uuid=True))

        # For those who have not beaten since. SKIP LOCKED: another worker may be about it.
        self._bury_silent = self._text("""
            UPDATE {workers} SET state = 'NO_HEARTBEAT'
            WHERE id IN (
                SELECT w.id FROM {workers} AS w
                JOIN unnest(CAST(:ids AS uuid[]), CAST(:beats AS text[])) AS silent (id, beat)
                    ON w.id = silent.id AND CAST(w.last_heartbeat AS text) = silent.beat
                WHERE w.state = 'RUNNING'
                FOR NO KEY UPDATE OF w SKIP LOCKED)
            RETURNING id
        """).columns(id=postgresql.UUID(as_uuid=True))

        # For those that have not beaten for so long, by the database's clock alone.
        self._bury_overdue = self._text("""
            UPDATE {workers} SET state = 'NO_HEARTBEAT'
            WHERE state = 'RUNNING'
              AND last_heartbeat < now() - CAST(:timeout AS float8) * interval '1 second'
        """)

        # For those of which it is known.
        self._bury = self._text("""
            UPDATE {workers} SET state = 'NO_HEARTBEAT'
            WHERE id = ANY (CAST(:ids AS uuid[])) AND state = 'RUNNING'
        """)

        self._retire = self._text("""
            UPDATE {workers} SET state = 'SHUTDOWN' WHERE id = :id AND state = 'RUNNING'
        """)

        # A frozen worker still holds locks on what it flushed; and so may one that has shut down
        # without getting at a locked row, if its process then hangs. The process has given the
        # name to its connections; PostgreSQL allows ending backends of the role that one has, if
        # that is the one that they logged in as. So this drops a role that was SET, until the
        # statement's end. The view shows the backends of all databases, and a copy of this one
        # holds rows of the same workers.
        self._terminate = self._text("""
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

        # Every task that a worker should be doing and none is; who is silent has been declared dead
        # by the heartbeat, and who said goodbye may have had to leave something behind. Nothing is
        # locked: of several workers that find a task, the fence lets one write what becomes of it.
        # In the order of the ids, so that each is met once, also one that a trigger keeps as it is.
        self._orphans = self._returning_claims(
            """
            SELECT {claim}, EXISTS (
                SELECT FROM {workers} AS w WHERE w.id = t.worker_id AND w.state = 'SHUTDOWN')
            FROM {tasks} AS t
            WHERE state = 'PROCESSING' AND NOT parked AND {token} <> ALL (CAST(:known AS text[]))
              AND NOT EXISTS (
                SELECT FROM {workers} AS w WHERE w.id = t.worker_id AND w.state = 'RUNNING')
              AND (CAST(:after AS uuid) IS NULL OR id > CAST(:after AS uuid))
            ORDER BY id LIMIT :limit
            """,
        )

        # What a worker holds as the database sees it: after a lost connection, a claim may have
        # been committed whose answer never came.
        self._mine = self._returning_claims(
            """
            SELECT {claim} FROM {tasks}
            WHERE state = 'PROCESSING' AND NOT parked AND worker_id = :worker_id
            """,
        )

    def _text(self, sql: str) -> sa.TextClause:
        return sa.text(sql.format(**self._names))

    def _returning_claims(self, sql: str, *, arguments: bool = False) -> t.Any:
        """A statement whose rows make up claims.

        :param sql: with ``{claim}`` for their columns.
        :param arguments: whether with the tasks' arguments, as far as they take up to ``:most``
            bytes. As text they may take a thousand times as many as they are stored in; but what is
            stored in more is not read for that.
        """
        kwargs = """CASE WHEN pg_column_size(kwargs) <= :most
                AND octet_length(CAST(kwargs AS text)) <= :most THEN CAST(kwargs AS text) END"""
        columns = f"""CAST(ctid AS text) AS ctid, CAST(id AS text) AS key, claims,
            channel, module, func_name, {kwargs if arguments else "NULL"} AS arguments,
            priority, {micros("scheduled_at")} AS scheduled_at, attempts, crashes, interruptions,
            CASE WHEN unknown_since IS NOT NULL
                THEN {micros("now()")} - {micros("unknown_since")} END AS unknown_for"""
        return sa.text(sql.format(claim=columns, **self._names))

    # What the worker asks.

    def claim(
        self,
        connection: Connection,
        worker_id: uuid.UUID,
        levels: t.Sequence[Level],
        limit: int,
        most: int = 8_000,
    ) -> list[Claim]:
        """Claim up to ``limit`` due tasks behind the levels' marks, in the queue's order.

        :param most: bytes of the arguments that a claim may bring; larger ones it is without.
        """
        wanted = {"worker_id": worker_id, "most": most, **behind(levels, limit)}
        claims = [Claim(*row) for row in connection.execute(self._claim, wanted)]
        claims.sort(key=lambda claim: (claim.priority, claim.scheduled_at, claim.key))
        return claims

    def claim_suspect(
        self,
        connection: Connection,
        worker_id: uuid.UUID,
        channels: t.Sequence[str],
        most: int = 8_000,
    ) -> Claim | None:
        """Claim one due task that was in a crash, unless another such task runs.

        :param most: bytes of the arguments that the claim may bring; larger ones it is without.
        """
        wanted = {"worker_id": worker_id, "most": most, "channels": list(channels)}
        row = connection.execute(self._claim_suspect, wanted).first()
        return None if row is None else Claim(*row)

    def next(self, connection: Connection, levels: t.Sequence[Level]) -> Front | None:
        """Return the first task that :meth:`claim` would claim."""
        row = connection.execute(self._next, behind(levels, 1)).first()
        if row is None:
            return None
        return Front(row.channel, row.priority, row.at, row.id, row.due_in / 1e6)

    def arguments(self, connection: Connection, claim: Claim, largest: int) -> str | None:
        """Return the arguments of a claimed task as JSON; None if they take more bytes than
        ``largest``, or if the claim is lost."""
        wanted = {"id": claim.key, "claims": claim.claims, "largest": largest}
        return connection.execute(self._arguments, wanted).scalar()

    def evaluate(self, connection: Connection, claim: Claim, expression: t.Any) -> t.Any:
        """Return what an SQL expression comes to in a task's row, whose columns it may name."""
        tasks = self.models.task.__table__
        statement = sa.select(expression).select_from(tasks).where(tasks.c.id == claim.id)
        return connection.execute(statement).scalar_one()

    def look(self, connection: Connection, channels: t.Sequence[str]) -> Look:
        """Look from the front of the channels' queues, and for tasks that were in a crash."""
        wanted = {"channels": list(channels)}
        rows = connection.execute(self._look, wanted).all()
        any_suspect = connection.execute(self._suspects, wanted).scalar_one()
        return Look(
            [Front(row.channel, row.priority, row.at, row.id, row.due_in / 1e6) for row in rows],
            min((row.next_due / 1e6 for row in rows if row.next_due is not None), default=None),
            any_suspect,
        )

    def finish(
        self,
        connection: Connection,
        done: t.Sequence[tuple[Claim, str | None]],
        lock_timeout: float | None = None,
    ) -> set[tuple[str, int]]:
        """Mark claimed tasks DONE, each with its result as JSON.

        :param lock_timeout: seconds to wait for a locked row, in autocommit.
        :return: key and number of those claims whose row was still where it was, and still theirs.
        """
        any_result = any(result is not None for _, result in done)
        rows = connection.execute(
            self._finish,
            {
                "ctids": array(f'"{claim.ctid}"' for claim, _ in done),
                "ids": array(claim.key for claim, _ in done),
                "claims": array(str(claim.claims) for claim, _ in done),
                "results": [result for _, result in done] if any_result else [],
                "lock_timeout": milliseconds(lock_timeout),
            },
        )
        return {(key, claims) for key, claims in rows}

    def finish_one(self, connection: Connection, claim: Claim, result: str | None) -> bool:
        """Mark one claimed task DONE in the transaction at hand, and tell whether its row was still
        where it was, and still claimed."""
        done = connection.execute(
            self._finish_one,
            {"ctid": claim.ctid, "id": claim.key, "claims": claim.claims, "result": result},
        )
        return done.rowcount == 1

    def settle(
        self,
        connection: Connection,
        outcomes: t.Sequence[dict[str, t.Any]],
        lock_timeout: float | None = None,
    ) -> set[tuple[str, int]]:
        """Write outcomes with their events.

        :param lock_timeout: seconds to wait for a locked row, in autocommit.
        :return: key and number of the claims that still held.
        """
        rows = connection.execute(
            self._settle,
            {
                "outcomes": json.dumps(outcomes),
                "notify": notifies(connection),
                "lock_timeout": milliseconds(lock_timeout),
            },
        )
        return {(key, claims) for key, claims in rows}

    def locked(self, connection: Connection, keys: t.Sequence[str]) -> set[str]:
        """Return the keys of those tasks whose rows another transaction has locked."""
        return set(connection.scalars(self._locked, {"ids": list(keys)}).all())

    def cancelled(self, connection: Connection, keys: t.Sequence[str]) -> set[str]:
        """Return the keys of those tasks that are cancelled."""
        return set(connection.scalars(self._cancelled, {"ids": list(keys)}).all())

    def hold(self, connection: Connection, claim: Claim) -> str | None:
        """Lock a claimed task's row until the commit, and return its state; None if it is not
        this claim's any more."""
        row = connection.execute(self._hold, {"id": claim.id, "claims": claim.claims}).first()
        return None if row is None else row.state

    def held(self, connection: Connection, task_id: uuid.UUID) -> tuple[Claim, str, bool] | None:
        """Lock a task's row until the commit; return its last claim, its state, and whether it is
        parked."""
        row = connection.execute(self._held, {"id": task_id}).first()
        return None if row is None else (Claim(*row[:-2]), row.state, row.parked)

    # What an app asks.

    def insert(
        self,
        connection: Connection,
        ids: t.Sequence[uuid.UUID],
        kwargs: t.Sequence[str],
        **columns: t.Any,
    ) -> None:
        """Insert tasks that differ in their arguments, given as JSON."""
        connection.execute(
            self._insert,
            {
                "ids": array(id.hex for id in ids),
                "kwargs": f"[{','.join(kwargs)}]",
                "notify": notifies(connection),
                "notify_name": notify_name(columns["channel"]),
                **columns,
            },
        )

    # The workers' life.

    def lock_tables(self, connection: Connection) -> None:
        """Wait until nobody else creates tables, and let nobody do so until the commit."""
        connection.execute(self._lock_tables)

    def check_tables(self, connection: Connection) -> None:
        """See whether the tables are there with all columns, and may be used; read no row.

        :raises SetupError: if rows are hidden from the role, or the tasks are in no ordinary table.
        :raises sqlalchemy.exc.DBAPIError: naming what is not; a ProgrammingError, unless it comes
            from a trigger.
        """
        worker, task, event = self.models.tables
        self.check_obstacles(connection)
        for table in (worker, task, event):
            nothing = sa.select(*table.columns).where(sa.false())
            if table is not event:  # which also takes the right to UPDATE
                nothing = nothing.with_for_update(key_share=True)
            connection.execute(nothing).close()
        for table in (worker, event):  # and here the right to INSERT
            nothing = sa.select(table.c.id).where(sa.false())
            connection.execute(sa.insert(table).from_select(["id"], nothing))
        # And what is done all the time: it names the columns, and triggers may be in its way.
        self.check_claims(connection)
        for plain in (True, False):
            self.check_outcomes(connection, plain=plain)

    def check_obstacles(self, connection: Connection) -> None:
        """See whether a worker would miss rows without being told.

        :raises SetupError: if so.
        """
        names = [quote(table).replace(r"\:", ":") for table in self.models.tables]
        rows = connection.execute(self._obstacles, {"names": names}).all()
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

    def check_claims(self, connection: Connection) -> None:
        """See whether tasks can be claimed, whichever they are; claim none.

        :raises sqlalchemy.exc.DBAPIError: if not.
        """
        self.claim(connection, uuid.UUID(int=0), [], 0)

    def check_outcomes(self, connection: Connection, *, plain: bool) -> None:
        """See whether outcomes can be written, whichever they are; write none.

        :param plain: whether those of tasks that succeeded and wrote nothing, or all others.
        :raises sqlalchemy.exc.DBAPIError: if not.
        """
        if plain:
            self.finish(connection, [])
        else:
            self.settle(connection, [])

    def add_worker(
        self, connection: Connection, worker_id: uuid.UUID, name: str, channels: t.Sequence[str]
    ) -> None:
        connection.execute(
            self._add_worker, {"id": worker_id, "name": name, "channels": list(channels)}
        )

    def beat(
        self, connection: Connection, worker_id: uuid.UUID, patience: float
    ) -> tuple[bool, list[Silent]]:
        """Tell that a worker lives, and ask which others did not tell so for ``patience`` seconds.

        :return: whether the worker itself still counts as alive; the others.
        """
        rows = connection.execute(self._beat, {"id": worker_id, "patience": patience}).all()
        silent = [Silent(row.id, row.name, row.beat) for row in rows if not row.own]
        return len(silent) < len(rows), silent

    def bury_silent(self, connection: Connection, silent: t.Sequence[Silent]) -> set[uuid.UUID]:
        """Declare workers dead that have not beaten since, and return their ids."""
        ids, beats = [each.id for each in silent], [each.beat for each in silent]
        return set(connection.scalars(self._bury_silent, {"ids": ids, "beats": beats}))

    def bury_overdue(self, connection: Connection, timeout: float) -> None:
        """Declare workers dead that have not beaten for ``timeout`` seconds."""
        connection.execute(self._bury_overdue, {"timeout": timeout})

    def bury(self, connection: Connection, worker_ids: t.Iterable[uuid.UUID]) -> None:
        """Declare workers dead whose processes have ended, unless they left in order."""
        connection.execute(self._bury, {"ids": list(worker_ids)})

    def retire(self, connection: Connection, worker_id: uuid.UUID) -> None:
        """Mark a worker as shut down."""
        connection.execute(self._retire, {"id": worker_id})

    def terminate(self, connection: Connection) -> set[str]:
        """End the backends of workers that are dead, or gone and have left tasks behind, and with
        them their locks; return the other roles to which some of them belong, which go on."""
        rows = connection.execute(self._terminate, {"prefix": application_name("")})
        return {row.usename for row in rows if row.ended is None}

    def orphans(
        self, connection: Connection, after: str | None, limit: int, known: t.Iterable[str]
    ) -> list[tuple[Claim, bool]]:
        """Return tasks that are PROCESSING for no living worker, each with whether its worker has
        shut down in order.

        :param after: the key of the task behind which to look; None for all.
        :param known: tokens of claims to leave out.
        """
        rows = connection.execute(
            self._orphans, {"after": after, "limit": limit, "known": array(known)}
        )
        return [(Claim(*row[:-1]), row[-1]) for row in rows]

    def mine(self, connection: Connection, worker_id: uuid.UUID) -> list[Claim]:
        """Return what a worker has claimed."""
        return [Claim(*row) for row in connection.execute(self._mine, {"worker_id": worker_id})]


def quote(table: sa.Table) -> str:
    """A table's name as text() takes it: it doubles percent signs, which the dialect does, too, and
    takes what follows a colon for a parameter."""
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return str(preparer.format_table(table)).replace("%%", "%").replace(":", r"\:")


def behind(levels: t.Sequence[Level], limit: int) -> dict[str, t.Any]:
    """How a claim is told where the levels' marks are."""
    return {
        "channels": [level.channel for level in levels],
        "priorities": [level.priority for level in levels],
        "ats": [level.at for level in levels],
        "ids": [level.id for level in levels],
        "limit": limit,
    }


def micros(time: str) -> str:
    """A time as a whole number of microseconds since 1970, as exact as PostgreSQL has it: the text
    of a floating-point number depends on settings. What lies before 1684 or after 2255, at an end
    of time perhaps, becomes the first or the last number; in between, :func:`moment` is exact."""
    return (
        f"CAST(LEAST(GREATEST(extract(epoch FROM {time}) * 1000000, {EARLIEST}), {LATEST})"
        " AS bigint)"
    )


def moment(micros: str) -> str:
    """The time that such a number stands for."""
    return (
        f"CASE WHEN {micros} < {EARLIEST} THEN '-infinity'"
        f" ELSE timestamptz 'epoch' + {micros} * interval '1 microsecond' END"
    )


def array(values: t.Iterable[str]) -> str:
    """Values without a comma, or in quotes, as PostgreSQL writes an array: as a list they would be
    quoted one by one, which takes longer than all else that is done for them here."""
    return "{" + ",".join(values) + "}"


def milliseconds(seconds: float | None) -> str | None:
    """A time as PostgreSQL's settings take it."""
    return None if seconds is None else f"{seconds * 1000:.0f}ms"


def application_name(worker_id: uuid.UUID | str) -> str:
    """What a worker's connections are called in ``pg_stat_activity``."""
    return f"beanqueue {worker_id}"
