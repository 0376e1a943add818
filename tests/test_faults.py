"""Workers that freeze and die: real processes, real signals."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from flask import Flask

from .apps import faults
from .apps.faults import effects
from .probe import Probe, connect, query, wait_until
from .processes import HEARTBEAT, READY, ZOMBIE, Process, Processes, done_by_the_next

APP = faults.__name__

with_each_signal = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"]
)
#: To the process alone, or to its children as well.
Send = Callable[[Process, int], None]
sent_either_way = pytest.mark.parametrize("send", [Process.send, Process.send_all])


@pytest.fixture
def app(database_url: str, monkeypatch: pytest.MonkeyPatch, probe: Probe) -> Iterator[Flask]:
    monkeypatch.setenv("DATABASE_URL", database_url)
    with faults.context() as app:
        probe.listen_states()
        yield app


def rows(url: str, columns: str) -> list[Any]:
    return query(url, f"SELECT {columns} FROM bq_tasks ORDER BY id")


@pytest.fixture
def start(processes: Processes) -> Callable[[], Process]:
    """Start a worker that soon counts as dead, and soon finds others dead."""
    return lambda: processes.worker(APP, **ZOMBIE)


def pid(url: str) -> int:
    """The process that has the only task, by its name."""
    [(name,)] = query(url, "SELECT name FROM bq_workers AS w JOIN bq_tasks ON worker_id = w.id")
    return int(name.rpartition("-")[2])


@pytest.mark.parametrize(
    ("point", "task"), [*faults.STOPS, ("no session", "freeze_without_session")]
)
def test_a_frozen_worker_holds_nobody_up_and_leaves_no_trace(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process], point: str, task: str
) -> None:
    first = start()
    second = done_by_the_next(first.freeze, start, probe, point, getattr(faults, task))
    first.thaw()
    assert first.wait() == 1
    assert "declared dead" in first.output
    # Its connections were ended, so it may meet that before it meets the fence.
    assert re.search("no longer this worker's|is tried again|was in trouble", first.output)
    assert effects(database_url) == ([] if task == "freeze_without_session" else [task])
    [(state, claims, crashes, attempts)] = rows(database_url, "state, claims, crashes, attempts")
    assert (state, claims, crashes, attempts) == ("DONE", 2, 1, 1)
    assert second.stop() == 0


@pytest.mark.parametrize("task", ["freeze_before_half", "freeze_before_half_unflushed"])
def test_a_commit_halfway_of_a_frozen_worker_raises_and_leaves_nothing(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process], task: str
) -> None:
    first = start()
    done_by_the_next(first.freeze, start, probe, "before half", getattr(faults, task))
    first.thaw()
    probe.wait_until(lambda: any(each.startswith("commit raised") for each in probe.heard))
    assert first.wait() == 1
    assert effects(database_url) == ["first half", "second half"]


def test_what_a_frozen_worker_had_committed_halfway_is_there_twice(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process]
) -> None:
    first = start()
    done_by_the_next(first.freeze, start, probe, "after half", faults.freeze_after_half)
    first.thaw()
    assert first.wait() == 1
    assert effects(database_url) == ["first half", "first half", "second half"]


def test_a_killed_workers_task_is_done_by_another(
    app: Flask, database_url: str, probe: Probe, start: Callable[[], Process]
) -> None:
    done_by_the_next(start().kill, start, probe, "waiting mail", faults.wait, name="mail")
    assert effects(database_url) == ["mail"]
    assert rows(database_url, "state, claims, crashes, attempts") == [("DONE", 2, 1, 1)]
    assert query(database_url, "SELECT type, error_message FROM bq_events") == [
        ("CRASHED", "Its worker died (1 of 3 times).")
    ]


@pytest.mark.slow
def test_of_twenty_tasks_the_one_that_kills_its_worker_fails_and_the_others_get_done(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    for number in range(10):
        faults.number.enqueue(number=number)
    faults.killer.enqueue()
    for number in range(10, 19):
        faults.number.enqueue(number=number)
    faults.db.session.commit()
    for _ in range(3):
        worker = processes.worker(APP, "--concurrency", "20", **HEARTBEAT)
        assert worker.wait() == -9
    worker = processes.worker(APP, **HEARTBEAT)
    probe.wait("killer FAILED")
    probe.wait_until(lambda: probe.heard.count("number DONE") == 19)
    assert worker.stop() == 0
    assert sorted(map(int, effects(database_url))) == list(range(19))
    assert query(
        database_url,
        "SELECT func_name, crashes, error_message FROM bq_tasks WHERE state = 'FAILED'",
    ) == [
        (
            "killer",
            3,
            "Its worker died 3 times while it held this task. It will not be run again.",
        )
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_workers_do_ten_thousand_tasks_once_each(
    app: Flask, database_url: str, processes: Processes
) -> None:
    faults.number.enqueue_many({"number": number} for number in range(9_000))
    faults.nothing.enqueue_many({} for _ in range(1_000))
    faults.db.session.commit()
    worker = processes.flask("--app", APP, "bq", "worker", "--processes", "10", "--burst")
    assert worker.wait(timeout=300) == 0
    assert sorted(map(int, effects(database_url))) == list(range(9_000))
    assert query(database_url, "SELECT state, max(claims), count(*) FROM bq_tasks GROUP BY 1") == [
        ("DONE", 1, 10_000)
    ]
    [(workers,)] = query(database_url, "SELECT count(DISTINCT worker_id) FROM bq_tasks")
    assert workers > 1


@pytest.mark.parametrize(
    "how", ["UPDATE bq_workers SET state = 'NO_HEARTBEAT'", "DELETE FROM bq_workers"]
)
def test_a_worker_that_was_declared_dead_claims_no_more(
    app: Flask, database_url: str, probe: Probe, processes: Processes, how: str
) -> None:
    worker = processes.worker(APP, BQ_WORKER_HEARTBEAT_PERIOD=0.2)
    query(database_url, how)
    assert worker.wait() == 1
    worker.wait_line("or its row was deleted")
    faults.nothing.enqueue()
    faults.db.session.commit()
    assert rows(database_url, "state") == [("PENDING",)]


def test_a_task_whose_workers_row_is_gone_is_taken_over(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    query(
        database_url,
        "INSERT INTO bq_tasks (state, channel, module, func_name, claims)"
        " VALUES ('PROCESSING', 'faults', %s, 'nothing', 1)",
        faults.__name__,
    )
    processes.worker(APP)
    probe.wait("nothing DONE")


@with_each_signal
def test_a_signal_lets_running_tasks_end_and_gives_the_others_back(
    app: Flask, database_url: str, probe: Probe, processes: Processes, number: int
) -> None:
    worker = processes.worker(APP, "--concurrency", "1")
    with probe.paused("waiting one", faults.wait, name="one") as open_gate:
        faults.wait.enqueue(name="two")
        faults.db.session.commit()
        worker.send(number)
        worker.wait_line("stops")
        open_gate()
    assert worker.wait() == 0
    assert effects(database_url) == ["one"]
    assert rows(database_url, "state, attempts, crashes") == [("DONE", 1, 0), ("PENDING", 0, 0)]
    assert query(database_url, "SELECT state FROM bq_workers") == [("SHUTDOWN",)]


def test_after_the_grace_time_running_tasks_are_given_back_uncounted(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP, BQ_SHUTDOWN_TIMEOUT=0.1)
    with probe.paused("waiting long", faults.wait, name="long"):
        assert worker.stop() == 0
    assert effects(database_url) == []
    assert rows(database_url, "state, attempts, crashes, worker_id") == [("PENDING", 0, 0, None)]


def test_sigquit_does_not_wait_for_running_tasks(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP, BQ_SHUTDOWN_TIMEOUT=1000)
    with probe.paused("waiting long", faults.wait, name="long"):
        worker.send(signal.SIGTERM)
        worker.wait_line("stops")
        worker.send(signal.SIGQUIT)
        assert worker.wait() == 0
    assert rows(database_url, "state, attempts, crashes") == [("PENDING", 0, 0)]


def test_a_task_that_stops_its_own_worker_is_done_and_the_others_wait(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    with probe.gate("waiting long") as open_gate:
        faults.wait.enqueue(name="long")
        faults.db.session.commit()
        worker = processes.worker(APP, "--concurrency", "2")
        probe.wait("waiting long")
        faults.stop_worker.enqueue()
        faults.db.session.commit()
        worker.wait_line("stops")
        faults.nothing.enqueue()
        faults.db.session.commit()
        open_gate()
    assert worker.wait() == 0
    assert rows(database_url, "func_name, state, attempts, crashes") == [
        ("wait", "DONE", 1, 0),
        ("stop_worker", "DONE", 1, 0),
        ("nothing", "PENDING", 0, 0),
    ]


def test_sigterm_on_top_of_ctrl_c_does_not_cut_tasks_short(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP)
    with probe.paused("waiting one", faults.wait, name="one") as open_gate:
        worker.send(signal.SIGINT)
        worker.wait_line("stops")
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGTERM)
        open_gate()
    assert worker.wait() == 0
    assert effects(database_url) == ["one"]


@contextlib.contextmanager
def locked_row(url: str) -> Iterator[None]:
    """Keep all tasks that there are locked, as an open transaction that changed them would."""
    with contextlib.closing(connect(url)) as connection:
        connection.autocommit = False
        connection.cursor().execute("SELECT FROM bq_tasks FOR UPDATE")
        yield


def test_a_locked_row_stalls_no_other_task(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP)
    with (
        probe.paused("no session", faults.freeze_without_session) as open_gate,
        locked_row(database_url),
    ):
        open_gate()
        worker.wait_line("keeps its row locked")
        faults.nothing.enqueue()
        faults.db.session.commit()
        probe.wait("nothing DONE")
    probe.wait("freeze_without_session DONE")
    assert rows(database_url, "state, claims, attempts") == [("DONE", 1, 1)] * 2
    assert worker.stop() == 0


def test_a_worker_leaves_although_a_row_is_locked(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP, BQ_SHUTDOWN_TIMEOUT=0.5)
    with (
        probe.paused("no session", faults.freeze_without_session) as open_gate,
        locked_row(database_url),
    ):
        open_gate()
        worker.wait_line("keeps its row locked")
        assert worker.stop() == 0
        assert rows(database_url, "state, attempts") == [("PROCESSING", 0)]
    # The next worker does it again, and nobody has died of it.
    processes.worker(APP, **HEARTBEAT)
    probe.wait("freeze_without_session DONE")
    assert rows(database_url, "claims, attempts, crashes") == [(2, 1, 0)]


def test_a_worker_leaves_although_its_task_keeps_its_own_row_locked(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP, BQ_SHUTDOWN_TIMEOUT=0.1)
    with probe.paused("own row locked", faults.lock_own_row) as open_gate:
        assert worker.stop() == 0
        open_gate()
    processes.worker(APP, **HEARTBEAT)
    probe.wait("lock_own_row DONE")
    assert rows(database_url, "claims, attempts, crashes, priority") == [(2, 1, 0, 3)]


def test_claimed_tasks_that_cannot_start_soon_are_given_back(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    """A worker claims many short tasks ahead; a long one comes between; another worker does the
    rest."""
    worker = processes.worker(APP, "--concurrency", "1", "--name", "first")
    for number in range(20):  # the worker learns that tasks are short
        faults.number.enqueue(number=number)
    faults.db.session.commit()
    probe.wait_until(lambda: probe.heard.count("number DONE") == 20)
    with probe.gate("waiting long"):
        faults.wait.enqueue(name="long")
        faults.number.enqueue_many({"number": number} for number in range(20, 40))
        faults.db.session.commit()
        probe.wait("waiting long")
        processes.worker(APP, "--concurrency", "1", "--name", "second")
        probe.wait_until(lambda: probe.heard.count("number DONE") == 40)
    probe.wait("wait DONE")
    assert worker.stop() == 0


def terminate(url: str, database: str | None, statement: str = "") -> None:
    """End the workers' backends whose last statement begins so."""
    query(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'beanqueue %%' AND datname = %s AND query LIKE %s",
        database,
        f"{statement}%",
    )


