"""The faults that production brings."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2

from .. import postgres
from ..pooler import installed as pooler_installed
from ..pooler import pooler
from ..processes import READY
from . import network
from .failpoint import POINTS
from .ledger import cursor
from .trial import Place, Scenario, Trial

SCENARIOS: dict[str, Scenario] = {}

#: Bytes by which a worker's address space can grow once it has loaded its app, half of them for
#: its threads' stacks; and by which its memory may.
ROOM, MOST_MEMORY = 120 * 2**20, 60 * 2**20
#: Tasks with few arguments that come before those with many.
SMALL = 4000
#: Tasks that fail while no NOTIFY can be sent.
STUMBLING = 50


class NotHere(Exception):
    """A scenario needs what this machine does not have."""


def dsn(url: str) -> str:
    return url.replace("postgresql+psycopg2:", "postgresql:")


@contextlib.contextmanager
def plain(*settings: str) -> Iterator[Place]:
    """A PostgreSQL by its socket."""
    with postgres.running(settings=settings) as server:
        yield Place(server, server.url, server.url, dsn(server.url))


def scenario(name: str, place: Any = plain, **options: Any) -> Callable[[Any], Any]:
    def register(inject: Callable[[Trial], None]) -> Callable[[Trial], None]:
        SCENARIOS[name] = Scenario(name, inject, place, **options)
        return inject

    return register


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def apart() -> Iterator[Place]:
    """Workers on a machine of their own, whose network can be cut."""
    if reason := network.missing():
        raise NotHere(reason)
    with network.network() as net:
        port = free_port()
        settings = [f"listen_addresses={network.HOST}"]
        with postgres.running(settings=settings, port=port) as server:
            with (server.data / "pg_hba.conf").open("a") as access:
                access.write(f"host all all {network.NETWORK} trust\n")
            server.execute("SELECT pg_reload_conf()")
            url = f"postgresql+psycopg2://postgres@{network.HOST}:{port}/postgres"
            yield Place(server, url, server.url, dsn(server.url), net.prefix, network=net)


@contextlib.contextmanager
def followed() -> Iterator[Place]:
    """A primary with a synchronous standby. All know both."""
    ports = free_port(), free_port()
    with (
        postgres.running(port=ports[0]) as primary,
        postgres.standby(primary, ports[1], "second") as second,
    ):
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = 'second'")
        primary.execute("SELECT pg_reload_conf()")
        hosts = "&".join(f"host=127.0.0.1:{port}" for port in ports)
        query = f"{hosts}&target_session_attrs=read-write"
        url = f"postgresql+psycopg2://postgres@/postgres?{query}"
        books = (
            f"host=127.0.0.1,127.0.0.1 port={ports[0]},{ports[1]} user=postgres dbname=postgres"
            " target_session_attrs=read-write"
        )
        yield Place(primary, url, url, books, second=second)


@contextlib.contextmanager
def pooled() -> Iterator[Place]:
    """PgBouncer in transaction mode before everybody. Workers LISTEN past it."""
    if pooler_installed() is None:
        raise NotHere("there is no PgBouncer")
    with postgres.running() as server, pooler(server.url) as url:
        yield Place(server, url, url, dsn(server.url), env={"BQ_LISTEN_DATABASE_URL": server.url})


#: What lets a process have a clock of its own, in the folder of this machine's own libraries.
FAKETIME = Path(
    "/usr/lib", sysconfig.get_config_var("MULTIARCH") or "", "faketime/libfaketimeMT.so.1"
)


@contextlib.contextmanager
def other_clock() -> Iterator[Place]:
    """The first worker's clock is an hour slow, the second's an hour fast."""
    if not FAKETIME.exists():
        raise NotHere("there is no libfaketime")
    with plain() as place:
        clock = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        place.each_env = [clock | {"FAKETIME": "-1h"}, clock | {"FAKETIME": "+1h"}]
        yield place


# The database.


@scenario("PostgreSQL crashes")
def crash_postgres(trial: Trial) -> None:
    """It is stopped with ``-m immediate`` and is away for a second, twice."""
    for _ in trial.every(3, 2):
        trial.server.stop(signal.SIGQUIT)
        try:
            trial.execute("SELECT")
        except psycopg2.OperationalError:
            trial.fault(1)
        else:
            trial.fault(0)
        time.sleep(1)
        trial.server.start()


#: Backends of the workers and of the shop.
OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"""


def end_backends(trial: Trial, which: str = "true") -> None:
    with cursor(trial.place.dsn) as database:
        database.execute(f"{OTHERS} AND {which}")
        trial.fault(sum(ended for (ended,) in database))


@scenario("all backends killed, once")
def kill_backends(trial: Trial) -> None:
    end_backends(trial)


