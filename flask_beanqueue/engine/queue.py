"""The queue of one database: its models, its statements, its place in the app's session."""

from __future__ import annotations

import contextlib
import typing as t
import uuid

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from ..codec import decode
from ..current import current_attempt, current_task_id
from ..models.make import Models
from ..models.task import PROCESSING
from ..models.uuid7 import uuid7s
from ..options import Options
from ..sql import Sql, array
from .claim import Claim
from .handover import check_autocommit, check_open, check_schema, note
from .notify import notifies, notify_name

if t.TYPE_CHECKING:
    from ..models.make import BQEvent, BQTask, BQWorker


# Many tasks in one statement, their NOTIFY included. Two long values are read much faster than a
# list of a hundred thousand short ones.
INSERT = Sql("""
    WITH made AS (
        INSERT INTO {task_table} (id, channel, module, func_name, kwargs, priority,
            scheduled_at{parent_column})
        SELECT id, :channel, :module, :func_name, CAST(kwargs AS jsonb), :priority,
            COALESCE(CAST(:scheduled_at AS timestamptz),
                clock_timestamp() + CAST(:delay AS interval), now()){parent_value}
        FROM ROWS FROM (
            unnest(CAST(:ids AS uuid[])), json_array_elements(CAST(:kwargs AS json))
        ) AS new (id, kwargs)
    )
    SELECT CASE WHEN :notify THEN CAST(pg_notify(:notify_name, '') AS text) END
""")


class Queue:
    """What processors, the fence, the executor and the worker share of a :class:`BeanQueue`.

    The database may come later than the processors do; until then, what needs it raises.
    """

    _db: SQLAlchemy | None = None
    _models: Models | None = None
    #: What ``db.session`` was when the fence has seen it last.
    watched: t.Any = None

    @property
    def db(self) -> SQLAlchemy:
        """The Flask-SQLAlchemy extension.

        :raises RuntimeError: before it is known; likewise for all that follows.
        """
        if self._db is None:
            raise RuntimeError(
                "This BeanQueue does not know its database yet. Write BeanQueue(db=db), or use it"
                " after bq.init_app(app)."
            )
        return self._db

    @property
    def models(self) -> Models:
        """The three models."""
        if self._models is None:
            raise RuntimeError(
                "The models are made with the database, which this BeanQueue does not know yet."
                " Write BeanQueue(db=db) to have them at once, or use them after bq.init_app(app)."
            )
        return self._models

    @property
    def Task(self) -> type[BQTask]:
        """The model of the tasks."""
        return self.models.task

    @property
    def Worker(self) -> type[BQWorker]:
        """The model of the workers."""
        return self.models.worker

    @property
    def Event(self) -> type[BQEvent]:
        """The model of the events."""
        return self.models.event

    # In the session.

    def bind(self, session: Session) -> Engine | Connection:
        """Return where a session finds the queue's own database, which may be a bind.

        An app's own ``get_bind`` may send what looks like a read to a replica, so its engine counts
        only if it is the queue's, perhaps with options.
        """
        bind = session.get_bind(mapper=sa.inspect(self.Task))
        if type(session).get_bind is not Session.get_bind:
            engine = self.db.engines[self.Task.__table__.metadata.info.get("bind_key")]
            if bind.engine.pool is not engine.engine.pool:
                bind = engine
        return bind

    def connection(self, session: Session) -> Connection:
        """Return the session's connection to the queue's own database.

        :raises SetupError: if it is in AUTOCOMMIT.
        """
        connection = session.connection(bind_arguments={"bind": self.bind(session)})
        check_autocommit(connection)
        return connection

    def known_task(self, session: Session, task_id: uuid.UUID) -> t.Any:
        """The task if the session has it already; the database is not asked."""
        return session.identity_map.get(sa_orm.util.identity_key(self.Task, task_id))

    def attach_task(self, claim: Claim) -> t.Any:
        """Return the ``bq.Task`` of a claim in ``db.session``; what the claim did not bring loads
        itself when it is asked for. That begins a transaction, and this does not."""
        session = self.db.session()
        task = self.known_task(session, claim.id)
        if task is None:
            task = self.make_task(claim)
            # To add something takes a transaction, in which db.session.begin() would fail.
            began = None if session.in_transaction() else session.begin()
            session.add(task)
            if began is not None:
                began.close()
        return task

    def task_after(self, claim: Claim, **values: t.Any) -> t.Any:
        """Return the ``bq.Task`` of a claim in ``db.session`` as it is after an attempt.

        :param values: what is known of its columns; the others load themselves.
        """
        session = self.db.session()
        task = self.known_task(session, claim.id)
        if task is None:
            task = self.attach_task(claim)
        else:
            session.expire(task)
        for name, value in values.items():
            sa_orm.attributes.set_committed_value(task, name, value)
        return task

    def make_task(self, claim: Claim) -> t.Any:
        """Make the ``bq.Task`` of a claim without asking the database, in no session."""
        task = self.Task(
            id=claim.id,
            state=PROCESSING,
            channel=claim.channel,
            module=claim.module,
            func_name=claim.func_name,
            priority=claim.priority,
            claims=claim.claims,
            attempts=claim.attempts,
            crashes=claim.crashes,
            interruptions=claim.interruptions,
        )
        if claim.arguments is not None:
            with contextlib.suppress(ValueError):
                task.kwargs = decode(claim.arguments)
        sa_orm.make_transient_to_detached(task)
        return task

    def injection(self, names: t.Iterable[str]) -> dict[str, t.Any]:
        """The arguments that a processor is given beside its task's."""
        injected: dict[str, t.Any] = {}
        for name in names:
            if name == "db":
                injected[name] = self.db.session()
            elif name == "task":
                attempt = current_attempt()
                injected[name] = None if attempt is None else self.attach_task(attempt.claim)
            else:
                injected[name] = self.db.session.begin_nested()
        return injected

    def evaluate(self, claim: Claim, expression: t.Any) -> t.Any:
        """Return what an SQL expression comes to, for the task of a claim. Ends the session's
        transaction."""
        session = self.db.session()
        try:
            tasks = self.Task.__table__
            statement = sa.select(expression).select_from(tasks).where(tasks.c.id == claim.id)
            return self.connection(session).execute(statement).scalar_one()
        finally:
            session.rollback()

    def insert_many(
        self, module: str, func_name: str, options: Options, kwargs: t.Sequence[str]
    ) -> list[uuid.UUID]:
        """Insert tasks with one statement, their arguments given as JSON; return their ids."""
        ids = uuid7s(len(kwargs))
        session: Session = self.db.session()
        check_open(session)
        connection = self.connection(session)
        check_schema(connection.get_execution_options(), self.Task.__table__)
        parent_id = current_task_id()
        connection.execute(
            INSERT.on(self.models),
            {
                "ids": array(id.hex for id in ids),
                "kwargs": f"[{','.join(kwargs)}]",
                "channel": options.channel,
                "module": module,
                "func_name": func_name,
                "priority": options.priority,
                "scheduled_at": options.scheduled_at,
                "delay": options.delay,
                "parent_id": parent_id and str(parent_id),
                "notify": notifies(connection),
                "notify_name": notify_name(options.channel),
            },
        )
        note(session, f"the task {module}.{func_name}")
        return ids
