"""The tasks."""

from __future__ import annotations

import datetime
import enum
import typing as t
import uuid

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects.postgresql import JSONB, UUID
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from ..current import current_task_id
from .columns import Keyed, id_, now, table_name


class TaskState(enum.StrEnum):
    """The states of a task; the table has them as text."""

    PENDING = "PENDING"
    PROCESSING = "PROCESSING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


# As plain text, whose comparison is faster: a worker compares them for each task.
PENDING = TaskState.PENDING.value
PROCESSING = TaskState.PROCESSING.value
DONE = TaskState.DONE.value
FAILED = TaskState.FAILED.value
CANCELLED = TaskState.CANCELLED.value


class TaskModelMixin(Keyed):
    """Columns of a task."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return id_()

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
        return now()

    #: When it is due.
    @declared_attr
    def scheduled_at(cls) -> Mapped[datetime.datetime]:
        return now()

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
            sa.ForeignKey(f"{table_name(cls)}.id", ondelete="SET NULL"),
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
