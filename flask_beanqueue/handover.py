"""The handover of tasks: with the commit of their session, to the tables where workers look."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
from sqlalchemy.engine import Connection


def listen_writes(model: type[t.Any]) -> None:
    """Refuse to write tasks of this model where workers do not look for them."""
    for name in ("before_insert", "before_update"):
        sa.event.listen(model, name, _before_write, propagate=True)


def _before_write(mapper: t.Any, connection: Connection, task: t.Any) -> None:
    check_schema(connection.get_execution_options(), mapper.local_table)


def check_schema(options: t.Mapping[str, t.Any], *tables: t.Any) -> None:
    """Refuse execution options that rename the schema of the queue's tables. They hold for the ORM
    and not for the queue's own statements, nor for workers.

    :raises RuntimeError: naming the table.
    """
    if not (renamed := options.get("schema_translate_map")):
        return
    for table in tables:
        if (schema := renamed.get(table.schema, table.schema)) != table.schema:
            raise RuntimeError(
                f"The schema_translate_map moves {table.name} to the schema {schema!r}, where no"
                " worker looks: make tables of the queue's own in a schema that it does not name"
                ' (__table_args__ = {"schema": …}, docs/own-tables.md), or set search_path instead.'
            )
