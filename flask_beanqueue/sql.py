"""SQL: each statement is a literal beside its caller, bound here to the names of the tables."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql


class Tables(t.Protocol):
    """What a statement is bound to: the models of a queue."""

    @property
    def names(self) -> t.Mapping[str, str]: ...
    @property
    def statements(self) -> dict[Sql, sa.TextClause]: ...


class Sql:
    """A statement of the queue's.

    :param text: a literal. In it, ``{tasks}``, ``{workers}`` and ``{events}`` stand for the tables;
        ``{tasks}`` is ``ONLY`` the table itself, without those that inherit from it: rows are found
        by ctid, which tells them apart within one table. An INSERT wants ``{task_table}``.
        ``{parent_column}`` and ``{parent_value}`` are empty if tasks have no parents.
    :param parts: other literals, by the names that stand for them.
    """

    def __init__(self, text: str, **parts: str) -> None:
        self.text = text
        self.parts = parts

    def on(self, tables: Tables) -> sa.TextClause:
        """Return the statement for these tables, which is made once."""
        if (statement := tables.statements.get(self)) is None:
            statement = sa.text(self.text.format(**tables.names, **self.parts))
            tables.statements[self] = statement
        return statement


def names(task: sa.Table, worker: sa.Table, event: sa.Table) -> dict[str, str]:
    """Return what the names of tables stand for in statements."""
    return {
        "tasks": f"ONLY {quote(task)}",
        "task_table": quote(task),
        "workers": quote(worker),
        "events": quote(event),
        # The tasks of own models may have no parents.
        "parent_column": ", parent_id" if "parent_id" in task.c else "",
        "parent_value": ", CAST(:parent_id AS uuid)" if "parent_id" in task.c else "",
    }


def quote(table: sa.Table) -> str:
    """Return a table's name as text() takes it: it doubles percent signs, which the dialect does,
    too, and takes what follows a colon for a parameter."""
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return str(preparer.format_table(table)).replace("%%", "%").replace(":", r"\:")


def array(values: t.Iterable[str]) -> str:
    """Write values without a comma, or in quotes, as PostgreSQL writes an array: as a list they
    would be quoted one by one, which takes longer than all else that is done for them here."""
    return "{" + ",".join(values) + "}"
