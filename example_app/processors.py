"""What the worker does."""

from __future__ import annotations

import io
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from flask_beanqueue import ExponentialBackoffRetry, LimitAttempt, TaskModelMixin

from .extensions import bq
from .models import Thumbnail
from .pictures import shrink


@bq.processor(
    channel="images",
    # Trouble that may pass is met with two more attempts, after about one and two seconds. A
    # broken picture stays broken: PictureError is not in the list, so its task fails at once.
    retry_exceptions=(MemoryError, OperationalError),
    retry_policy=LimitAttempt(3, ExponentialBackoffRetry(timedelta(seconds=1))),
)
def make_thumbnail(db: Session, task: TaskModelMixin, size: int) -> None:
    """Fill in the thumbnail that belongs to the task.

    ``db`` is the session that the worker commits together with the task's completion. So there is
    no commit here: either the thumbnail is saved and the task is done, or neither.
    """
    # The row was committed together with the task, so it is there, unless the picture was removed
    # since. The lock keeps that from happening meanwhile.
    thumbnail = db.scalar(select(Thumbnail).where(Thumbnail.task_id == task.id).with_for_update())
    if thumbnail is None:
        return
    picture = shrink(thumbnail.image.data, size)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    thumbnail.data = buffer.getvalue()
    thumbnail.width, thumbnail.height = picture.size
