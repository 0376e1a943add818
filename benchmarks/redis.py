"""A Redis for the systems that need one: nothing to set up, nothing left behind.

As a command, it runs another one with ``REDIS_URL`` set::

    python -m benchmarks.redis -- COMMAND [ARG ...]

A ``REDIS_URL`` that is set already is used as it is. Where there is no Redis to be had, the command
runs without. As a module, it has :func:`server`, and :class:`RedisSystem` with what the systems on
Redis have in common.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psycopg2
import redis

from .system import System, clean_database, dsn, settle_database


class RedisSystem(System):
    """A system whose tasks are in Redis, and whose rows are in PostgreSQL."""

    store: ClassVar[str] = "Redis"

    def clean(self) -> None:
        clean_database()
        with client() as connection:
            connection.flushall()
        settle_database()


def url() -> str:
    """The address of the Redis; the usual one if none is set, for those who only import."""
    return os.environ.get("REDIS_URL", "redis://")


def client() -> redis.Redis:
    return redis.Redis.from_url(url())


#: Asked for once: some systems fork for each task, and would ask each time.
_ADDRESS = dsn() if "DATABASE_URL" in os.environ else ""


class _Own(threading.local):
    connection: psycopg2.extensions.connection | None = None


_own = _Own()
os.register_at_fork(after_in_child=lambda: setattr(_own, "connection", None))


def write_row(number: int) -> None:
    """Write a row in a transaction, over a connection that each thread of a process keeps."""
    if _own.connection is None:
        _own.connection = psycopg2.connect(_ADDRESS)
    with _own.connection, _own.connection.cursor() as cursor:
        cursor.execute("INSERT INTO bench_rows (number) VALUES (%s)", (number,))


@contextlib.contextmanager
def server() -> Iterator[str | None]:
    """Run a Redis with its default settings and persistence on a Unix socket, and give its URL.

    None, if there is no Redis and none can be installed.
    """
    binary = _binary()
    if binary is None:
        print("There is no redis-server: the systems that need Redis are skipped.", file=sys.stderr)
        yield None
        return
    # Not TMPDIR: the path of a Unix socket has room for 107 bytes.
    with tempfile.TemporaryDirectory(prefix="redis-", dir="/tmp") as folder:
        socket = f"{folder}/socket"
        process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", socket, "--dir", folder],
            executable=binary,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the command; we stop the server after it.
            preexec_fn=_end_with_parent,
        )
        try:
            _wait(socket, process)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _binary() -> str | None:
    if found := shutil.which("redis-server"):
        return found
    if os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get"):
        # Not the package redis-server, which would start a service: the same program is in this
        # one, where it is a checker by its name and a server if it is called so.
        environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-qq", "--no-install-recommends", "redis-tools"]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=False)
    return shutil.which("redis-check-rdb")


def _end_with_parent() -> None:
    # On Linux, the kernel stops the server should we be killed (PR_SET_PDEATHSIG is 1).
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(socket: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(redis.ConnectionError):
            redis.Redis(unix_socket_path=socket).ping()
            return
        time.sleep(0.02)
    raise RuntimeError("Redis did not start.")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.redis",
        description="Run a command with REDIS_URL set, on a Redis of its own if need be.",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="put -- before it")
    command = parser.parse_args().command
    if os.environ.get("REDIS_URL"):
        os.execvp(command[0], command)
    # Ctrl-C reaches the command by the terminal, SIGTERM does so by us; both end it first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with server() as address:
        process = subprocess.Popen(
            command,
            env=os.environ | ({"REDIS_URL": address} if address else {}),
            preexec_fn=_as_before,
        )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        code = process.wait()
    return code if code >= 0 else 128 - code


def _as_before() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


if __name__ == "__main__":
    sys.exit(main())
