"""``flask bq create-tables``."""

from __future__ import annotations

import typing as t

import click
import sqlalchemy as sa
from flask.cli import with_appcontext

from ..sql import Sql
from .readable import current, readable_errors

# Whoever creates tables waits until nobody else does so, and sees them then.
LOCK_TABLES = Sql("SELECT pg_advisory_xact_lock(hashtextextended('flask_beanqueue tables', 0))")


@click.command("create-tables")
@with_appcontext
def command() -> None:
    """Create the queue's tables, where they do not exist.

    Apps that use Flask-Migrate do not need this: `flask db migrate` finds the tables with the
    app's own.
    """
    app, bq = current()
    with (
        readable_errors("GRANT REFERENCES on it", of_schema="GRANT USAGE and CREATE on it"),
        bq.engine(app).connect() as connection,
        # What somebody else has created meanwhile must be seen.
        connection.execution_options(isolation_level="READ COMMITTED").begin(),
    ):
        connection.execute(LOCK_TABLES.on(bq.models))
        inspector = sa.inspect(connection)
        tables = bq.models.tables
        new = [table for table in tables if not inspector.has_table(table.name, table.schema)]
        old = [table for table in tables if table not in new]
        if lacks := [what for table in old for what in lacking(inspector, table)]:
            raise click.ClickException(
                f"The tables are older than this release: {'; '.join(lacks)}. Change them with a"
                " migration (Flask-Migrate), or drop them if they hold nothing of worth."
            )
        bq.Task.__table__.metadata.create_all(connection, tables=new)
    for table in tables:
        click.echo(f"{table.fullname} {'created' if table in new else 'exists'}")


def lacking(inspector: sa.Inspector, table: sa.Table) -> t.Iterator[str]:
    """Say what a table lacks that exists: columns, indexes, CHECKs."""
    names = inspector.dialect.identifier_preparer
    checks = [each for each in table.constraints if isinstance(each, sa.CheckConstraint)]
    for what, wanted, found in (
        ("column", map(names.format_column, table.columns), inspector.get_columns),
        ("index", map(names.format_index, table.indexes), inspector.get_indexes),
        ("CHECK", map(names.format_constraint, checks), inspector.get_check_constraints),
    ):
        there = {names.quote(str(each["name"])) for each in found(table.name, table.schema)}
        if missing := sorted(name for name in wanted if name and name not in there):
            yield f"{table.fullname} has no {what} {', '.join(missing)}"