@scenario("all backends killed, each second")
def kill_backends_again(trial: Trial) -> None:
    """For a minute."""
    for _ in trial.every(1, 60):
        end_backends(trial)


@scenario("LISTEN connections killed, each second")
def kill_listeners(trial: Trial) -> None:
    for _ in trial.every(1, 10):
        end_backends(trial, "query LIKE 'LISTEN%'")


@scenario("no connection left", lambda: plain("max_connections=30"))
def use_up_connections(trial: Trial) -> None:
    """Others take each connection there is, also those that workers and shop have had."""
    with contextlib.ExitStack() as taken:
        keeper = psycopg2.connect(trial.place.dsn)
        keeper.autocommit = True
        taken.callback(keeper.close)
        own: list[int] = [keeper.info.backend_pid]
        for _ in trial.every(0.5, 10):
            keeper.cursor().execute(f"{OTHERS} AND NOT pid = ANY (%s)", (own,))
            try:
                while True:
                    another = psycopg2.connect(trial.place.dsn)
                    taken.callback(another.close)
                    own.append(another.info.backend_pid)
            except psycopg2.OperationalError as error:
                trial.fault("too many clients" in str(error))


@scenario("a database that is read-only for four seconds, twice")
def allow_no_writes(trial: Trial) -> None:
    """Each transaction that begins meanwhile may only read."""
    for _ in trial.every(3, 2):
        with contextlib.ExitStack() as undoing:
            undoing.callback(trial.execute, "SELECT pg_reload_conf()")
            undoing.callback(trial.execute, "ALTER SYSTEM RESET default_transaction_read_only")
            trial.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            trial.execute("SELECT pg_reload_conf()")
            time.sleep(4)
            lately = "SELECT FROM shipment WHERE at > now() - interval '2 seconds'"
            trial.fault(trial.execute(lately) == 0)


@scenario("a NOTIFY queue that is full", lambda: plain("max_notify_queue_pages=64"))
def fill_notify_queue(trial: Trial) -> None:
    """Twice. Tasks fail meanwhile, and are to be tried again: of each, one NOTIFY is refused. So
    are sales, as documented."""
    stumbling = "SELECT count(*) FROM bq_tasks WHERE func_name = 'stumble'"
    for _ in trial.every(2, 2):
        refused = len(trial.ledger.refused)
        with contextlib.ExitStack() as open_connections:
            lazy = psycopg2.connect(trial.place.dsn)
            open_connections.callback(lazy.close)
            lazy.cursor().execute("LISTEN filled")
            lazy.commit()
            lazy.cursor().execute("SELECT")  # in a transaction, so it takes no notifications
            with cursor(trial.place.dsn) as database, contextlib.suppress(psycopg2.Error):
                while True:
                    database.execute("SELECT pg_notify('filled', repeat('x', 7900) || random())")
            trial.add("stumble", STUMBLING)
            trial.sees(lambda: trial.ask(f"{stumbling} AND attempts = 0") == 0)
            full = trial.ask("SELECT pg_notification_queue_usage() > 0.9")
            trial.fault(full and len(trial.ledger.refused) > refused)
        # To ask for it also takes out what everybody has read.
        trial.sees(lambda: trial.ask("SELECT pg_notification_queue_usage()") < 0.1)
    noted = trial.ask("SELECT count(*) FROM bq_events WHERE type = 'RETRIED'")
    if noted != (count := trial.ask(stumbling)):
        trial.broken.append(f"{noted} retries noted of {count}")


@scenario("a copy of the database on the same server")
def copy_database(trial: Trial) -> None:
    """As staging gets it from production, with a worker, to which the original's look dead. Nothing
    of the original may be interrupted."""
    here = trial.ledger.folder / "copy"
    here.mkdir()
    with postgres.database(trial.server.url) as url:
        system = type(trial.system)(url)
        system.create()
        system.close()
        with cursor(trial.place.dsn) as original, cursor(dsn(url)) as copy:
            for table, which in {"bq_workers": "true", "bq_tasks": "state = 'PROCESSING'"}.items():
                rows = io.BytesIO()
                original.copy_expert(f"COPY (SELECT * FROM {table} WHERE {which}) TO STDOUT", rows)
                rows.seek(0)
                copy.copy_expert(f"COPY {table} FROM STDIN", rows)
        worker = trial.start(0, DATABASE_URL=url, CHAOS_FOLDER=str(here))
        try:
            worker.wait_line(READY)
            trial.sees(lambda: trial.system.dead(dsn(url)) == len(trial.workers))
            trial.fault(trial.system.dead(dsn(url)), of=len(trial.workers))
            time.sleep(4 if trial.hasty else 15)  # it looks again after each timeout
            if code := worker.stop():
                trial.broken.append(f"the copy's worker left with {code}")
        finally:
            worker.clean_up()
    if interrupted := trial.ask("SELECT count(*) FROM bq_tasks WHERE interruptions > 0"):
        trial.broken.append(f"{interrupted} tasks of the original were interrupted")
    if failures := sum(worker.output.count("The database fails") for worker in trial.workers):
        trial.broken.append(f"workers of the original lost their connections: {failures}")


