"""The tables: tasks, workers and events, as mixins and as the models made of them."""

from __future__ import annotations

import datetime
import enum
import os
import struct
import threading
import time
import typing as t
import uuid

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from .claim import current_task_id


class TaskState(enum.StrEnum):
    """The states of a task; the table has them as text."""

    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class WorkerState(enum.StrEnum):
    """The states of a worker."""

    RUNNING = "RUNNING"
    SHUTDOWN = "SHUTDOWN"
    NO_HEARTBEAT = "NO_HEARTBEAT"


class EventType(enum.StrEnum):
    """The types of a task's events."""

    FAILED = "FAILED"
    RETRIED = "RETRIED"
    CRASHED = "CRASHED"
    INTERRUPTED = "INTERRUPTED"
    UNKNOWN = "UNKNOWN"
    DONE = "DONE"


# As plain text, whose comparison is faster: a worker compares them for each task.
PENDING = TaskState.PENDING.value
PROCESSING = TaskState.PROCESSING.value
DONE = TaskState.DONE.value
FAILED = TaskState.FAILED.value
CANCELLED = TaskState.CANCELLED.value
RUNNING = WorkerState.RUNNING.value
SHUTDOWN = WorkerState.SHUTDOWN.value
NO_HEARTBEAT = WorkerState.NO_HEARTBEAT.value

_uuid7_lock = threading.Lock()
_uuid7_last = 0


def uuid7() -> uuid.UUID:
    """Make a UUID of version 7 (RFC 9562) that sorts behind all that this process made before.

    The 12 bits after the milliseconds hold a fraction of one (the RFC's method 3), so that tasks
    of one transaction, whose times are equal, keep the order in which they were made. Python has
    a function of this name from 3.14 on.
    """
    return uuid7s(1)[0]


