"""Models whose references are written by hand."""

from __future__ import annotations

import uuid

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.orm import Mapped, mapped_column, relationship

from flask_beanqueue import TaskModelMixin, WorkerModelMixin

db = SQLAlchemy()


class Task(TaskModelMixin, db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "task"

    worker_id: Mapped[uuid.UUID] = mapped_column(
        UUID(as_uuid=True),
        ForeignKey("worker.id", onupdate="CASCADE"),
        nullable=True,
        index=True,
    )
    worker: Mapped[Worker] = relationship("Worker", back_populates="tasks", uselist=False)


class Worker(WorkerModelMixin, db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "worker"

    tasks: Mapped[list[Task]] = relationship(
        "Task", back_populates="worker", order_by="Task.created_at"
    )