# The workers.


@scenario("a worker killed, once", codes=[-9])
def kill_worker(trial: Trial, number: int = 0) -> None:
    worker = trial.workers[number]
    worker.send(signal.SIGKILL)
    trial.fault(worker.wait() == -signal.SIGKILL)


@scenario("a worker killed, every two seconds", codes=[-9])
def kill_workers(trial: Trial) -> None:
    for each in trial.every(2, 10):
        kill_worker(trial, each % len(trial.workers))


@scenario("a process of two killed, every two seconds", workers=1, processes=2)
def kill_processes(trial: Trial) -> None:
    """Their parent sees it."""
    import psutil

    for each in trial.every(2, 10):
        children = psutil.Process(trial.workers[0].pid).children()
        child = children[each % len(children)]
        child.kill()
        gone, _ = psutil.wait_procs([child], timeout=10)
        trial.fault(len(gone))


@scenario(
    "workers that kill themselves in claim, task, flush and commit",
    codes=[-9],
    env={"CHAOS_FAIL_AT": "each"},
)
def fail_at_points(trial: Trial) -> None:
    """Until it has happened at each point; in a hurry, only for a while."""

    def by_point() -> collections.Counter[str]:
        return collections.Counter(
            line.removeprefix("Killed at: ")
            for output in trial.watch.outputs
            for line in output.splitlines()
            if line.startswith("Killed at: ")
        )

    time.sleep(5 if trial.hasty else 20)
    if not trial.hasty and not trial.sees(lambda: by_point().keys() == POINTS.keys()):
        never = POINTS.keys() - by_point().keys()
        trial.broken.append(f"no worker was killed at: {', '.join(sorted(never))}")
    (trial.ledger.folder / "calm").touch()
    time.sleep(0.2)
    killed = by_point()
    trial.fault(killed.total())
    trial.remarks += [", ".join(f"{count} at {point}" for point, count in killed.items())]


def hang(trial: Trial, func_name: str) -> None:
    """Have a task done that hangs its process, and see it FAILED in the end. Then its row goes from
    the books; there, it would count as unfinished."""
    trial.add(func_name)
    failed = f"func_name = '{func_name}' AND state = 'FAILED' AND crashes = 3 AND attempts = 0"
    trial.sees(lambda: trial.ask(f"SELECT count(*) FROM bq_tasks WHERE {failed}") == 1)
    trial.execute(f"DELETE FROM bq_tasks WHERE {failed}")
    # The watchdog says where, and the parent that it has ended a process.
    said, there = trial.workers[0].output, f" in {func_name}\n"
    trial.fault(min(said.count(there), said.count("a new one takes its place")), of=3)


@scenario("a task hangs its process, in a regular expression", workers=1, processes=2)
def hang_in_python(trial: Trial) -> None:
    hang(trial, "backtrack")


@scenario("a task hangs its process, in a C function", workers=1, processes=2)
def hang_in_c(trial: Trial) -> None:
    hang(trial, "sleep_in_c")


@scenario(
    "claims of large arguments under a memory limit",
    # One arena, or each thread's would take 64 MB of addresses.
    env={"CHAOS_ROOM": str(ROOM), "MALLOC_ARENA_MAX": "1"},
)
def claim_much(trial: Trial) -> None:
    """Some hundred tasks have a megabyte of arguments each. They come after others that have few
    and take no time, of which a worker claims a thousand at once."""
    import psutil

    def memory() -> int:
        return max(psutil.Process(worker.pid).memory_info().rss for worker in trial.workers)

    before = most = memory()
    count = 200 if trial.hasty else 600
    size = f"CASE WHEN number <= {SMALL} THEN 1 ELSE 1000000 END"
    trial.add("measure", SMALL + count, f"jsonb_build_object('value', repeat('x', {size}))")
    measures = "SELECT count(*) FROM bq_tasks WHERE func_name = 'measure'"

    def are_done() -> bool:
        nonlocal most
        most = max(most, memory())
        return bool(trial.ask(f"{measures} AND state <> 'DONE'") == 0)

    trial.sees(are_done)
    trial.fault(trial.ask(f"{measures} AND claims > 0 AND pg_column_size(kwargs) > 1000"), of=count)
    if most - before > MOST_MEMORY:
        trial.broken.append(f"a worker's memory has grown by more than {MOST_MEMORY >> 20} MB")
    trial.remarks.append(f"at most {most >> 20} MB of memory, {before >> 20} before")


