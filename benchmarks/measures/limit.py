"""What PostgreSQL does at best on this machine, whoever asks."""

from __future__ import annotations

import re
import select
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.postgres import installed

from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System, clean_database, dsn
from ..systems.bare import connect
from ..systems.ours import FlaskBeanQueue

INSERT = "INSERT INTO bench_rows (number) VALUES (1)"
#: One task in its own transaction, as a hand-written enqueue would do it.
TASK = """
    INSERT INTO bq_tasks (channel, module, func_name, kwargs)
    VALUES ('bench', 'benchmarks.app', 'nothing', '{"number": 1}')
"""


def inserts(statement: str, seconds: float) -> Figures:
    """Transactions a second of one connection that each insert a row."""
    FlaskBeanQueue().clean()
    cursor = connect().cursor()
    return {"rate": rate(lambda: cursor.execute(statement), seconds)}


def rate(perform: Callable[[], Any], seconds: float) -> float:
    """How often something can be done in a second."""
    count, begun = 0, time.monotonic()
    while (now := time.monotonic()) < begun + seconds:
        perform()
        count += 1
    return count / (now - begun)


def commits(clients: int, seconds: float) -> Figures:
    """Transactions a second that each insert a row, as pgbench counts them."""
    clean_database()
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(f"{INSERT};\n")
        script.flush()
        done = subprocess.run(
            [
                *(pgbench(), "--no-vacuum", f"--client={clients}", f"--jobs={min(clients, 2)}"),
                *(f"--time={max(round(seconds), 1)}", f"--file={script.name}", dsn()),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    assert found, done.stdout
    return {"rate": float(found[1])}


def pgbench() -> str:
    ours = installed(18) / "bin" / "pgbench"
    return str(ours if ours.exists() else Path(shutil.which("pgbench") or "pgbench"))


def notify(seconds: float) -> Figures:
    """Seconds from a NOTIFY to its arrival at another connection."""
    speaker = connect().cursor()
    connection = connect()
    connection.cursor().execute("LISTEN bench")
    delays = []

    def once() -> None:
        begun = time.monotonic()
        speaker.execute("NOTIFY bench")
        while not connection.notifies:
            select.select([connection], [], [])
            connection.poll()
        delays.append(time.monotonic() - begun)
        connection.notifies.clear()

    rate(once, seconds)
    return {"p50": statistics.median(delays)}


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    def step(case: str, system: str, run: Callable[[], Figures]) -> Step:
        return Step("limit", case, system, run, sizes.bare + 0.5, rounds=1)

    for clients in (1, 4, 8):
        yield step(
            f"commits, clients {clients}",
            "pgbench",
            partial(commits, clients, sizes.bare),
        )
    yield step("rows", "psycopg2", lambda: inserts(INSERT, sizes.bare))
    yield step("tasks", "psycopg2", lambda: inserts(TASK, sizes.bare))
    yield step("NOTIFY", "psycopg2", lambda: notify(sizes.bare))