def uuid7s(count: int) -> list[uuid.UUID]:
    """Make several such UUIDs, in order."""
    global _uuid7_last
    with _uuid7_lock:
        first = max(_uuid7_last + 1, time.time_ns() * 4096 // 1_000_000)
        _uuid7_last = first + count - 1
    tails = struct.unpack(f"{count}Q", os.urandom(8 * count))
    return [
        uuid.UUID(
            int=ticks >> 12 << 80 | 0x7000 << 64 | (ticks & 0xFFF) << 64 | 0b10 << 62 | tail >> 2
        )
        for ticks, tail in enumerate(tails, first)
    ]


def _now() -> Mapped[datetime.datetime]:
    return mapped_column(
        sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now(), sort_order=10
    )


def _id() -> Mapped[uuid.UUID]:
    return mapped_column(
        UUID(as_uuid=True),
        primary_key=True,
        default=uuid7,
        server_default=sa.func.gen_random_uuid(),
        # Or SQLAlchemy, because of the server_default, inserts several objects one by one.
        insert_sentinel=True,
        sort_order=-10,
    )


def _table_name(model: t.Any) -> str:
    """The name by which a foreign key finds the table of a model, before it has one."""
    args = getattr(model, "__table_args__", None)
    if isinstance(args, tuple) and args:
        args = args[-1]
    schema = args.get("schema") if isinstance(args, dict) else None
    name: str = model.__tablename__
    return f"{schema}.{name}" if schema else name


class _Keyed:
    """Gives a new row its id when the object is made, not when it is flushed."""

    id: Mapped[uuid.UUID]

    def __init__(self, **kwargs: t.Any) -> None:
        kwargs.setdefault("id", uuid7())
        super().__init__(**kwargs)  # the constructor of the app's declarative base


class TaskModelMixin(_Keyed):
    """Columns of a task."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return _id()

    #: ``PENDING → PROCESSING → DONE | FAILED | CANCELLED``
    state: Mapped[str] = mapped_column(
        sa.Text, default=PENDING, server_default=PENDING, nullable=False
    )
    channel: Mapped[str] = mapped_column(
        sa.Text, default="default", server_default="default", nullable=False
    )
    #: The processor's module and name.
    module: Mapped[str] = mapped_column(sa.Text, nullable=False)
    func_name: Mapped[str] = mapped_column(sa.Text, nullable=False)
    kwargs: Mapped[dict[str, t.Any]] = mapped_column(
        JSONB, default=dict, server_default=sa.text("'{}'"), nullable=False
    )
    #: The smaller comes first, as with nice(1).
    priority: Mapped[int] = mapped_column(
        sa.Integer, default=0, server_default=sa.text("0"), nullable=False
    )
    #: What the processor returned.
    result: Mapped[t.Any] = mapped_column(JSONB(none_as_null=True), nullable=True)
    error_message: Mapped[str | None] = mapped_column(sa.Text, nullable=True)
    #: How often it was claimed; the fence.
    claims: Mapped[int] = mapped_column(
        sa.Integer, default=0, server_default=sa.text("0"), nullable=False
    )
    #: How often its processor ended, well or badly.
    attempts: Mapped[int] = mapped_column(
        sa.Integer, default=0, server_default=sa.text("0"), nullable=False
    )
    #: How often its worker died.
    crashes: Mapped[int] = mapped_column(
        sa.Integer, default=0, server_default=sa.text("0"), nullable=False
    )
    #: How often trouble of the database interrupted it.
    interruptions: Mapped[int] = mapped_column(
        sa.Integer, default=0, server_default=sa.text("0"), nullable=False
    )
    #: Left PROCESSING by ``auto_complete=False``, held by no worker.
    parked: Mapped[bool] = mapped_column(
        sa.Boolean, default=False, server_default=sa.false(), nullable=False
    )
    #: When workers first found that they do not know its processor.
    unknown_since: Mapped[datetime.datetime | None] = mapped_column(
        sa.DateTime(timezone=True), nullable=True
    )

    @declared_attr
    def created_at(cls) -> Mapped[datetime.datetime]:
        return _now()

    #: When it is due.
    @declared_attr
    def scheduled_at(cls) -> Mapped[datetime.datetime]:
        return _now()

    #: When it was claimed last, and when it ended.
    started_at: Mapped[datetime.datetime | None] = mapped_column(
        sa.DateTime(timezone=True), nullable=True
    )
    finished_at: Mapped[datetime.datetime | None] = mapped_column(
        sa.DateTime(timezone=True), nullable=True
    )

    @declared_attr
    def name(cls) -> Mapped[str]:
        return sa_orm.synonym("func_name")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.module}.{self.func_name} {self.state}>"


class TaskModelRefWorkerMixin:
    """Foreign key and relationship from a task to the worker that claimed it last."""

    #: The table and the class of the workers.
    bq_worker_table: t.ClassVar[str] = "bq_workers"
    bq_worker_class: t.ClassVar[str] = "BQWorker"
    #: The relationship back; None if there is none.
    bq_worker_tasks: t.ClassVar[str | None] = "tasks"

    @declared_attr
    def worker_id(cls) -> Mapped[uuid.UUID | None]:
        # No cascade: whoever deletes a worker's row must not delete tasks with it.
        return mapped_column(
            UUID(as_uuid=True),
            sa.ForeignKey(f"{cls.bq_worker_table}.id", ondelete="SET NULL", onupdate="CASCADE"),
            nullable=True,
        )

    @declared_attr
    def worker(cls) -> Mapped[t.Any]:
        return sa_orm.relationship(
            cls.bq_worker_class, back_populates=cls.bq_worker_tasks, uselist=False
        )


class TaskModelRefParentMixin:
    """Foreign key and relationships between a task and those made while it ran."""

    @declared_attr
    def parent_id(cls) -> Mapped[uuid.UUID | None]:
        return mapped_column(
            UUID(as_uuid=True),
            sa.ForeignKey(f"{_table_name(cls)}.id", ondelete="SET NULL"),
            default=current_task_id,
            nullable=True,
        )

    @declared_attr
    def parent(cls) -> Mapped[t.Any]:
        return sa_orm.relationship(
            cls.__name__,  # type: ignore[attr-defined]
            back_populates="children",
            remote_side=f"{cls.__name__}.id",  # type: ignore[attr-defined]
            uselist=False,
        )

    @declared_attr
    def children(cls) -> Mapped[list[t.Any]]:
        return sa_orm.relationship(
            cls.__name__,  # type: ignore[attr-defined]
            back_populates="parent",
            passive_deletes=True,
        )


class TaskModelRefEventMixin:
    """Relationship from a task to its events."""

    bq_event_class: t.ClassVar[str] = "BQEvent"
    bq_event_task: t.ClassVar[str | None] = "task"

    @declared_attr
    def events(cls) -> Mapped[list[t.Any]]:
        return sa_orm.relationship(
            cls.bq_event_class,
            back_populates=cls.bq_event_task,
            cascade="all, delete-orphan",
            passive_deletes=True,
            order_by=f"{cls.bq_event_class}.id",
        )


class WorkerModelMixin(_Keyed):
    """Columns of a worker process."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return _id()

    state: Mapped[str] = mapped_column(
        sa.Text, default=RUNNING, server_default=RUNNING, nullable=False
    )
    name: Mapped[str] = mapped_column(sa.Text, nullable=False)
    channels: Mapped[list[str]] = mapped_column(ARRAY(sa.Text), nullable=False)

    @declared_attr
    def last_heartbeat(cls) -> Mapped[datetime.datetime]:
        return _now()

    @declared_attr
    def created_at(cls) -> Mapped[datetime.datetime]:
        return _now()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name} {self.state}>"


