"""The workers."""

from __future__ import annotations

import datetime
import enum
import typing as t
import uuid

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from .columns import Keyed, id_, now


class WorkerState(enum.StrEnum):
    """The states of a worker."""

    RUNNING = "RUNNING"
    SHUTDOWN = "SHUTDOWN"
    NO_HEARTBEAT = "NO_HEARTBEAT"


RUNNING = WorkerState.RUNNING.value
SHUTDOWN = WorkerState.SHUTDOWN.value
NO_HEARTBEAT = WorkerState.NO_HEARTBEAT.value


class WorkerModelMixin(Keyed):
    """Columns of a worker process."""

    @declared_attr
    def id(cls) -> Mapped[uuid.UUID]:
        return id_()

    state: Mapped[str] = mapped_column(
        sa.Text, default=RUNNING, server_default=RUNNING, nullable=False
    )
    name: Mapped[str] = mapped_column(sa.Text, nullable=False)
    channels: Mapped[list[str]] = mapped_column(ARRAY(sa.Text), nullable=False)

    @declared_attr
    def last_heartbeat(cls) -> Mapped[datetime.datetime]:
        return now()

    @declared_attr
    def created_at(cls) -> Mapped[datetime.datetime]:
        return now()

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
