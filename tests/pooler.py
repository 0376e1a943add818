"""PgBouncer before the test's PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import sqlalchemy as sa

SETTINGS = """
[databases]
* = host={host} port={port}
[pgbouncer]
unix_socket_dir = {folder}
listen_port = 6432
auth_type = trust
auth_file = {folder}/users
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
"""


def installed() -> str | None:
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@contextlib.contextmanager
def pooler(url: str, *, mode: str = "transaction", size: int = 10) -> Iterator[str]:
    """Run PgBouncer before a database, and give the URL that leads through it.

    :param url: the database.
    :param mode: for how long a client keeps a backend.
    :param size: how many backends there are.
    """
    server = sa.make_url(url)
    host, port = server.host or server.query["host"], server.port or 5432
    command = installed()
    assert command
    with tempfile.TemporaryDirectory(prefix="pooler-", dir="/tmp") as folder:
        settings = Path(folder, "settings")
        settings.write_text(
            SETTINGS.format(host=host, port=port, folder=folder, mode=mode, size=size)
        )
        Path(folder, "users").write_text(f'"{server.username}" ""\n')
        user: dict[str, int] = {}
        if os.geteuid() == 0:  # as which it refuses to run
            user = {"user": pwd.getpwnam("nobody")[2]}
            for path in (folder, *Path(folder).iterdir()):
                os.chown(path, user["user"], -1)
        with Path(folder, "log").open("wb") as log:
            process = subprocess.Popen(
                [command, str(settings)], stdout=log, stderr=log, start_new_session=True, **user
            )
        try:
            through = server.set(host=None, port=None).update_query_dict(
                {"host": folder, "port": "6432"}
            )
            _wait_for(through, process, Path(folder, "log"))
            yield through.render_as_string(hide_password=False)
        finally:
            process.kill()
            process.wait()


def _wait_for(url: sa.URL, process: subprocess.Popen[bytes], log: Path) -> None:
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(dsn).close()
            return
        time.sleep(0.02)
    raise RuntimeError(f"PgBouncer did not start:\n{log.read_text()}")
