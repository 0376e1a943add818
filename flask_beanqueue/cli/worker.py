"""``flask bq worker``."""

from __future__ import annotations

import contextlib
import logging
import typing as t

import click
from flask import Flask
from flask.cli import with_appcontext
from flask.logging import default_handler

from ..engine.checks import check_tables
from ..engine.connection import application_name, connect
from ..engine.listener import Source
from ..engine.worker import Worker
from ..exceptions import WorkerDied
from ..extension import BeanQueue
from ..log import log
from ..processes.fanout import Fanout
from ..processes.reloader import run_again
from ..processes.supervisor import Place, Supervisor
from .readable import current, readable_errors


@click.command("worker")
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
@with_appcontext
def command(
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
                worker.take_place(place.worker_id, place.predecessors)
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
                check_tables(connection, bq.models)
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
    """Connections do not survive a fork; they stay the parent's, which closes them."""
    with app.app_context():
        for engine in bq.db.engines.values():
            engine.dispose(close=False)


def log_to_stderr(verbose: bool) -> None:
    """Show the queue's log, unless the app has set logging up; the root logger is left alone."""
    if log.level == logging.NOTSET or verbose:
        log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not log.hasHandlers():
        log.addHandler(default_handler)
