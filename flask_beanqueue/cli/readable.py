"""Errors in words that say what to change."""

from __future__ import annotations

import contextlib
import traceback
import typing as t

import click
import sqlalchemy as sa
from flask import Flask
from flask.cli import NoAppException

from ..current import this_app
from ..engine.database import reason, sqlstate
from ..exceptions import ConfigError, SetupError
from ..extension import BeanQueue

#: Error codes of PostgreSQL.
UNDEFINED_SCHEMA = "3F000"
UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"
DENIED = "42501"

#: How to install a driver, by its module.
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}


def why_no_engine(error: BaseException) -> str | None:
    """Say why an engine could not be made, if that is what an error is about. The app makes its
    engines before the queue is there to look at them."""
    if isinstance(error, NoAppException):  # which Flask makes of an ImportError
        error = error.__context__ or error
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    where = frame.f_globals["__name__"]
    if isinstance(error, sa.exc.NoSuchModuleError) or where == "sqlalchemy.engine.url":
        return (  # without the URL, which may hold a password
            "The database's URL cannot be used by SQLAlchemy. Let it begin with"
            " postgresql+psycopg2:// (and not with postgres://), or with postgresql+psycopg:// for"
            " psycopg 3, as in postgresql+psycopg2://user@host/name."
        )
    driver = (getattr(error, "name", None) or where).partition(".")[0]
    if isinstance(error, ImportError) and driver in DRIVERS:
        return (
            f"The database's driver, {driver}, cannot be imported ({reason(error)}). Install it"
            f" with pip install {DRIVERS[driver]}, or name the other one in the URL:"
            " postgresql+psycopg2:// or, for psycopg 3, postgresql+psycopg://."
        )
    return None


def current() -> tuple[Flask, BeanQueue]:
    """Return the app, and its queue.

    :raises click.ClickException: if it has none.
    """
    app = this_app()
    if "beanqueue" not in app.extensions:
        raise click.ClickException("This app has no BeanQueue. Call bq.init_app(app) for it.")
    return app, app.extensions["beanqueue"]


@contextlib.contextmanager
def readable_errors(
    grant: str = "GRANT SELECT, INSERT and UPDATE on the queue's tables",
    *,
    of_schema: str = "GRANT USAGE on it",
) -> t.Iterator[None]:
    """Turn what commonly goes wrong into a sentence.

    :param grant: what the owner of a table must do if the role lacks rights.
    :param of_schema: what the owner of a schema must do.
    """
    try:
        yield
    except sa.exc.ProgrammingError as error:
        problem = str(error.orig).splitlines()[0]
        code = sqlstate(error)
        if code in (UNDEFINED_SCHEMA, UNDEFINED_TABLE) and ask(sa.func.current_schema()) is None:
            # What is in a schema that the role may not use is not there for it.
            message = (
                f"{problem}. Let the owner of its schema {of_schema} to {current_role()}, or let"
                " the role's search_path name a schema that is there."
            )
        elif code == UNDEFINED_SCHEMA:
            message = f"{problem}. Create it first: CREATE SCHEMA …"
        elif code == UNDEFINED_TABLE:
            message = (
                f"{problem}. Create the queue's tables with `flask bq create-tables`, or with a"
                " migration."
            )
        elif code == UNDEFINED_COLUMN:
            message = (
                f"The table is older than this release: {problem}. Change it with a migration"
                " (Flask-Migrate), or drop it if it holds nothing of worth."
            )
        elif code == DENIED:
            what = of_schema if "schema" in problem else grant
            message = f"{problem}. Let its owner {what} to {current_role()}."
        elif error.statement is None:  # the driver takes no such URL
            message = f"The database cannot be used: {reason(error)}"
        else:  # as a trigger's own error, which psycopg 3 counts among these and psycopg2 does not
            message = f"The database refuses this: {reason(error)}"
        raise click.ClickException(message) from error
    except SetupError as error:
        raise click.ClickException(str(error)) from error
    except sa.exc.OperationalError as error:
        raise click.ClickException(f"The database cannot be used: {reason(error)}") from error
    except sa.exc.DBAPIError as error:
        raise click.ClickException(f"The database refuses this: {reason(error)}") from error
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def current_role() -> str:
    """Who this app is in its database: the URL need not say so."""
    return str(ask(sa.func.current_user()))


def ask(function: t.Any) -> t.Any:
    """What a function of the app's database answers."""
    app, bq = current()
    with bq.engine(app).connect() as connection:
        connection.detach()  # from the pool, which nobody closes
        return connection.scalar(function)
