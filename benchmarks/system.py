"""What is measured: one queue, with one setting."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import psycopg2

#: The kinds of tasks. ``nothing`` tells the tally that it runs, and returns; ``write`` does so too,
#: after it has written a row of ``bench_rows`` in a transaction, as the system's documents advise;
#: ``session`` writes it through Flask-SQLAlchemy's session in an app context, whatever the system
#: (:mod:`benchmarks.plain`), or through the session that the system hands its tasks, which is then
#: its ``write``; ``mark`` tells when it runs; ``wait``, which only this queue has, sleeps for 5 ms.
KINDS = ("nothing", "write", "session", "mark", "wait")

#: The table that tasks write to.
ROWS = "CREATE TABLE bench_rows (id serial PRIMARY KEY, number int NOT NULL)"


class System:
    """One queue with one setting, its worker in processes of its own.

    :param settings: what differs from the defaults, in words; empty if nothing does.
    :param processes: how many workers run.
    """

    name: ClassVar[str]
    #: Where it keeps its tasks.
    store: ClassVar[str] = "PostgreSQL"

    def __init__(self, settings: str = "", *, processes: int = 1, **options: object) -> None:
        self.settings = settings
        self.processes = processes
        self.options = options

    def __str__(self) -> str:
        return f"{self.name} ({self.settings})" if self.settings else self.name

    def clean(self) -> None:
        """Make everything as new: no tasks, no rows, no statistics of another run."""
        raise NotImplementedError

    def fill(self, kind: str, number: int) -> None:
        """Enqueue tasks numbered from 0, by the fastest way it has. Not measured."""
        raise NotImplementedError

    def enqueue(self, kind: str, number: int) -> float | None:
        """Enqueue one task and return when it is safely stored, as a web request would.

        :return: when the commit began, on the monotonic clock, where there is one to tell of.
        """
        raise NotImplementedError

    def start(self) -> subprocess.Popen[bytes]:
        """Start a worker."""
        raise NotImplementedError

    def start_all(self) -> list[subprocess.Popen[bytes]]:
        return [self.start() for _ in range(self.processes)]

    def left(self) -> int | None:
        """How many tasks are not done, by its own books; None if they do not tell."""
        return None


def run(module: str, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start Python with a module, quietly, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if "BENCH_VERBOSE" not in os.environ else None,
        process_group=0,
    )


def dsn(address: str | None = None) -> str:
    """The address of the database, as psycopg2 and psycopg 3 take it."""
    import sqlalchemy as sa

    url = sa.make_url(address or os.environ["DATABASE_URL"]).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def execute(*statements: str) -> list[tuple[object, ...]]:
    """Execute statements in autocommit; return the rows of the last one, if it has any."""
    connection = psycopg2.connect(dsn())
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def clean_database() -> None:
    """Drop everything in the database, and make the table that tasks write to."""
    execute(
        """
        DO $$
        DECLARE name text;
        BEGIN
            FOR name IN SELECT nspname FROM pg_namespace
                WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
            LOOP
                EXECUTE format('DROP SCHEMA %I CASCADE', name);
            END LOOP;
            CREATE SCHEMA public;
        END $$
        """,
        ROWS,
    )


def settle_database() -> None:
    """Let nothing of the filling be left to do while it is measured."""
    execute("ANALYZE", "CHECKPOINT")