class WorkerRefMixin:
    """Relationship from a worker to the tasks that it claimed."""

    bq_task_class: t.ClassVar[str] = "BQTask"
    bq_task_worker: t.ClassVar[str | None] = "worker"

    @declared_attr
    def tasks(cls) -> Mapped[list[t.Any]]:
        return sa_orm.relationship(
            cls.bq_task_class,
            back_populates=cls.bq_task_worker,
            passive_deletes=True,
            order_by=f"{cls.bq_task_class}.id",
        )


class EventModelMixin(_Keyed):
    """Columns of an event in a task's life."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return _id()

    #: See :class:`EventType`.
    type: Mapped[str] = mapped_column(sa.Text, nullable=False)
    error_message: Mapped[str | None] = mapped_column(sa.Text, nullable=True)
    traceback: Mapped[str | None] = mapped_column(sa.Text, nullable=True)
    #: When the task runs again.
    scheduled_at: Mapped[datetime.datetime | None] = mapped_column(
        sa.DateTime(timezone=True), nullable=True
    )

    @declared_attr
    def created_at(cls) -> Mapped[datetime.datetime]:
        return _now()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.type} {self.error_message or ''}>"


class EventModelRefTaskMixin:
    """Foreign key and relationship from an event to its task."""

    #: The table and the class of the tasks.
    bq_task_table: t.ClassVar[str] = "bq_tasks"
    bq_task_class: t.ClassVar[str] = "BQTask"
    bq_task_events: t.ClassVar[str | None] = "events"

    @declared_attr
    def task_id(cls) -> Mapped[uuid.UUID]:
        return mapped_column(
            UUID(as_uuid=True),
            sa.ForeignKey(f"{cls.bq_task_table}.id", ondelete="CASCADE", onupdate="CASCADE"),
            nullable=False,
            index=True,
        )

    @declared_attr
    def task(cls) -> Mapped[t.Any]:
        return sa_orm.relationship(
            cls.bq_task_class, back_populates=cls.bq_task_events, uselist=False
        )


if t.TYPE_CHECKING:
    # What bq.Task, bq.Worker and bq.Event are to type checkers. The real ones derive from the app's
    # own db.Model, or are the app's own.

    class Mapping(Model, sa_orm.DeclarativeBase):
        __table__: t.ClassVar[sa.Table]

    class BQTask(
        TaskModelMixin,
        TaskModelRefWorkerMixin,
        TaskModelRefParentMixin,
        TaskModelRefEventMixin,
        Mapping,
    ): ...

    class BQWorker(WorkerModelMixin, WorkerRefMixin, Mapping): ...

    class BQEvent(EventModelMixin, EventModelRefTaskMixin, Mapping): ...


class Models(t.NamedTuple):
    """The three models of one queue."""

    task: type[BQTask]
    worker: type[BQWorker]
    event: type[BQEvent]

    @property
    def tables(self) -> list[sa.Table]:
        return [self.worker.__table__, self.task.__table__, self.event.__table__]


def make_models(
    db: SQLAlchemy,
    bind_key: str | None,
    task: type[t.Any] | None,
    worker: type[t.Any] | None,
    event: type[t.Any] | None,
) -> Models:
    """Make the models that the app does not bring itself, and give all of them what they need.

    :param db: the extension whose ``Model`` they derive from.
    :param bind_key: the bind in which the made ones live.
    :param task: an own model; likewise ``worker`` and ``event``.
    :raises TypeError: if an own model lacks columns that the queue needs.
    """
    for model, mixin in (
        (task, TaskModelMixin),
        (worker, WorkerModelMixin),
        (event, EventModelMixin),
    ):
        if model is not None:
            require(model, mixin)
    base = model_base(db, bind_key)
    names = {
        "task": task.__name__ if task else "BQTask",
        "worker": worker.__name__ if worker else "BQWorker",
        "event": event.__name__ if event else "BQEvent",
    }
    tables = {
        "task": task.__table__.fullname if task else "bq_tasks",
        "worker": worker.__table__.fullname if worker else "bq_workers",
    }

    def back(model: t.Any, relationship: str) -> str | None:
        """The relationship back, unless an own model is without it."""
        return relationship if model is None or hasattr(model, relationship) else None

    def refers(model: t.Any, column: str) -> bool:
        """Whether there is a foreign key for a relationship to use."""
        return model is None or bool(model.__table__.c[column].foreign_keys)

    def make(name: str, tablename: str, *mixins: type, **refers: str | None) -> t.Any:
        body = {
            "__tablename__": tablename,
            "__module__": __name__,
            # What the server fills in loads itself when it is asked for, which is hardly ever so.
            "__mapper_args__": {"eager_defaults": False},
            **refers,
        }
        if bind_key is not None:
            body["__bind_key__"] = bind_key
        return type(base)(name, (*mixins, base), body)

    own_task = task
    if task is None:
        task = make(
            "BQTask",
            "bq_tasks",
            TaskModelMixin,
            TaskModelRefWorkerMixin,
            TaskModelRefParentMixin,
            *([TaskModelRefEventMixin] if refers(event, "task_id") else []),
            bq_worker_table=tables["worker"],
            bq_worker_class=names["worker"],
            bq_worker_tasks=back(worker, "tasks"),
            bq_event_class=names["event"],
            bq_event_task=back(event, "task"),
        )
    if worker is None:
        worker = make(
            "BQWorker",
            "bq_workers",
            WorkerModelMixin,
            *([WorkerRefMixin] if refers(own_task, "worker_id") else []),
            bq_task_class=names["task"],
            bq_task_worker=back(own_task, "worker"),
        )
    if event is None:
        event = make(
            "BQEvent",
            "bq_events",
            EventModelMixin,
            EventModelRefTaskMixin,
            bq_task_table=tables["task"],
            bq_task_class=names["task"],
            bq_task_events=back(own_task, "events"),
        )
    models = Models(task, worker, event)
    add_constraints(models)
    return models


def model_base(db: SQLAlchemy, bind_key: str | None) -> t.Any:
    """``db.Model``, or, where that makes dataclasses, a plain base in the same registry.

    Mapped dataclasses take their fields from annotations in the order of the classes, which
    mixins cannot promise to the app's own base; the queue's models do not need to be dataclasses.
    """
    model: t.Any = db.Model
    if not issubclass(model, sa_orm.MappedAsDataclass):
        return model
    if bind_key is not None and bind_key not in db.metadatas:
        db.metadatas[bind_key] = sa.MetaData(
            naming_convention=db.metadata.naming_convention, info={"bind_key": bind_key}
        )
    body = {
        "metadata": db.metadatas[bind_key],
        "registry": model.registry,
        "query_class": model.query_class,
        "query": model.__dict__["query"],
        "__fsa__": db,
    }
    return type("QueueModel", (Model, sa_orm.DeclarativeBaseNoMeta), body)


def require(model: t.Any, mixin: type) -> None:
    """Refuse an own model that lacks columns of a mixin, with the words that help."""
    columns = {
        name
        for name in vars(mixin)
        if isinstance(vars(mixin)[name], (sa_orm.MappedColumn, declared_attr))
    }
    # The column that refers to another table comes from another mixin.
    others = {"worker_id": TaskModelRefWorkerMixin, "task_id": EventModelRefTaskMixin}
    if mixin is TaskModelMixin:
        columns.remove("name")  # the synonym
        columns.add("worker_id")
    elif mixin is EventModelMixin:
        columns.add("task_id")
    missing = sorted(columns - set(sa.inspect(model).columns.keys()))
    if missing:
        mixins = sorted({others.get(name, mixin).__name__ for name in missing})
        raise TypeError(
            f"{model.__module__}.{model.__name__} has no column {', '.join(missing)}."
            f" Let it derive from flask_beanqueue.{' and '.join(mixins)}."
        )
    if mixin is TaskModelMixin:
        return  # tasks with columns of their own may be made by the app alone
    for column in model.__table__.columns:
        filled = column.nullable or column.server_default is not None
        if not filled and column.key not in columns:
            raise TypeError(
                f"{model.__module__}.{model.__name__}.{column.key} cannot be empty, and the queue,"
                " which writes these rows, knows nothing to fill it with. Give it a server_default,"
                " or make it nullable."
            )


def add_constraints(models: Models) -> None:
    """Add indexes and checks to the tables, also to those of own models, whatever their
    ``__table_args__`` say: without them the queue works, but slowly."""
    tasks: sa.Table = models.task.__table__
    workers: sa.Table = models.worker.__table__
    c = tasks.c

    def index(name: str, *columns: t.Any, where: sa.ColumnElement[bool]) -> None:
        name = f"ix_{tasks.name}_{name}"
        if name not in {index.name for index in tasks.indexes}:
            sa.Index(name, *columns, postgresql_where=where)

    # The queue itself, in the order of the claim; only what waits is in it.
    index(
        "pending",
        c.channel,
        c.priority,
        c.scheduled_at,
        c.id,
        where=c.state == sa.literal_column("'PENDING'"),
    )
    # What take-over looks through.
    processing = c.state == sa.literal_column("'PROCESSING'")
    index("processing", c.worker_id, where=sa.and_(processing, sa.not_(c.parked)))
    # The few tasks whose worker died.
    index(
        "suspect",
        c.channel,
        c.scheduled_at,
        where=sa.and_(
            c.crashes > sa.literal_column("0"),
            c.state.in_([sa.literal_column("'PENDING'"), sa.literal_column("'PROCESSING'")]),
        ),
    )
    # Lets history be deleted: ON DELETE SET NULL looks for children.
    if "parent_id" in c:
        index("parent", c.parent_id, where=c.parent_id.is_not(None))
    for table, states in ((tasks, TaskState), (workers, WorkerState)):
        name = f"ck_{table.name}_state"
        if name not in {constraint.name for constraint in table.constraints}:
            values = ", ".join(f"'{state}'" for state in states)
            table.append_constraint(
                sa.CheckConstraint(f"state IN ({values})", name=sa.schema.conv(name))
            )