def test_a_worker_survives_the_loss_of_all_its_connections(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP)
    faults.number.enqueue(number=1)
    faults.db.session.commit()
    probe.wait("number DONE")
    for number, lost in ((2, ""), (3, "LISTEN")):
        terminate(database_url, sa.make_url(database_url).database, lost)
        faults.number.enqueue(number=number)
        faults.db.session.commit()
        probe.wait("number DONE")
    assert effects(database_url) == ["1", "2", "3"]
    assert worker.stop() == 0


@contextlib.contextmanager
def outage(server_url: str, database_url: str, lost: str = "") -> Iterator[None]:
    """The database takes no connections, and the worker has lost those whose last statement begins
    so."""
    name = sa.make_url(database_url).database
    query(server_url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    terminate(server_url, name, lost)
    try:
        yield
    finally:
        query(server_url, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


def test_a_worker_waits_until_the_database_is_back(
    app: Flask, server_url: str, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP)
    with probe.gate("waiting 1") as open_gate:
        faults.wait.enqueue(name="1")
        faults.number.using(delay=datetime.timedelta(seconds=1)).enqueue(number=2)
        faults.db.session.commit()
        probe.wait("waiting 1")
        with outage(server_url, database_url):
            for times in (1, 2, 3):
                worker.wait_line("is tried again", times=times)
            open_gate()
        probe.wait("wait DONE")
    probe.wait("number DONE")
    assert effects(database_url) == ["1", "2"]
    assert worker.stop() == 0


def wake(probe: Probe, times: int = 5) -> None:
    """See tasks done, one by one: all but the first find the workers asleep, or about to be."""
    for _ in range(times):
        faults.nothing.enqueue()
        faults.db.session.commit()
        probe.wait("nothing DONE", timeout=15)


@pytest.mark.parametrize("options", [[], ["--processes", "2"]], ids=["one", "two"])
def test_a_worker_that_cannot_listen_polls_meanwhile(
    app: Flask,
    server_url: str,
    database_url: str,
    probe: Probe,
    processes: Processes,
    options: list[str],
) -> None:
    worker = processes.worker(APP, *options, BQ_POLL_TIMEOUT=3600)
    with outage(server_url, database_url, lost="LISTEN"):
        worker.wait_line("LISTEN fails")
        wake(probe, times=3)
    worker.wait_line("LISTENs again")
    wake(probe)
    assert worker.output.count("LISTEN fails") == 1
    assert worker.stop() == 0


@pytest.mark.parametrize("busy", [True, False])
def test_a_worker_leaves_although_the_database_is_away(
    app: Flask, server_url: str, database_url: str, probe: Probe, processes: Processes, busy: bool
) -> None:
    # One that holds nothing waits for nothing.
    grace = {"BQ_SHUTDOWN_TIMEOUT": 0.5} if busy else {}
    worker = processes.worker(APP, **grace, **HEARTBEAT)
    with probe.gate("waiting 1") as open_gate:
        if busy:
            faults.wait.enqueue(name="1")
            faults.db.session.commit()
            probe.wait("waiting 1")
        with outage(server_url, database_url):
            worker.wait_line("is tried again")
            worker.send(signal.SIGTERM)
            worker.wait_line("could not say goodbye", timeout=15)
        open_gate()
    assert worker.wait() == 0
    if busy:
        other = processes.worker(APP, **HEARTBEAT)
        probe.wait("wait DONE")
        assert effects(database_url) == ["1"]
        assert other.stop() == 0


def test_a_process_that_dies_is_replaced(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP, "--processes", "2", **HEARTBEAT)
    faults.killer.enqueue()
    faults.number.enqueue(number=1)
    faults.db.session.commit()
    probe.wait("number DONE")
    probe.wait("killer FAILED")
    worker.wait_line("was ended by signal 9; a new one takes its place", times=3)
    worker.wait_line(READY, times=5)
    assert effects(database_url) == ["1"]
    assert worker.stop() == 0
    assert query(database_url, "SELECT count(*) FROM bq_workers WHERE state = 'SHUTDOWN'") == [(2,)]


def test_the_tasks_of_a_process_that_dies_wait_for_no_heartbeat(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    """Its parent knows at once."""
    settings = {"BQ_WORKER_HEARTBEAT_PERIOD": 100, "BQ_WORKER_HEARTBEAT_TIMEOUT": 1000}
    supervisor = processes.worker(APP, "--processes", "2", "--concurrency", "1", **settings)
    with probe.paused("waiting mail", faults.wait, name="mail") as open_gate:
        os.kill(pid(database_url), signal.SIGKILL)
        probe.wait("waiting mail")
        open_gate()
    probe.wait("wait DONE")
    assert effects(database_url) == ["mail"]
    assert rows(database_url, "claims, crashes") == [(2, 1)]
    assert supervisor.stop() == 0


def test_a_process_declares_all_dead_that_had_its_place(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    """The second one was killed before it could do so."""
    settings = {"BQ_WORKER_HEARTBEAT_PERIOD": 100, "BQ_WORKER_HEARTBEAT_TIMEOUT": 1000}
    supervisor = processes.worker(APP, "--processes", "2", **settings)
    waits = (
        "SELECT replace(application_name, 'beanqueue ', ''), pid FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND application_name LIKE 'beanqueue %'"
        " AND datname = current_database()"
    )
    [(first, name)] = query(database_url, "SELECT id::text, name FROM bq_workers LIMIT 1")
    before = set(psutil.Process(supervisor.pid).children())
    with contextlib.closing(connect(database_url)) as connection:
        connection.autocommit = False
        connection.cursor().execute("SELECT FROM bq_workers WHERE id = %s FOR UPDATE", (first,))
        os.kill(int(name.rpartition("-")[2]), signal.SIGKILL)
        wait_until(lambda: query(database_url, waits))
        [(second, backend)] = query(database_url, waits)
        [child] = set(psutil.Process(supervisor.pid).children()) - before
        child.kill()
        supervisor.wait_line("was ended by signal 9", times=2)
        # It has gone, but what it sent would still be done.
        query(database_url, "SELECT pg_terminate_backend(%s)", backend)
    supervisor.wait_line(READY, times=3)
    dead = query(database_url, "SELECT id::text FROM bq_workers WHERE state = 'NO_HEARTBEAT'")
    assert {worker_id for (worker_id,) in dead} == {first, second}
    assert supervisor.stop() == 0


def test_connections_that_the_app_has_before_the_fork_stay_with_the_first_process(
    app: Flask, database_url: str, probe: Probe, processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "connected.py"
    path.write_text(
        """
import sqlalchemy as sa
from tests.apps.faults import create_app, db

app = create_app()
with app.app_context():
    db.session.execute(sa.text("SET application_name = 'the factory'"))
    db.session.commit()
"""
    )
    supervisor = processes.worker(str(path), "--processes", "2", "--concurrency", "1")
    wake_each(probe, 2)
    factory = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'the factory'"
    assert query(database_url, factory) == [(1,)]
    assert supervisor.stop() == 0


def test_a_forked_child_of_a_processor_is_no_worker(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    worker = processes.worker(APP)
    faults.fork.enqueue()
    faults.db.session.commit()
    probe.wait("fork DONE")
    assert rows(database_url, "result, attempts") == [("parent", 1)]
    assert effects(database_url) == ["fork"]
    assert worker.stop() == 0


def test_processes_leave_when_their_supervisor_is_killed(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    probe.listen_states("bq_workers", "name")
    supervisor = processes.worker(APP, "--processes", "2", "--name", "child")
    supervisor.kill()
    probe.wait("child-1 SHUTDOWN")
    probe.wait("child-2 SHUTDOWN")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
@sent_either_way
def test_a_signal_lets_the_running_tasks_of_all_processes_end(
    app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    send: Send,
    number: int,
) -> None:
    supervisor = processes.worker(APP, "--processes", "2")
    with probe.paused("waiting one", faults.wait, name="one") as open_gate:
        send(supervisor, number)
        supervisor.wait_line("stops", times=2)
        open_gate()
        assert supervisor.wait() == 0
    assert effects(database_url) == ["one"]
    assert rows(database_url, "state, attempts, crashes") == [("DONE", 1, 0)]


@pytest.mark.parametrize(
    ("number", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGQUIT)],
    ids=["Ctrl-C twice", "SIGQUIT"],
)
@sent_either_way
def test_all_processes_can_be_made_to_leave_at_once(
    app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    send: Send,
    number: int,
    second: int,
) -> None:
    supervisor = processes.worker(APP, "--processes", "2", BQ_SHUTDOWN_TIMEOUT=1000)
    with probe.paused("waiting long", faults.wait, name="long"):
        send(supervisor, number)
        supervisor.wait_line("stops", times=2)
        send(supervisor, second)
        assert supervisor.wait() == 0
    assert rows(database_url, "state, attempts, crashes") == [("PENDING", 0, 0)]


@with_each_signal
def test_a_process_does_not_take_its_supervisors_signal_for_the_second(
    app: Flask, database_url: str, probe: Probe, processes: Processes, number: int
) -> None:
    supervisor = processes.worker(APP, "--processes", "2")
    with probe.paused("waiting one", faults.wait, name="one") as open_gate:
        os.kill(pid(database_url), number)
        supervisor.wait_line("stops")
        supervisor.send(number)
        supervisor.wait_line("stops", times=2)  # the other one has it from the supervisor
        open_gate()
        assert supervisor.wait() == 0
    assert effects(database_url) == ["one"]


def test_a_process_that_ends_well_is_replaced_too(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "2")
    child = psutil.Process(supervisor.pid).children()[0]
    child.terminate()
    supervisor.wait_line(f"({child.pid}) left with exit code 0; a new one takes its place")
    assert supervisor.stop() == 0


#: A supervisor of one process, which is killed as it starts, for a second.
KILLED_AT_START = """
import os, signal, time
from flask_beanqueue.processes import supervisor

supervisor.PAUSE = 0.3
until = time.monotonic() + 1.0

def start(place):
    if time.monotonic() < until:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0

raise SystemExit(supervisor.Supervisor(start, 1, replaces=False).run())
"""


def test_a_process_that_is_killed_as_it_starts_is_replaced_after_a_pause(
    processes: Processes,
) -> None:
    supervisor = processes.python("-c", KILLED_AT_START)
    assert supervisor.wait() == 0
    assert 1 <= supervisor.output.count("was ended by signal 9; a new one takes its place") <= 5


#: A supervisor of processes that are soon taken for well started.
SUPERVISOR = """
import itertools, os, signal, time
from flask_beanqueue import worker_started
from flask_beanqueue.processes import supervisor

supervisor.STEADY, supervisor.PAUSE = 0.2, 0.01
{start}
code = supervisor.Supervisor(start, {number}, replaces=False).run()
{after}
raise SystemExit(code)
"""


def supervise(processes: Processes, number: int, start: str, after: str = "") -> Process:
    """Start a supervisor.

    :param start: source of what a process does.
    :param after: what is done when all have left.
    """
    source = SUPERVISOR.format(number=number, start=start, after=after)
    return processes.python("-c", source)


def test_a_process_knows_the_last_that_had_its_place_however_long_they_lived(
    processes: Processes,
) -> None:
    """One that waited for a connection all its life has buried nobody."""
    start = """
supervisor.REMEMBERED = 3
starts = os.memfd_create("starts")

def start(place):
    os.write(starts, b".")
    number = os.fstat(starts).st_size
    print(place.worker_id, "follows", *place.predecessors)
    if number % 2:
        worker_started.send()
        time.sleep(supervisor.STEADY)
    return 1 if number < 6 else 0
"""
    supervisor = supervise(processes, 1, start)
    assert supervisor.wait() == 0
    lines = [line.split() for line in supervisor.output.splitlines() if "follows" in line]
    ids = [line[0] for line in lines]
    assert [line[2:] for line in lines] == [ids[max(0, n - 3) : n] for n in range(6)]


def test_a_process_that_works_goes_on_although_another_one_cannot_start(
    processes: Processes,
) -> None:
    """The first one starts at its fourth attempt; the second one, which has lived meanwhile, never
    starts again."""
    start = """
steady = os.pipe()

def start(place):
    tries = len(place.predecessors)
    if place.number == 0 and tries == supervisor.ATTEMPTS:
        worker_started.send()
        os.write(steady[1], b".")
        while True:
            signal.pause()
    if place.number == 1 and tries == 0:
        os.read(steady[0], 1)
    return 1
"""
    supervisor = supervise(processes, 2, start)
    supervisor.wait_line("Worker process 2 ", times=10)
    assert supervisor.stop() == 0
    assert "giving up" not in supervisor.output


def test_a_process_that_has_worked_has_as_many_attempts_again(processes: Processes) -> None:
    start = """
def start(place):
    tries = len(place.predecessors)
    if tries % 3 == 2:
        worker_started.send()
    return 1 if tries < 7 else 0
"""
    assert supervise(processes, 1, start).wait() == 0


def test_a_process_that_is_through_does_not_keep_others_from_being_given_up(
    processes: Processes,
) -> None:
    supervisor = supervise(processes, 2, "def start(place): return place.number")
    assert supervisor.wait() == 1
    supervisor.wait_line("Worker process 2 ", times=3)
    supervisor.wait_line("giving up")


def test_a_process_that_cannot_be_forked_is_tried_again(processes: Processes) -> None:
    start = """
fork, calls = os.fork, itertools.count()

def seldom():
    if next(calls) == 1:
        raise BlockingIOError("no process left")
    return fork()

os.fork = seldom

def start(place):
    print("started", place.number)
    return 0
"""
    supervisor = supervise(processes, 2, start)
    assert supervisor.wait() == 0
    supervisor.wait_line("Worker process 2 cannot be started, and is tried again: no process left")
    supervisor.wait_line("started 1")


def test_a_child_that_the_app_has_made_is_left_to_the_app(processes: Processes) -> None:
    start = """
child = os.fork()
if child == 0:
    os._exit(7)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

def start(place):
    return 0
"""
    after = "code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])"
    assert supervise(processes, 1, start, after).wait() == 7


def test_processes_that_cannot_start_are_given_up(
    app: Flask, database_url: str, processes: Processes
) -> None:
    query(database_url, "ALTER TABLE bq_workers ADD CONSTRAINT nobody CHECK (false)")
    supervisor = processes.flask("--app", APP, "bq", "worker", "--processes", "2")
    assert supervisor.wait() == 1
    supervisor.wait_line("none can start: giving up")


#: So long that a task is done within the test only if somebody wakes its worker.
NO_POLL = {"BQ_POLL_TIMEOUT": 3600}


def listening(url: str) -> list[str]:
    """What the database calls the connections that LISTEN."""
    return [
        name
        for (name,) in query(
            url,
            "SELECT application_name FROM pg_stat_activity"
            " WHERE query LIKE 'LISTEN%' AND datname = current_database()"
            " AND application_name LIKE 'beanqueue %'",
        )
    ]


def wake_each(probe: Probe, number: int) -> None:
    """See as many processes of one thread woken, one after the other: each gets a task that runs
    until all have one."""
    with contextlib.ExitStack() as gates:
        for each in range(number):
            gates.enter_context(probe.gate(f"waiting {each}"))
            faults.wait.enqueue(name=str(each))
            faults.db.session.commit()
            probe.wait(f"waiting {each}", timeout=15)
    probe.wait_until(lambda: probe.heard.count("wait DONE") == number)


def test_one_connection_listens_for_all_processes(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "3")
    assert listening(database_url) == ["beanqueue listener"]
    assert supervisor.output.count("; LISTEN") == 3
    assert supervisor.stop() == 0


def test_a_commit_wakes_each_process_without_a_poll(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "3", "--concurrency", "1", **NO_POLL)
    wake(probe)
    wake_each(probe, 3)
    assert supervisor.stop() == 0


def test_processes_are_woken_again_when_their_listener_was_lost(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "3", **NO_POLL)
    terminate(database_url, sa.make_url(database_url).database, "LISTEN")
    # At once or, if it had only just been made, a second later.
    wait_until(lambda: listening(database_url) == ["beanqueue listener"])
    wake(probe)
    assert supervisor.stop() == 0


def test_a_process_that_replaces_another_is_woken_too(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "2", "--concurrency", "1", **NO_POLL)
    for times, child in enumerate(psutil.Process(supervisor.pid).children(), 3):
        child.kill()
        supervisor.wait_line(READY, times=times)
    wake(probe)
    wake_each(probe, 2)
    assert listening(database_url) == ["beanqueue listener"]
    assert supervisor.stop() == 0


def test_a_frozen_process_does_not_keep_the_others_from_being_woken(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "2", **NO_POLL)
    frozen = psutil.Process(supervisor.pid).children()[0]
    frozen.suspend()
    wait_until(lambda: frozen.status() == psutil.STATUS_STOPPED)
    with contextlib.closing(connect(database_url)) as connection:
        for _ in range(2000):  # more than a pipe takes
            connection.cursor().execute("NOTIFY faults")
    wake(probe)
    frozen.resume()
    assert supervisor.stop() == 0


def test_processes_poll_where_listen_is_not_wanted(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "2", BQ_LISTEN=0, BQ_POLL_TIMEOUT=0.1)
    wake(probe)
    assert listening(database_url) == []
    assert supervisor.stop() == 0


def test_nothing_of_several_processes_is_left_behind(
    app: Flask, database_url: str, probe: Probe, processes: Processes
) -> None:
    supervisor = processes.worker(APP, "--processes", "3")
    children = psutil.Process(supervisor.pid).children()
    assert supervisor.stop() == 0
    assert not any(child.is_running() for child in children)
    left = (
        "SELECT 1 FROM pg_stat_activity"
        " WHERE application_name LIKE 'beanqueue %' AND datname = current_database()"
    )
    wait_until(lambda: not query(database_url, left))
