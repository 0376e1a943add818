"""What processors start: a child process is as it would be in a script."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from flask_beanqueue import BeanQueue

from .apps import children
from .conftest import running
from .probe import Probe, query, wait_until
from .processes import Processes

APP = children.__name__

with_each_worker = pytest.mark.parametrize(
    "options", [[], ["--processes", "2"]], ids=["one", "processes"]
)


@pytest.fixture
def children_app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setenv("DATABASE_URL", database_url)
    # It handles SIGTERM in what is forked, and may wait there for a lock that nobody holds.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    app = children.create_app()
    with app.app_context():
        children.db.create_all()
        yield app
        children.db.session.remove()
        children.db.engine.dispose()


#: What each processor returns.
AS_IN_A_SCRIPT = {
    "terminate": -signal.SIGTERM,
    "terminate_at_once": [-signal.SIGTERM] * 20,
    "hang_up": -signal.SIGHUP,
    "interrupt": "KeyboardInterrupt",
    "handlers": [{"SIGINT": "default_int_handler"}, False, []],
    "pool": [1, 2],
    "executor": 8,
    "subprocesses": [-signal.SIGTERM] * 2,
    "fork_and_exit": [0, 3, 1, 1],
}


def results(url: str) -> dict[str, Any]:
    return dict(query(url, "SELECT func_name, result FROM bq_tasks"))


@with_each_worker
def test_children_are_as_in_a_script(
    children_app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    options: list[str],
) -> None:
    probe.listen_states()
    worker = processes.worker(APP, "default", *options)
    for name in AS_IN_A_SCRIPT:
        getattr(children, name).enqueue()
    children.db.session.commit()
    probe.wait_until(lambda: sum(" DONE" in heard for heard in probe.heard) == len(AS_IN_A_SCRIPT))
    assert results(database_url) == AS_IN_A_SCRIPT
    assert worker.stop() == 0
    assert worker.output.count("a child's last words") == len(AS_IN_A_SCRIPT["fork_and_exit"])


@with_each_worker
def test_what_the_app_handled_before_the_worker_its_children_handle(
    children_app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    options: list[str],
) -> None:
    probe.listen_states()
    worker = processes.worker(APP, "default", *options, APP_HANDLES=1)
    children.handlers.enqueue()
    children.db.session.commit()
    probe.wait("handlers DONE")
    handlers = dict.fromkeys(("SIGTERM", "SIGUSR1"), "app_handler")
    handlers["SIGINT"] = "default_int_handler"
    assert results(database_url) == {"handlers": [handlers, True, []]}
    assert worker.stop() == 0


def is_empty(group: int) -> bool:
    """Whether no process of a group is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return False
    return True


@with_each_worker
@pytest.mark.parametrize(
    "processor", [children.long_process, children.long_pool, children.long_executor]
)
def test_a_worker_leaves_although_a_task_waits_for_its_children(
    children_app: Flask,
    database_url: str,
    probe: Probe,
    processes: Processes,
    options: list[str],
    processor: Any,
) -> None:
    worker = processes.worker(APP, "long", *options, BQ_SHUTDOWN_TIMEOUT=0.1)
    processor.enqueue()
    children.db.session.commit()
    probe.wait("it runs")
    assert worker.stop() == 0
    assert query(database_url, "SELECT state, attempts, crashes FROM bq_tasks") == [
        ("PENDING", 0, 0)
    ]
    wait_until(lambda: is_empty(worker.pid))


def test_a_child_of_an_app_with_a_worker_in_a_thread_has_the_apps_handlers(
    app: Flask, bq: BeanQueue
) -> None:
    """Nothing is put back where nothing was changed."""
    ends = os.pipe()

    def fork() -> None:
        if os.fork() == 0:
            os.write(ends[1], signal.getsignal(signal.SIGUSR1).__name__.encode())
            os._exit(0)
        os.wait()

    before = signal.signal(signal.SIGUSR1, children.app_handler)
    try:
        with running(app, bq, "default"):
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        assert os.read(ends[0], 100) == b"app_handler"
    finally:
        signal.signal(signal.SIGUSR1, before)
        for end in ends:
            os.close(end)
