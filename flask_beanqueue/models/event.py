"""The events in tasks' lives."""

from __future__ import annotations

import datetime
import enum
import typing as t
import uuid

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from .columns import Keyed, id_, now


class EventType(enum.StrEnum):
    """The types of a task's events."""

    FAILED = "FAILED"
    RETRIED = "RETRIED"
    CRASHED = "CRASHED"
    INTERRUPTED = "INTERRUPTED"
    UNKNOWN = "UNKNOWN"
    DONE = "DONE"


class EventModelMixin(Keyed):
    """Columns of an event in a task's life."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return id_()

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
        return now()

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
