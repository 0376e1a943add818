"""Columns that all the tables have."""

from __future__ import annotations

import datetime
import typing as t
import uuid

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.orm import Mapped, mapped_column

from .uuid7 import uuid7


def now() -> Mapped[datetime.datetime]:
    return mapped_column(
        sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now(), sort_order=10
    )


def id_() -> Mapped[uuid.UUID]:
    return mapped_column(
        UUID(as_uuid=True),
        primary_key=True,
        default=uuid7,
        server_default=sa.func.gen_random_uuid(),
        # Otherwise SQLAlchemy inserts several objects one by one, for the server_default's sake.
        insert_sentinel=True,
        sort_order=-10,
    )


def table_name(model: t.Any) -> str:
    """The name by which a foreign key finds the table of a model, before it has one."""
    args = getattr(model, "__table_args__", None)
    if isinstance(args, tuple) and args:
        args = args[-1]
    schema = args.get("schema") if isinstance(args, dict) else None
    name: str = model.__tablename__
    return f"{schema}.{name}" if schema else name


class Keyed:
    """Gives a new row its id when the object is made, not when it is flushed."""

    id: Mapped[uuid.UUID]

    def __init__(self, **kwargs: t.Any) -> None:
        kwargs.setdefault("id", uuid7())
        super().__init__(**kwargs)  # the constructor of the app's declarative base
