"""The faults that production brings."""

from __future__ import annotations

import collections
import contextlib
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
    default here. No worker may be declared dead."""
    number = 8 * (os.cpu_count() or 1)
    burn = "while True: sum(range(1000))"
    silence = 0.0
    processes = []
    with contextlib.ExitStack() as burning, cursor(trial.place.dsn) as database:
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", burn])
            processes.append(process)
            burning.callback(process.wait)
            burning.callback(process.kill)
        until = time.monotonic() + (10 if trial.hasty else 40)
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
