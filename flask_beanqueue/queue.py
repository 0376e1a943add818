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

from .claim import Claim, current_claim, current_task_id, decode
from .handover import check_autocommit, check_open, check_schema, note
from .models import PROCESSING, Models, uuid7s
from .options import Options
from .queries import Queries

if t.TYPE_CHECKING:
    from .models import BQEvent, BQTask, BQWorker


class Queue:
    """What processors, the fence, the executor and the worker share of a :class:`BeanQueue`.

    The database may come later than the processors do; until then, what needs it raises.
    """

    _db: SQLAlchemy | None = None
    _models: Models | None = None
    _queries: Queries | None = None
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
    def queries(self) -> Queries:
        """The statements."""
        if self._queries is None:
            self._queries = Queries(self.models)
        return self._queries

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
                claim = current_claim()
                injected[name] = None if claim is None else self.attach_task(claim)
            else:
                injected[name] = self.db.session.begin_nested()
        return injected

    def evaluate(self, claim: Claim, expression: t.Any) -> t.Any:
        """Return what an SQL expression comes to, for the task of a claim. Ends the session's
        transaction."""
        session = self.db.session()
        try:
            return self.queries.evaluate(self.connection(session), claim, expression)
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
        self.queries.insert(
            connection,
            ids,
            kwargs,
            channel=options.channel,
            module=module,
            func_name=func_name,
            priority=options.priority,
            scheduled_at=options.scheduled_at,
            delay=options.delay,
            parent_id=parent_id and str(parent_id),
        )
        note(session, f"the task {module}.{func_name}")
        return ids
