"""The command line: ``flask bq …``."""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
import typing as t

import click
import sqlalchemy as sa
from flask import Flask
from flask.cli import AppGroup, NoAppException
from flask.logging import default_handler

from .arguments import ArgumentError
from .claim import this_app
from .config import ConfigError
from .connection import SetupError, connect
from .errors import reason, sqlstate
from .extension import BeanQueue
from .fanout import Fanout
from .listen import Source
from .log import log
from .queries import application_name
from .registry import import_packages
from .reloader import run_again
from .supervisor import Place, Supervisor
from .worker import Worker, WorkerDied

#: Error codes of PostgreSQL.
UNDEFINED_SCHEMA = "3F000"
UNDEFINED_TABLE = "42P01"
UNDEFINED_COLUMN = "42703"
DENIED = "42501"

#: How to install a driver, by its module.
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary"}


class Group(AppGroup):
    """Commands that say in words why the app cannot be loaded, if it is its database's URL."""

    def invoke(self, ctx: click.Context) -> t.Any:
        try:
            return super().invoke(ctx)
        except (NoAppException, ImportError, sa.exc.ArgumentError, ValueError) as error:
            if (words := why_no_engine(error)) is None:
                raise
            raise click.ClickException(words) from error


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


bq_cli = Group("bq", help="Run workers and make tasks.")


def current() -> tuple[Flask, BeanQueue]:
    """Return the app, and its queue.

    :raises click.ClickException: if it has none.
    """
    app = this_app()
    if "beanqueue" not in app.extensions:
        raise click.ClickException("This app has no BeanQueue. Call bq.init_app(app) for it.")
    return app, app.extensions["beanqueue"]


@bq_cli.command("worker")
@click.argument("channels", nargs=-1, metavar="[CHANNEL]...")
@click.option(
    "-c",
    "--concurrency",
    type=click.IntRange(min=1),
    help="Run N tasks at once in each process, in threads.  [default: BQ_CONCURRENCY]",
    metavar="N",
)
@click.option(
    "-p",
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Start N worker processes and replace those that die.",
    metavar="N",
)
@click.option("--burst", is_flag=True, help="Do what is due now, then exit.")
@click.option(
    "--name",
    help="What logs and the table of workers call it.  [default: HOST-PID]",
    metavar="NAME",
)
@click.option("--reload", "reloads", is_flag=True, help="Start again when code changes.")
@click.option("-v", "--verbose", is_flag=True, help="Log each task as it starts and ends.")
def worker_command(
    channels: tuple[str, ...],
    concurrency: int | None,
    processes: int,
    burst: bool,
    name: str | None,
    reloads: bool,
    verbose: bool,
) -> None:
    """Do the tasks that wait in the given channels.

    Without a CHANNEL, do those of every channel that a processor of this app names. The worker
    runs until it gets SIGTERM or SIGINT (Ctrl-C), or its terminal is closed. It then claims no
    more, gives the running tasks BQ_SHUTDOWN_TIMEOUT seconds to end, gives back what is left, and
    exits with 0. SIGQUIT, or Ctrl-C again, makes it leave at once.

    \b
    Examples:
      flask bq worker
      flask bq worker images mails --concurrency 8
      flask bq worker --processes 2 --burst
    """
    app, bq = current()
    log_to_stderr(verbose)

    def make(place: Place | None = None, source: Source | None = None) -> Worker:
        own = f"{name}-{place.number + 1}" if name and place else name
        try:
            worker = bq.worker(
                channels,
                app=app,
                concurrency=concurrency,
                burst=burst,
                name=own,
                source=source,
                watched=True,
            )
            if place is not None:
                worker.takes_place(place.worker_id, place.predecessors)
            return worker
        except (RuntimeError, ValueError) as error:
            raise click.ClickException(str(error)) from error

    def run(worker: Worker, *, forked: bool = False) -> int:
        from multiprocessing import active_children  # which takes a web process time to import

        before = active_children()
        try:
            worker.run()
        except WorkerDied as error:
            log.error("%s", error)
            return 1
        finally:
            if worker.running:  # and waits for its children, perhaps, as Python would at its end
                for child in set(active_children()) - set(before):
                    if forked or not child.daemon:  # at its end, Python terminates daemons itself
                        child.terminate()
        return 0

    def work(place: Place, source: Source) -> int:
        forget_connections(app, bq)
        try:
            with readable_errors():
                return run(make(place, source), forked=True)
        except click.ClickException as error:
            error.show()
            return error.exit_code

    with readable_errors():
        if reloads:
            run_again(app, bq.config(app).SHUTDOWN_TIMEOUT)
            code = 0
        elif processes > 1:
            # What is wrong is said once, not once in each process.
            worker = make()
            with contextlib.closing(connect(worker.engine)) as connection:
                bq.queries.check_tables(connection)
            code = supervise(worker, work, processes)
        else:
            code = run(make())
    if code:
        raise click.exceptions.Exit(code)


