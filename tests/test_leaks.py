"""What tasks are given does not get into the log's messages, whatever becomes of them; nor into the
log, unless tracebacks do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .apps import leaks
from .probe import query
from .processes import Processes

APP = "tests.apps.leaks"
#: With a quotation mark, at which no message may be cut short.
SECRET = "horse's \"staple"
#: In whatever form: with more backslashes, say.
TRACE = re.compile("horse|staple")

#: What the database refuses of a task whose argument is to be unique.
DUPLICATE = 'duplicate key value violates unique constraint "unique_pkey"'
#: What becomes of the tasks of each processor, and what is said about it.
MESSAGES = {
    "work": ("DONE", None),
    "write": ("DONE", None),
    "write_again": ("FAILED", f"IntegrityError: {DUPLICATE}"),
    "fail": ("FAILED", "ValueError: no good"),
    "insert": ("FAILED", f"IntegrityError: {DUPLICATE}"),
    "insert_and_retry": ("FAILED", f"IntegrityError: {DUPLICATE}"),
    "insert_by_driver": ("FAILED", f"UniqueViolation: {DUPLICATE}"),
    "leave_empty": (
        "FAILED",
        'IntegrityError: null value in column "other" of relation "unique" violates not-null'
        " constraint",
    ),
    "misspell": ("FAILED", 'ProgrammingError: column "misspelt" does not exist'),
    "cast": ("FAILED", "DataError: invalid text representation (22P02)"),
    "choose": (
        "FAILED",
        "StatementError: … is not among the defined enum values. Enum name: mood. Possible values:"
        " GOOD",
    ),
    "go_on": (
        "FAILED",
        "PendingRollbackError: This Session's transaction has been rolled back due to a previous"
        " exception during flush. To begin a new transaction with this Session, first issue"
        " Session.rollback().",
    ),
    "insert_after_its_end": ("DONE", None),
    "raise_several_after_its_end": ("DONE", None),
    "ask_policy": (
        "FAILED",
        "ValueError: no good (its retry policy failed: IntegrityError: duplicate key value violates"
        ' unique constraint "unique_pkey")',
    ),
    "receive": ("DONE", None),
    "tear_down": ("DONE", None),
    "answer_object": ("DONE", None),
    "answer_nul": ("DONE", None),
    "answer": (
        "FAILED",
        "Its outcome (DONE) could not be written. IntegrityError: new row for relation"
        ' "bq_tasks" violates check constraint "refused"',
    ),
    "stay": ("PROCESSING", None),
    "enqueue_one_as_many": (
        "FAILED",
        f"ArgumentError: {APP}.work: enqueue_many takes a list with a dict of arguments for each"
        " task, not dict. For a single task, use enqueue.",
    ),
    "enqueue_a_pair": (
        "FAILED",
        f"ArgumentError: {APP}.work: enqueue_many takes a dict of arguments for each task, but"
        " item 0 is of the type list",
    ),
    "enqueue_a_set": (
        "FAILED",
        f"ArgumentError: {APP}.work: the argument 'password' cannot be stored as JSON: Object of"
        " type set is not JSON serializable. Pass something plain in its place, such as an id, a"
        " string or a number.",
    ),
    "park": ("PROCESSING", None),
    "unheard_of": (
        "FAILED",
        f"No processor {APP}.unheard_of is registered in this worker, which knows"
        f" {len(leaks.bq.registry)}. Is its module imported by the app or named in"
        " BQ_PROCESSOR_PACKAGES? No worker knew it for 0 seconds (BQ_UNKNOWN_GRACE).",
    ),
}
NO_OBJECT = ("FAILED", "ValueError: the task's kwargs are no JSON object")


@pytest.fixture
def tables(processes: Processes, database_url: str) -> None:
    """The tables, with rules against some outcomes."""
    assert processes.flask("--app", APP, "bq", "create-tables").wait() == 0
    query(
        database_url,
        """
        ALTER TABLE bq_tasks ADD CONSTRAINT refused CHECK (
            NOT (func_name = 'answer' AND state = 'DONE')
            AND NOT (func_name = 'stay' AND state NOT IN ('PENDING', 'PROCESSING')))
        """,
    )
    query(database_url, "INSERT INTO \"unique\" VALUES (%s, '')", SECRET + " again")


def add(url: str, name: str, kwargs: Any, channel: str = "leaks") -> str:
    """Add a task as somebody would by hand, and return its id."""
    [(task_id,)] = query(
        url,
        "INSERT INTO bq_tasks (channel, module, func_name, kwargs) VALUES (%s, %s, %s, %s)"
        " RETURNING id::text",
        *(channel, APP, name, json.dumps(kwargs)),
    )
    return str(task_id)


def test_every_processor_of_the_app_is_tried() -> None:
    assert set(MESSAGES) == {each.func_name for each in leaks.bq.registry} - {"crash"} | {
        "unheard_of"
    }


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("options", [[], ["--verbose"], ["--processes", "2"]], ids=str)
def test_arguments_are_neither_in_the_log_nor_in_the_message(
    processes: Processes, database_url: str, options: list[str]
) -> None:
    wanted = {
        add(database_url, name, {"password": SECRET}): expected
        for name, expected in MESSAGES.items()
    }
    for kwargs in (SECRET, [SECRET], None, 5):
        wanted[add(database_url, "work", kwargs)] = NO_OBJECT
    for kwargs in ({"another": SECRET}, {"password": SECRET, "another": SECRET}):
        wanted[add(database_url, "work", kwargs)] = (
            "FAILED",
            "TypeError: work() got an unexpected keyword argument 'another'",
        )
    worker = processes.flask(
        *("--app", APP, "bq", "worker", "leaks", "--burst", *options), BQ_UNKNOWN_GRACE=0
    )
    assert worker.wait() == 0
    assert not TRACE.search(worker.output)
    found = query(database_url, "SELECT id::text, state, error_message FROM bq_tasks")
    assert {task_id: tuple(rest) for task_id, *rest in found} == wanted
    # All of it was told.
    for name in MESSAGES:
        if MESSAGES[name][0] == "FAILED":
            assert f"{APP}.{name} " in worker.output
    assert worker.output.count("raised after its end") == 2
    assert worker.output.count("its outcome is refused") >= 3
    for words in ("The retry policy of", "A receiver of", "The app context of", "is not stored"):
        assert words in worker.output


@pytest.mark.usefixtures("tables")
def test_arguments_are_not_in_the_log_when_a_worker_crashes(
    processes: Processes, database_url: str
) -> None:
    add(database_url, "crash", {"password": SECRET}, "crash")
    first = processes.flask("--app", APP, "bq", "worker", "crash")
    assert first.wait() == -9
    query(database_url, "UPDATE bq_workers SET state = 'NO_HEARTBEAT'")
    second = processes.flask("--app", APP, "bq", "worker", "crash", "--burst", BQ_MAX_CRASHES=1)
    assert second.wait() == 0
    second.wait_line(f"{APP}.crash")
    assert not TRACE.search(first.output + second.output)
    assert query(database_url, "SELECT state FROM bq_tasks") == [("FAILED",)]


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(("hide", "shown"), [("", True), ("1", False)])
def test_tracebacks_in_events_show_values_unless_they_are_hidden(
    processes: Processes, database_url: str, hide: str, shown: bool
) -> None:
    add(database_url, "misspell", {"password": "letters"})
    worker = processes.flask("--app", APP, "bq", "worker", "leaks", "--burst", HIDE=hide)
    assert worker.wait() == 0
    [(traceback,)] = query(database_url, "SELECT traceback FROM bq_events")
    assert ("[parameters: {'password': 'letters'}]" in traceback) == shown
    assert 'column "misspelt" does not exist' in traceback


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(("hide", "shown"), [("", True), ("1", False)])
def test_tracebacks_in_the_log_show_values_unless_they_are_hidden(
    processes: Processes, database_url: str, hide: str, shown: bool
) -> None:
    for name in ("receive", "insert"):
        add(database_url, name, {"password": "letters"})
    worker = processes.flask(
        *("--app", APP, "bq", "worker", "leaks", "--burst"), HIDE=hide, TRACEBACKS="1"
    )
    assert worker.wait() == 0
    assert "A receiver of the signal 'task-started' raised" in worker.output
    assert f"failed: IntegrityError: {DUPLICATE}" in worker.output
    values = re.findall(r"\[parameters: .*'letters'", worker.output)
    assert len(values) == (2 if shown else 0)
    assert worker.output.count("(text)=(letters) already exists") >= 2  # which PostgreSQL says
