"""What BeanQueue's README shows, as a Flask app has it: every example of it, put to use.

The project that most of it needs is in ``tests/apps/my_pkgs`` and runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import (
    BeanQueue,
    DelayRetry,
    ExponentialBackoffRetry,
    LimitAttempt,
    TaskModelMixin,
    listen_events,
)

from .conftest import MakeApp
from .probe import Probe, query
from .processes import Processes

Run = Callable[..., list[str]]
Work = Callable[..., None]

IMAGES = '["my_pkgs.images"]'
FILES = '["my_pkgs.files"]'

SECOND = datetime.timedelta(seconds=1)


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python finds my_pkgs."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "apps"))


@pytest.fixture
def run(processes: Processes) -> Run:
    """Runs a command of the project to its end, and returns the lines that it prints."""

    def run(*arguments: str, app: str = "my_pkgs", **env: Any) -> list[str]:
        process = processes.flask("--app", app, *arguments, **env)
        assert process.wait() == 0, process.output
        return process.output.splitlines()

    return run


@pytest.fixture
def tables(run: Run) -> None:
    run("init-db")


# The project.


@pytest.mark.usefixtures("tables")
def test_a_processor_works_on_the_row_that_refers_to_its_task(run: Run, database_url: str) -> None:
    """A processor gets the session and its task, finds the row that was saved with the task by one
    commit, and what it changes is committed for it. The task came from ``run()``."""
    run("add-image", "cat.jpg")
    assert query(database_url, "SELECT state FROM image JOIN bq_tasks t ON t.id = task_id") == [
        ("PENDING",)
    ]
    run("bq", "worker", "images", "--burst", BQ_PROCESSOR_PACKAGES=IMAGES)
    assert query(
        database_url,
        "SELECT blob_name, width, height, state FROM image JOIN bq_tasks t ON t.id = task_id",
    ) == [("cat.jpg", 200, 300, "DONE")]


@pytest.mark.usefixtures("tables")
def test_a_task_may_be_made_by_the_names_of_its_processor(run: Run, database_url: str) -> None:
    """``bq.Task(channel=…, module=…, name=…)`` needs nothing of the processor, which is found by
    these names in a worker. This one has no parameters, for it needs neither session nor task."""
    run("add-file", "cat.txt")
    run("bq", "worker", "files", "--burst", BQ_PROCESSOR_PACKAGES=FILES)
    assert query(
        database_url,
        "SELECT blob_name, state, result FROM file JOIN bq_tasks t ON t.id = task_id",
    ) == [("cat.txt", "DONE", "uploaded")]


@pytest.mark.usefixtures("tables")
def test_a_worker_of_the_command_line_waits_for_the_tasks_of_its_channels(
    run: Run, processes: Processes, probe: Probe, database_url: str
) -> None:
    """A commit wakes the worker; the tasks of other channels are not its business. Its processors
    come from packages that an environment variable lists as JSON."""
    probe.listen_states()
    run("add-file", "cat.txt")
    worker = processes.worker(
        "my_pkgs", "images", BQ_PROCESSOR_PACKAGES='["my_pkgs.images", "my_pkgs.files"]'
    )
    run("add-image", "cat.jpg")
    probe.wait("resize_image PROCESSING", timeout=20)  # the poll would come after half a minute
    probe.wait("resize_image DONE")
    assert worker.stop() == 0
    assert query(database_url, "SELECT channel FROM bq_tasks WHERE state = 'PENDING'") == [
        ("files",)
    ]


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    "command",
    [("-m", "flask", "--app", "my_pkgs", "process-images"), ("-m", "my_pkgs.process_images")],
    ids=["command", "script"],
)
def test_process_tasks_makes_a_worker_of_a_command_or_a_script(
    command: tuple[str, ...], run: Run, processes: Processes, probe: Probe, database_url: str
) -> None:
    """``bq.process_tasks(channels=…)`` is the worker's loop without its command."""
    probe.listen_states()
    run("add-image", "cat.jpg")
    worker = processes.python(*command, BQ_PROCESSOR_PACKAGES=IMAGES)
    probe.wait("resize_image DONE")
    assert worker.stop() == 0
    assert query(database_url, "SELECT channels, state FROM bq_workers") == [
        (["images"], "SHUTDOWN")
    ]


@pytest.mark.usefixtures("tables")
def test_a_task_may_be_submitted_by_hand(run: Run, database_url: str) -> None:
    """``flask bq submit`` makes a task of names and JSON, and prints its id."""
    task_id, *_ = run(
        *("bq", "submit", "images", "my_pkgs.images.processors", "resize_image"),
        *("-k", '{"width": 200, "height": 300}'),
        BQ_PROCESSOR_PACKAGES=IMAGES,
    )
    query(database_url, "INSERT INTO image (blob_name, task_id) VALUES ('cat.jpg', %s)", task_id)
    run("bq", "worker", "images", "--burst", BQ_PROCESSOR_PACKAGES=IMAGES)
    assert query(database_url, "SELECT width, height FROM image") == [(200, 300)]