def supervise(worker: Worker, work: t.Callable[[Place, Source], int], processes: int) -> int:
    """Run several processes, for all of which this one LISTENs.

    :param worker: what they will be like.
    :param work: what each does, given its place and what tells it of news.
    """
    listener = worker.listener(application_name("listener"))
    with contextlib.closing(Fanout(listener, processes)) as fanout:
        return Supervisor(
            lambda place: work(place, fanout.subscription(place.number)),
            processes,
            replaces=not worker.burst,
            source=fanout if worker.config.LISTEN else None,
        ).run()


def forget_connections(app: Flask, bq: BeanQueue) -> None:
    """Connections do not survive a fork; they stay the parent's, who closes them."""
    with app.app_context():
        for engine in bq.db.engines.values():
            engine.dispose(close=False)


@bq_cli.command("create-tables")
def create_tables_command() -> None:
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
        bq.queries.lock_tables(connection)
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


@bq_cli.command("submit")
@click.argument("channel")
@click.argument("module")
@click.argument("func", metavar="FUNC")
@click.option(
    "-k",
    "--kwargs",
    default="{}",
    help="The task's arguments, as a JSON object.  [default: {}]",
    metavar="JSON",
)
@click.option(
    "--priority",
    type=int,
    default=0,
    show_default=True,
    help="The smaller comes first: -5 before 0.",
)
def submit_command(channel: str, module: str, func: str, kwargs: str, priority: int) -> None:
    """Make a task and print its id.

    The processor FUNC of MODULE does it. CHANNEL is where it waits; it may be another than the
    processor's own, if a worker takes tasks from it.

    \b
    Example:
      flask bq submit images my_app.processors resize_image -k '{"width": 200}'
    """
    app, bq = current()
    try:
        arguments = json.loads(kwargs)
    except ValueError as error:
        raise click.BadParameter(f"This is not JSON: {error}.", param_hint="'--kwargs'") from None
    except RecursionError:
        raise click.BadParameter("This is nested too deeply.", param_hint="'--kwargs'") from None
    if not isinstance(arguments, dict):
        raise click.BadParameter(
            'This is no JSON object, such as {"width": 200}.', param_hint="'--kwargs'"
        )
    with readable_errors():
        import_packages(bq.config(app).PROCESSOR_PACKAGES)
    processor = bq.registry.get(module, func)
    if processor is None:
        known = "".join(f"\n  {each.module} {each.func_name}" for each in bq.registry)
        raise click.ClickException(
            f"No processor {module} {func} is registered in this app."
            + (f" There are:{known}" if known else " There is none at all.")
            + "\nImport its module in the app factory, or name it in BQ_PROCESSOR_PACKAGES."
        )
    try:
        task = processor.using(channel=channel, priority=priority).enqueue(**arguments)
    except (ArgumentError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if channel not in bq.registry.channels:
        click.echo(f"No processor has {channel!r} as its channel; is it spelt right?", err=True)
    task_id = task.id
    with readable_errors("GRANT INSERT on it"):
        bq.db.session.commit()
    click.echo(task_id)


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


def log_to_stderr(verbose: bool) -> None:
    """Show the queue's log, unless the app has set logging up; the root logger is left alone."""
    if log.level == logging.NOTSET or verbose:
        log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not log.hasHandlers():
        log.addHandler(default_handler)
