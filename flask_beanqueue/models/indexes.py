"""Indexes and CHECKs of the tables."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa

from .task import TaskState
from .worker import WorkerState

if t.TYPE_CHECKING:
    from .make import Models


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
