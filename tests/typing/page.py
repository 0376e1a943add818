"""What docs/typing.md shows, for mypy to read: test_readme sees that it is the same."""

# ruff: noqa: E402

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session

from flask_beanqueue import BeanQueue, TaskModelMixin

db = SQLAlchemy()
bq = BeanQueue(db=db)


@bq.processor(channel="images")
def resize(db: Session, task: TaskModelMixin, width: int, height: int = 1) -> str:
    return f"{task.id}: {width}x{height}"


def order(width: int) -> None:
    resize.enqueue(width=width)
    resize.using(priority=-1).enqueue(width, height=300)


import sqlalchemy as sa

from flask_beanqueue import current_task


def waiting(channel: str) -> int:
    count = sa.select(sa.func.count()).where(bq.Task.channel == channel)
    return db.session.scalar(count.where(bq.Task.state == "PENDING")) or 0


def made_by_this_one() -> list[str]:
    return [task.func_name for task in current_task.children]


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask_beanqueue.models import BQTask


def children(task: "BQTask") -> list[str]:
    return [child.state for child in task.children]


from datetime import timedelta

from flask_beanqueue import LimitAttempt, RetryPolicy


def patient(task: TaskModelMixin) -> timedelta:
    return timedelta(minutes=task.attempts)


policy: RetryPolicy = LimitAttempt(5, patient)


@bq.processor(retry_policy=policy, retry_exceptions=(OSError, TimeoutError))
def send(order_id: int) -> None: ...


# What the page says that a type checker refuses.

resize.enqueue(wide=1)  # type: ignore[call-arg]
resize.enqueue("wide")  # type: ignore[arg-type]
resize.enqueue(db=db.session(), width=1)  # type: ignore[call-arg]
policy = LimitAttempt(5, lambda task: 5)  # type: ignore[arg-type, return-value]