def test_the_queues_tables_can_be_created_by_a_command(run: Run, database_url: str) -> None:
    """``flask bq create-tables`` comes first, for the app's own tables may refer to them."""
    created = run("bq", "create-tables")
    assert [line for line in created if "created" in line] == [
        "bq_workers created",
        "bq_tasks created",
        "bq_events created",
    ]
    assert query(database_url, "SELECT to_regclass('image')") == [(None,)]
    run("init-db")
    run("add-image", "cat.jpg")
    assert query(database_url, "SELECT state FROM bq_tasks") == [("PENDING",)]


# Configuration.


@pytest.mark.usefixtures("tables")
def test_settings_may_be_environment_variables(run: Run, database_url: str) -> None:
    """Each setting is read from the variable of its name, and a command keeps to it."""
    run("add-image", "cat.jpg")
    output = run(
        *("bq", "worker", "images", "--burst"),
        BQ_PROCESSOR_PACKAGES=IMAGES,
        BQ_CONCURRENCY=2,
        BQ_LISTEN=0,
        BQ_POLL_TIMEOUT=7,
        BQ_SUCCESS_EVENTS="true",
    )
    assert any("2 at once; 1 processor known; polling every 7 s" in line for line in output)
    assert query(database_url, "SELECT type FROM bq_events") == [("DONE",)]


def test_settings_may_be_in_the_apps_configuration(run: Run, database_url: str) -> None:
    """The app says where its processors are and how many tasks a claim takes at most; ``--app``
    says which app. All tasks of one claim have its time."""
    app = "my_pkgs.own_tables.by_name"
    run("bq", "create-tables", app=app)
    query(
        database_url,
        "INSERT INTO task (channel, module, func_name, kwargs) SELECT 'letters',"
        " 'my_pkgs.own_tables.processors', 'post', jsonb_build_object('number', number)"
        " FROM generate_series(1, 1000) AS number",
    )
    run("bq", "worker", "letters", "--burst", app=app)
    assert query(database_url, "SELECT state, count(*) FROM task GROUP BY 1") == [("DONE", 1000)]
    [(most,)] = query(
        database_url,
        "SELECT max(number) FROM (SELECT count(*) AS number FROM task GROUP BY started_at) AS c",
    )
    assert most <= 10


# Own tables.


@pytest.mark.parametrize(
    ("app", "module"),
    [
        ("my_pkgs.own_tables.by_name", "my_pkgs.own_tables.processors"),
        ("my_pkgs.own_tables.by_class", "my_pkgs.own_tables.by_class"),
    ],
    ids=["by name", "by class"],
)
def test_tasks_and_workers_may_be_in_tables_of_ones_own(
    app: str, module: str, run: Run, database_url: str
) -> None:
    """Models that mixins give their columns take the place of the queue's: their dotted names are
    in the configuration, or the classes go to ``BeanQueue``. The references between them come from
    mixins, too, or are written by hand. Every command works with them."""
    created = run("bq", "create-tables", app=app)
    assert {"worker created", "task created", "bq_events created"} <= set(created)
    run("bq", "submit", "letters", module, "post", "-k", '{"number": 7}', app=app)
    run("bq", "worker", "--burst", app=app)
    assert query(
        database_url,
        "SELECT task.state, result, worker.state FROM task JOIN worker ON worker.id = worker_id",
    ) == [("DONE", 7, "SHUTDOWN")]
    assert query(database_url, "SELECT to_regclass('bq_tasks')") == [(None,)]


def test_listen_events_makes_a_task_model_notify(
    make_app: MakeApp, db: SQLAlchemy, database_url: str
) -> None:
    """An app that only makes tasks, for workers of another one, needs no ``BeanQueue``: a task
    that it inserts, or sets to PENDING again, wakes them all the same."""

    class Task(TaskModelMixin, db.Model):  # type: ignore[name-defined, misc]
        __tablename__ = "bq_tasks"

    listen_events(Task)
    app = make_app(db)
    with contextlib.closing(Probe(database_url, "images")) as ears, app.app_context():
        task = Task(channel="images", module="my_pkgs.images.processors", name="resize_image")
        db.session.add(task)
        db.session.flush()
        assert ears.poll() == []
        db.session.commit()
        ears.wait("")
        task.state = "FAILED"
        db.session.commit()
        task.state = "PENDING"
        db.session.commit()
        ears.wait("")


# In a processor.