def freeze_worker(trial: Trial, number: int) -> None:
    """Until it has been declared dead, and others have had the time to do what it held."""
    worker, dead = trial.workers[number], trial.dead
    worker.freeze()
    trial.fault(trial.sees(lambda: trial.dead > dead))
    time.sleep(2)
    worker.thaw()


@scenario("a worker frozen and woken, in turn", codes=[1], env={"BQ_WATCHDOG": "false"})
def freeze_workers(trial: Trial) -> None:
    for each in trial.every(1, 6):
        freeze_worker(trial, each % len(trial.workers))


@scenario("rolling restart of four workers", workers=4, codes=[0])
def restart_workers(trial: Trial) -> None:
    """A deploy, twice: the next one is stopped when the one before is back."""
    for each in trial.every(0.5, 8):
        number = each % len(trial.workers)
        before = trial.workers[number]
        before.send(signal.SIGTERM)
        trial.fault(before.wait() == 0)
        trial.wait_for_next(number, before).wait_line(READY)
    with cursor(trial.place.dsn) as database:
        database.execute("SELECT count(*) FROM bq_tasks WHERE attempts > 1 OR crashes > 0")
        [(count,)] = database
    if count:
        trial.broken.append(f"{count} tasks have an attempt or a crash counted for it")


# What lies between, and around.


@scenario("network cut", apart)
def cut_network(trial: Trial) -> None:
    """For longer than the heartbeat timeout, twice. The first time, nobody else can take over."""
    net = trial.place.network
    assert net is not None
    for _ in trial.every(3, 2):
        net.cut()
        time.sleep(8)
        lately = "SELECT FROM shipment WHERE at > now() - interval '6 seconds'"
        trial.fault(trial.execute(lately) == 0)
        net.mend()


@scenario("fail-over to a synchronous standby", followed)
def fail_over(trial: Trial) -> None:
    assert trial.place.second is not None
    trial.server.stop(signal.SIGQUIT)
    time.sleep(1)
    trial.place.second.execute("SELECT pg_promote()")
    trial.fault(trial.sees(lambda: trial.execute("SELECT") == 1))  # where one can write


@scenario(
    "behind PgBouncer: workers killed and frozen, backends killed",
    pooled,
    codes=[-9, 1],
    env={"BQ_WATCHDOG": "false"},
)
def trouble_behind_a_pooler(trial: Trial) -> None:
    for each in trial.every(2, 6):
        number = each % len(trial.workers)
        if each % 3 == 0:
            freeze_worker(trial, number)
        elif each % 3 == 1:
            end_backends(trial)
        else:
            kill_worker(trial, number)


@scenario("clocks an hour off, one of two workers killed", other_clock, codes=[-9])
def kill_worker_with_another_clock(trial: Trial) -> None:
    # Letters bear the time of who posts them.
    off = {round((at - time.time()) / 3600) for _, at in trial.ledger.letters()}
    trial.fault(len(off & {-1, 1}), of=2)
    kill_worker(trial)


@scenario(
    "a busy machine", env={"BQ_WORKER_HEARTBEAT_PERIOD": "", "BQ_WORKER_HEARTBEAT_TIMEOUT": ""}
)
def be_busy(trial: Trial) -> None:
    """Eight processes for each core compute, for longer than the heartbeat timeout, which is the
    default here. No worker may be declared dead, or end by itself.

    ``CHAOS_BUSY_EACH`` has more processes for each core, ``CHAOS_BUSY_MINUTES`` lets it last."""
    number = int(os.environ.get("CHAOS_BUSY_EACH", "8")) * (os.cpu_count() or 1)
    seconds = 10.0 if trial.hasty else 40.0
    if minutes := os.environ.get("CHAOS_BUSY_MINUTES"):
        seconds = 60 * float(minutes)
    burn = "while True: sum(range(1000))"
    silence = 0.0
    processes = []
    with contextlib.ExitStack() as burning, cursor(trial.place.dsn) as database:
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", burn])
            processes.append(process)
            burning.callback(process.wait)
            burning.callback(process.kill)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            database.execute(
                "SELECT date_part('epoch', now() - min(last_heartbeat)) FROM bq_workers"
            )
            silence = max(silence, database.fetchone()[0])
            time.sleep(0.1)
        trial.fault(sum(process.poll() is None for process in processes), of=number)
    if trial.dead:
        trial.broken.append(f"{trial.dead} workers declared dead")
    trial.remarks.append(f"longest silence {silence:.1f} s of 20")
