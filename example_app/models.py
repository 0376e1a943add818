"""Pictures and their thumbnails."""

from __future__ import annotations

import datetime
import uuid

from sqlalchemy import ForeignKey, func
from sqlalchemy.orm import Mapped, mapped_column, relationship
from sqlalchemy.types import DateTime

from flask_beanqueue import TaskModelMixin

from .extensions import bq, db


class Image(db.Model):
    """An uploaded picture.

    Its bytes live in the database: so they are committed, or rolled back, with the row and the
    tasks. A folder of files would have to be kept in step by hand. (``deferred``: they are read
    only where they are asked for.)
    """

    __tablename__ = "images"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    data: Mapped[bytes] = mapped_column(deferred=True)
    uploaded_at: Mapped[datetime.datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.now()
    )
    thumbnails: Mapped[list[Thumbnail]] = relationship(
        back_populates="image",
        cascade="all, delete-orphan",
        passive_deletes=True,
        order_by="Thumbnail.size.desc()",
    )

    @property
    def state(self) -> str:
        """The least finished state among its thumbnails'."""
        return min((t.state for t in self.thumbnails), key=("pending", "failed", "ready").index)

    @property
    def reasons(self) -> list[str]:
        """Why thumbnails of this picture failed, each reason once."""
        return list(dict.fromkeys(t.reason for t in self.thumbnails if t.state == "failed"))


class Thumbnail(db.Model):
    """A smaller version of a picture: a row from the start, with data once its task is done."""

    __tablename__ = "thumbnails"

    id: Mapped[int] = mapped_column(primary_key=True)
    image_id: Mapped[int] = mapped_column(ForeignKey("images.id", ondelete="CASCADE"), index=True)
    #: The task that makes it. Old tasks may be cleared away some day: SET NULL.
    task_id: Mapped[uuid.UUID | None] = mapped_column(
        ForeignKey("bq_tasks.id", ondelete="SET NULL"), unique=True
    )
    #: The longest side allowed, in pixels.
    size: Mapped[int]
    width: Mapped[int | None]
    height: Mapped[int | None]
    data: Mapped[bytes | None] = mapped_column(deferred=True)

    image: Mapped[Image] = relationship(back_populates="thumbnails")
    task: Mapped[TaskModelMixin | None] = relationship(bq.Task)

    @property
    def state(self) -> str:
        if self.width is not None:
            return "ready"
        if self.task is None or self.task.state in ("FAILED", "CANCELLED"):
            return "failed"
        return "pending"  # DONE, too: then this row was read just before the task was

    @property
    def reason(self) -> str:
        """Why it failed, from its task: what the processor itself wrote was rolled back."""
        if self.task is None or self.task.error_message is None:
            return "Its task was cancelled."
        kind, _, words = self.task.error_message.partition(": ")
        return words if kind == "PictureError" else f"Something went wrong: {kind.rstrip('.')}."