def test_a_processor_may_undo_what_it_has_done_so_far(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    """``savepoint`` is there to be rolled back; what comes afterwards is committed."""

    @bq.processor(channel="images")
    def resize_image(db: Any, savepoint: Any, width: int) -> None:
        db.add(Note(text=f"resized to {width}"))
        db.flush()
        if width > 1000:
            savepoint.rollback()
            db.add(Note(text="too wide"))

    with app.app_context():
        resize_image.enqueue(width=200)
        resize_image.enqueue(width=2000)
        db.session.commit()
    work("images")
    assert sorted(query(database_url, "SELECT text FROM note")) == [
        ("resized to 200",),
        ("too wide",),
    ]
    assert query(database_url, "SELECT DISTINCT state FROM bq_tasks") == [("DONE",)]


def test_a_row_and_its_task_are_there_together_or_not_at_all(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    """A task never runs before its row is committed, and a commit that fails leaves none."""

    @bq.processor(channel="images")
    def resize_image(db: Any, task: Any) -> None:
        db.query(Note).filter(Note.task == task).one().text = "resized"

    with app.app_context():
        db.session.add(Note(id=1, text="new", task=resize_image.run()))
        db.session.flush()
        work("images")
        assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]
        db.session.commit()
        work("images")
        assert query(database_url, "SELECT text FROM note") == [("resized",)]

        db.session.expunge_all()
        db.session.add(Note(id=1, text="there is one already", task=resize_image.run()))
        with pytest.raises(sa.exc.IntegrityError):
            db.session.commit()
        db.session.rollback()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(1,)]


# When a task runs, and when it runs again.


def make_due(url: str) -> None:
    query(url, "UPDATE bq_tasks SET scheduled_at = now() WHERE state = 'PENDING'")


def test_a_task_may_be_for_later(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, work: Work, database_url: str
) -> None:
    """``scheduled_at`` is set on the task, by the database's clock or one's own, or comes from
    ``using()``. Until then, workers leave the task alone."""

    @bq.processor(channel="images")
    def resize_image(db: Any, width: int) -> None:
        db.add(Note(text=str(width)))

    minutes = 3 * datetime.timedelta(minutes=1)
    in_three_minutes = datetime.datetime.now(datetime.UTC) + minutes
    with app.app_context():
        task: Any = resize_image.run(width=1)
        task.scheduled_at = sa.func.now() + minutes
        db.session.add(task)
        resize_image.using(scheduled_at=in_three_minutes).enqueue(width=2)
        resize_image.using(delay=minutes).enqueue(width=3)
        db.session.add(
            bq.Task(
                channel="images",
                module=__name__,
                name="resize_image",
                kwargs={"width": 4},
                scheduled_at=in_three_minutes,
            )
        )
        db.session.commit()
    assert query(
        database_url,
        "SELECT count(*) FROM bq_tasks"
        " WHERE scheduled_at BETWEEN now() + interval '1 minute' AND now() + interval '3 minutes'",
    ) == [(4,)]
    work("images")
    assert query(database_url, "SELECT count(*) FROM note") == [(0,)]
    make_due(database_url)
    work("images")
    assert sorted(query(database_url, "SELECT text FROM note")) == [("1",), ("2",), ("3",), ("4",)]


def rests(url: str) -> list[int]:
    """How many seconds the task was to wait after each failure."""
    return [
        round(seconds)
        for (seconds,) in query(
            url,
            "SELECT extract(epoch FROM scheduled_at - created_at) FROM bq_events"
            " WHERE type = 'RETRIED' ORDER BY id",
        )
    ]


def test_a_task_that_failed_runs_again_after_a_delay(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    """``DelayRetry`` waits as long each time, and for ever if need be."""

    @bq.processor(channel="images", retry_policy=DelayRetry(delay=120 * SECOND))
    def resize_image(task: Any) -> str:
        if task.attempts < 4:
            raise ConnectionError
        return "resized"

    with app.app_context():
        resize_image.enqueue()
        db.session.commit()
    for _ in range(5):
        work("images")
        make_due(database_url)
    assert rests(database_url) == [120] * 4
    assert query(database_url, "SELECT state, attempts, result FROM bq_tasks") == [
        ("DONE", 5, "resized")
    ]


def test_a_task_that_fails_waits_longer_each_time_and_not_for_ever(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    """``LimitAttempt`` counts, and leaves the time to the policy in it."""

    @bq.processor(
        channel="images",
        retry_policy=LimitAttempt(4, ExponentialBackoffRetry(base=10 * SECOND, jitter=0)),
    )
    def resize_image() -> None:
        raise ConnectionError("out of reach")

    with app.app_context():
        resize_image.enqueue()
        db.session.commit()
    for _ in range(5):
        work("images")
        make_due(database_url)
    assert rests(database_url) == [10, 20, 40]
    assert query(database_url, "SELECT state, attempts, error_message FROM bq_tasks") == [
        ("FAILED", 4, "ConnectionError: out of reach")
    ]


def test_only_some_exceptions_are_worth_another_attempt(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    """``retry_exceptions`` names them; after any other, the task is FAILED at once."""

    @bq.processor(
        channel="images",
        retry_policy=LimitAttempt(3),
        retry_exceptions=(ConnectionError, TimeoutError),
    )
    def resize_image(error: str) -> None:
        raise {"timeout": TimeoutError, "value": ValueError}[error]

    with app.app_context():
        resize_image.enqueue(error="timeout")
        resize_image.enqueue(error="value")
        db.session.commit()
    work("images")
    assert query(database_url, "SELECT state, attempts FROM bq_tasks ORDER BY id") == [
        ("FAILED", 3),
        ("FAILED", 1),
    ]
