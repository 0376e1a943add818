"""Makes the models that an app does not bring itself."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model
from sqlalchemy.orm import declared_attr

from ..sql import Sql, names
from .event import EventModelMixin, EventModelRefTaskMixin
from .indexes import add_constraints
from .task import (
    TaskModelMixin,
    TaskModelRefEventMixin,
    TaskModelRefParentMixin,
    TaskModelRefWorkerMixin,
)
from .worker import WorkerModelMixin, WorkerRefMixin

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


class Models:
    """The three models of one queue, and the statements that are bound to them."""

    def __init__(self, task: type[BQTask], worker: type[BQWorker], event: type[BQEvent]) -> None:
        self.task = task
        self.worker = worker
        self.event = event
        self.tables: list[sa.Table] = [worker.__table__, task.__table__, event.__table__]
        self.names = names(task.__table__, worker.__table__, event.__table__)
        self.statements: dict[Sql, sa.TextClause] = {}


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
    classes = {
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
            "__module__": __package__,
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
            bq_worker_class=classes["worker"],
            bq_worker_tasks=back(worker, "tasks"),
            bq_event_class=classes["event"],
            bq_event_task=back(event, "task"),
        )
    if worker is None:
        worker = make(
            "BQWorker",
            "bq_workers",
            WorkerModelMixin,
            *([WorkerRefMixin] if refers(own_task, "worker_id") else []),
            bq_task_class=classes["task"],
            bq_task_worker=back(own_task, "worker"),
        )
    if event is None:
        event = make(
            "BQEvent",
            "bq_events",
            EventModelMixin,
            EventModelRefTaskMixin,
            bq_task_table=tables["task"],
            bq_task_class=classes["task"],
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
