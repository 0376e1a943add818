"""Processes in which no thread gets a turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flask import Flask

from .apps import hangs
from .probe import Probe, query, wait_until
from .processes import HEARTBEAT, READY, Processes
from .test_faults import outage

APP = hangs.__name__


@pytest.fixture
def app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setenv("DATABASE_URL", database_url)
    app = hangs.create_app()
    with app.app_context():
        hangs.db.create_all()
        yield app
        hangs.db.session.remove()
        hangs.db.engine.dispose()


with_each_hang = pytest.mark.parametrize("hang", [hangs.backtrack, hangs.sleep_in_c])


@with_each_hang
def test_a_task_that_hangs_its_process_ends_failed_and_its_neighbours_get_done(
    app: Flask, database_url: str, processes: Processes, hang: Any
) -> None:
    supervisor = processes.worker(APP, "--processes", "2", **HEARTBEAT)
    hangs.easy.enqueue_many([{"number": number} for number in range(20)])
    hang.enqueue()
    hangs.easy.enqueue_many([{"number": number} for number in range(20)])
    hangs.db.session.commit()
    ended = "SELECT state, count(*) FROM bq_tasks GROUP BY state ORDER BY state"
    wait_until(lambda: query(database_url, ended) == [("DONE", 40), ("FAILED", 1)])
    [(name, crashes, attempts)] = query(
        database_url, "SELECT func_name, crashes, attempts FROM bq_tasks WHERE state = 'FAILED'"
    )
    assert (name, crashes, attempts) == (hang.func_name, 3, 0)
    assert f"in {hang.func_name}" in supervisor.output  # where it hung
    assert supervisor.stop() == 0


@pytest.mark.slow
def test_many_tasks_that_hang_do_not_let_the_supervisor_give_up(
    app: Flask, database_url: str, processes: Processes
) -> None:
    """They end processes soon, and one after the other, as if none could start."""
    supervisor = processes.worker(APP, "--processes", "2", **HEARTBEAT, BQ_MAX_CRASHES=1)
    for number in range(8):
        hangs.sleep_in_c.enqueue()
        hangs.easy.enqueue(number=number)
    hangs.db.session.commit()
    ended = "SELECT count(*) FROM bq_tasks WHERE state IN ('DONE', 'FAILED')"
    wait_until(lambda: query(database_url, ended) == [(16,)])
    assert "giving up" not in supervisor.output
    assert supervisor.stop() == 0


def stop_for_long(pid: int, url: str) -> None:
    """Stop a process for twice the heartbeat's timeout, by the database's clock."""
    os.kill(pid, signal.SIGSTOP)
    silent = "SELECT now() - max(last_heartbeat) > '3 s' FROM bq_workers"
    wait_until(lambda: query(url, silent) == [(True,)])
    os.kill(pid, signal.SIGCONT)


def test_a_worker_that_was_stopped_for_too_long_leaves_when_it_goes_on_or_works(
    app: Flask, database_url: str, processes: Processes
) -> None:
    """The timer and the thread that puts it off wake up at the same moment."""
    worker = processes.worker(APP, **HEARTBEAT)
    stop_for_long(worker.pid, database_url)
    hangs.easy.enqueue(number=1)
    hangs.db.session.commit()
    done = "SELECT count(*) FROM bq_tasks WHERE state = 'DONE'"
    wait_until(lambda: worker.code is not None or query(database_url, done) == [(1,)])
    if worker.code is not None:
        # The other threads go on, too, while their frames are read, which may end in a crash.
        assert worker.wait() in (1, -signal.SIGSEGV)
        assert "Timeout (0:00:01.5" in worker.output


@pytest.mark.parametrize(
    ("arguments", "settings"), [(["--reload"], {}), ([], {"BQ_WATCHDOG": "false"})]
)
def test_with_reload_or_if_it_is_switched_off_there_is_no_watchdog(
    app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    arguments: list[str],
    settings: dict[str, str],
) -> None:
    probe.listen_states()
    worker = processes.worker(APP, *arguments, **HEARTBEAT, **settings)
    children = psutil.Process(worker.pid).children()
    stop_for_long(children[0].pid if children else worker.pid, database_url)
    hangs.easy.enqueue(number=1)
    hangs.db.session.commit()
    probe.wait("easy DONE")
    assert worker.stop() == 0


def test_a_database_that_is_away_for_longer_is_no_hang(
    app: Flask, server_url: str, database_url: str, probe: Probe, processes: Processes
) -> None:
    probe.listen_states()
    worker = processes.worker(APP, **HEARTBEAT)
    [(begin,)] = query(server_url, "SELECT now()")
    with outage(server_url, database_url):
        over = "SELECT now() > %s + interval '4 s'"
        wait_until(lambda: query(server_url, over, begin) == [(True,)])
    hangs.easy.enqueue(number=1)
    hangs.db.session.commit()
    probe.wait("easy DONE")
    assert worker.stop() == 0


def test_what_the_watchdog_says_is_in_the_file_that_the_log_goes_to(
    app: Flask, database_url: str, processes: Processes, tmp_path: Path
) -> None:
    log, path = tmp_path / "log", tmp_path / "logs_to_file.py"
    path.write_text(
        f"""
import logging
from tests.apps.hangs import create_app

logging.basicConfig(filename={str(log)!r}, level="INFO")
app = create_app()
"""
    )
    worker = processes.flask("--app", str(path), "bq", "worker", **HEARTBEAT)
    wait_until(lambda: log.exists() and READY in log.read_text())
    hangs.sleep_in_c.enqueue()
    hangs.db.session.commit()
    assert worker.wait() == 1
    assert "Timeout" in log.read_text()
    assert "Timeout" not in worker.output
