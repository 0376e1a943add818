"""Large arguments and results, and how much of them a worker holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import ArgumentError, BeanQueue
from flask_beanqueue.engine import attempt

from .apps import large
from .conftest import only_task
from .probe import query, wait_until
from .processes import Processes

APP = large.__name__


@pytest.fixture
def large_app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setenv("DATABASE_URL", database_url)
    app = large.create_app()
    with app.app_context():
        large.db.create_all()
        yield app
        large.db.session.remove()
        large.db.engine.dispose()


#: A megabyte, or some, of what each task gets, as SQL: some of it is stored in little.
VALUES = {
    "text": "to_jsonb(repeat('x', 1000000))",
    "text that cannot be compressed": (
        "(SELECT jsonb_agg(md5(random()::text)) FROM generate_series(1, 28000))"
    ),
    "letters of four bytes": "to_jsonb(repeat('😀', 250000))",
    "numbers with many digits": (
        "(SELECT jsonb_agg(CAST('1e308' AS numeric)) FROM generate_series(1, 3000))"
    ),
}


def insert(url: str, value: str, count: int, name: str = "measure") -> None:
    query(
        url,
        "INSERT INTO bq_tasks (channel, module, func_name, kwargs)"
        f" SELECT 'large', '{APP}', '{name}', jsonb_build_object('value', {value})"
        f" FROM generate_series(1, {count})",
    )


@pytest.mark.parametrize("name", VALUES)
def test_a_worker_holds_few_large_arguments_at_once(
    large_app: Flask, database_url: str, processes: Processes, name: str
) -> None:
    insert(database_url, "'1'", 1)
    insert(database_url, VALUES[name], 200)
    worker = processes.worker(APP, "--burst")
    assert worker.wait() == 0
    megabytes = "SELECT count(*), max(CAST(result AS int)) - min(CAST(result AS int)) FROM bq_tasks"
    [(count, growth)] = query(database_url, f"{megabytes} WHERE state = 'DONE'")
    assert count == 201
    assert growth < 60


def test_large_arguments_of_tasks_that_cannot_be_ended_yet_are_not_held(
    large_app: Flask, database_url: str, processes: Processes
) -> None:
    insert(database_url, "'1'", 1)
    insert(database_url, "to_jsonb(repeat('x', 5000000))", 40, "lock")
    insert(database_url, "'1'", 1)
    worker = processes.worker(APP, "--concurrency", "1")
    results = "SELECT CAST(result AS int) FROM bq_tasks WHERE state = 'DONE' ORDER BY finished_at"
    wait_until(lambda: len(query(database_url, results)) == 2)
    assert worker.output.count("another transaction keeps its row locked") > 30
    [(before,), (after,)] = query(database_url, results)
    assert after - before < 60
    worker.kill()


@pytest.mark.slow
def test_an_answer_that_takes_too_much_memory_is_asked_for_in_smaller_parts(
    large_app: Flask, database_url: str, processes: Processes
) -> None:
    insert(database_url, VALUES["text"], 300)
    settings = {"BQ_CLAIM_BYTES": 2_100_000_000, "MEMORY_LIMIT": 600_000_000}
    worker = processes.worker(APP, **settings)
    done = "SELECT count(*) FROM bq_tasks WHERE state = 'DONE'"
    wait_until(lambda: query(database_url, done) == [(300,)])
    assert "memory" in worker.output.lower()
    assert worker.stop() == 0


@pytest.fixture
def take(bq: BeanQueue, db: SQLAlchemy) -> Any:
    @bq.processor()
    def take(value: Any) -> list[Any]:
        return [len(value), db.session().in_transaction()]

    return take


@pytest.mark.parametrize("size", [10, 100_000])
def test_large_arguments_begin_no_transaction(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, take: Any, work: Any, size: int
) -> None:
    with app.app_context():
        take.enqueue(value="x" * size)
        db.session.commit()
    work()
    assert only_task(app, bq).result == [size, False]


def test_a_large_result_is_stored(app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Any) -> None:
    @bq.processor()
    def give() -> str:
        return "x" * 1_000_000

    with app.app_context():
        give.enqueue()
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert (task.state, task.attempts, len(task.result)) == ("DONE", 1, 1_000_000)


def test_arguments_that_raw_sql_made_larger_than_any_fail_their_task(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take: Any,
    work: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with app.app_context():
        take.enqueue(value="x" * 100_000)
        db.session.commit()
    monkeypatch.setattr(attempt, "LARGEST", 50_000)
    work()
    task = only_task(app, bq)
    assert task.state == "FAILED"
    assert "kwargs take more than 50000 bytes as text" in task.error_message


@pytest.mark.parametrize("size", [10, 100_000], ids=["with the claim", "read by the thread"])
def test_a_task_whose_arguments_find_no_memory_is_interrupted(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    take: Any,
    work: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """Others of its worker may have it at the moment."""

    def fail(*args: Any) -> Any:
        raise MemoryError

    name = "decode" if size == 10 else "Executor._read_arguments"
    monkeypatch.setattr(f"flask_beanqueue.engine.attempt.{name}", fail)
    with app.app_context():
        take.enqueue(value="x" * size)
        db.session.commit()
    work()
    task = only_task(app, bq)
    assert (task.state, task.interruptions, task.attempts) == ("PENDING", 1, 0)


@pytest.mark.parametrize("number", [1e308, -5e-324])
def test_arguments_that_come_back_larger_than_any_are_refused(
    app: Flask, take: Any, number: float
) -> None:
    """As JSON they are a few megabytes; PostgreSQL writes each number with all its digits."""
    with pytest.raises(ArgumentError, match=r"'value' cannot be stored .* too large"):
        take.run(value=[[number] * 500_000])


def test_what_only_looks_like_a_large_number_is_taken(app: Flask, take: Any) -> None:
    assert take.run(value=["1e999999999"] * 500_000)
