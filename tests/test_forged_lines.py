"""Nothing that is logged looks like a line of its own, or speaks to a terminal.

It is shown as an ordinary ``logging.Formatter`` does. The database and the exceptions keep what
was said.
"""

from __future__ import annotations

import io
import logging
import logging.config
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_beanqueue import BeanQueue, LimitAttempt, current_task, task_started
from flask_beanqueue.log import escape, log

from .conftest import only_task
from .probe import query
from .processes import Processes

Work = Callable[..., None]

FORGED = "[2026-01-01 00:00:00,000] CRITICAL in security: all is lost"
#: Whatever ends a line, and what terminals obey.
BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\x1b[2J\x9b2J\x07\x08\x7f\u202e\u2066"
EVIL = f"said{BREAKS}{FORGED}" + "".join(f"{each}{FORGED}" for each in BREAKS)


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What a handler prints."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logging.Formatter(
            "own %(task_name)s %(task_channel)s %(message)s",
            defaults={"task_name": "", "task_channel": ""},
        )
    )
    log.addHandler(handler)
    yield stream
    log.removeHandler(handler)


def check(text: str) -> None:
    """No line begins with what is forged, and nothing is left that no line should hold."""
    assert FORGED in text
    assert [line for line in text.splitlines() if line.lstrip(" |+").startswith(FORGED)] == []
    odd = {each for each in text if unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp")}
    assert odd <= {"\n", "\t"}
    assert not {"\u202e", "\u2066"} & set(text)


def test_text_is_escaped_as_in_a_literal_and_all_else_stays() -> None:
    plain = "é ü 日本語 🦊 a\xa0b\u3000c « d » \\n %s"
    assert escape(plain) == plain
    assert escape("\0\t\n\r\x1b\x7f\x85\x9b\u2028\u202e\ud800") == (
        "\\x00\\t\\n\\r\\x1b\\x7f\\x85\\x9b\\u2028\\u202e\\ud800"
    )


# Exceptions: shown as Python shows them, but each in one line.


def noted() -> Exception:
    error = ValueError("a note")
    error.add_note(FORGED)
    error.add_note(EVIL)
    return error


def caused() -> Exception:
    error = ValueError("last")
    error.__cause__ = ValueError(EVIL)
    return error


def in_the_context_of() -> Exception:
    error = ValueError("last")
    error.__context__ = ValueError(EVIL)
    return error


def grouped() -> Exception:
    inner = ExceptionGroup(EVIL, [ValueError(EVIL), noted()])
    return ExceptionGroup("outer", [inner, caused()])


def of_the_database(url: str) -> Exception:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError) as raised:
        connection.execute(sa.text("SELECT CAST(:text AS int)"), {"text": EVIL})
    return raised.value


def from_code_called(name: str) -> Exception:
    code = compile("raise ValueError(1)", name, "exec")
    tracer = sys.gettrace()
    sys.settrace(None)  # coverage cannot write such a name
    try:
        exec(code)
    except ValueError as error:
        return error
    finally:
        sys.settrace(tracer)
    raise AssertionError


EXCEPTIONS: dict[str, Callable[[str], BaseException]] = {
    "a message": lambda url: ValueError(EVIL),
    "a key": lambda url: KeyError(EVIL),
    "sys.exit": lambda url: SystemExit(EVIL),
    "notes": lambda url: noted(),
    "a cause": lambda url: caused(),
    "a context": lambda url: in_the_context_of(),
    "groups": lambda url: grouped(),
    "a syntax error": lambda url: SyntaxError(EVIL, (EVIL, 1, 1, EVIL)),
    "a file that is not there": lambda url: FileNotFoundError(2, EVIL, EVIL),
    "a class": lambda url: type(EVIL, (Exception,), {})("odd"),
    "the name of a file": lambda url: from_code_called(EVIL),
    "the database": of_the_database,
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_a_traceback_forges_nothing_and_the_exception_stays_as_it_is(
    printed: io.StringIO, caplog: pytest.LogCaptureFixture, database_url: str, name: str
) -> None:
    error = EXCEPTIONS[name](database_url)
    said = str(error)
    try:
        raise error
    except BaseException:
        log.exception("It fails")
    check(printed.getvalue())
    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert str(error) == said


def test_an_ordinary_traceback_is_shown_as_python_shows_it(printed: io.StringIO) -> None:
    def fail() -> None:
        try:
            raise LookupError("first")
        except LookupError as error:
            raise ExceptionGroup("two", [ValueError("a\tb"), TypeError("é")]) from error

    try:
        fail()
    except ExceptionGroup:
        log.exception("It fails")
        plain = logging.Formatter().formatException(sys.exc_info())  # type: ignore[arg-type]
    assert printed.getvalue() == f"own   It fails\n{plain}\n"


def test_an_app_that_sets_logging_up_does_not_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    path = tmp_path / "log"
    handler = {"class": "logging.FileHandler", "filename": str(path)}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"file": handler},
            "loggers": {"flask_beanqueue": {"handlers": ["file"], "propagate": False}},
        }
    )
    log.error("It fails: %s", EVIL)
    log.handlers[0].close()
    check(path.read_text())


class OddNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise ZeroDivisionError


def test_an_exception_that_cannot_be_formatted_is_logged_all_the_same(
    printed: io.StringIO,
) -> None:
    log.error("It fails", exc_info=OddNotes("odd"))
    told = printed.getvalue()  # by the queue, or by Python itself from 3.13 on
    assert told.startswith("own   It fails\n")
    assert "ZeroDivisionError" in told


# What else comes from without.


def test_names_of_a_row_forge_nothing(
    app: Flask, bq: BeanQueue, work: Work, printed: io.StringIO, database_url: str
) -> None:
    query(
        database_url,
        "INSERT INTO bq_tasks (channel, module, func_name) VALUES (%s, %s, %s)",
        *(EVIL, EVIL, EVIL),
    )
    work(EVIL)
    check(printed.getvalue())
    task = only_task(app, bq)
    assert (task.channel, task.module, task.func_name) == (EVIL, EVIL, EVIL)


def test_the_name_of_a_worker_forges_nothing(
    app: Flask, bq: BeanQueue, printed: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flask_beanqueue"):
        bq.process_tasks(["default"], app=app, burst=True, name=EVIL)
    check(printed.getvalue())


def raise_evil(*_: Any) -> Any:
    raise ValueError(EVIL)


def raise_after_its_end(db: Any) -> None:
    current_task.state = "DONE"
    db.commit()
    raise ValueError(EVIL)


def return_evil(db: Any) -> Any:
    return type(EVIL, (), {})()


def raise_in_the_database(db: Any) -> None:
    said = EVIL.replace("%", "%%").replace("'", "''")
    db.connection().exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION '{said}'; END $$")


def raise_plain(db: Any) -> None:
    raise ValueError("plain")


def do_nothing(db: Any) -> None:
    pass


#: What processors do, and what the app does around them.
SPEAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a processor": (raise_evil, {}),
    "a processor that is tried again": (raise_evil, {"retry_policy": LimitAttempt(2)}),
    "a processor after its end": (raise_after_its_end, {}),
    "a result": (return_evil, {}),
    "the database": (raise_in_the_database, {}),
    "a retry policy": (raise_plain, {"retry_policy": raise_evil}),
    "a receiver": (do_nothing, {}),
    "a context": (do_nothing, {}),
}


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_whoever_speaks_forges_nothing(
    app: Flask, bq: BeanQueue, work: Work, printed: io.StringIO, speaker: str
) -> None:
    act, options = SPEAKERS[speaker]

    @bq.processor(**options)
    def speak(db: Any) -> Any:
        db.execute(sa.text("SELECT 1"))
        return act(db)

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        if speaker == "a context" and current_task:
            raise_evil()

    def receive(sender: Flask, task: Any) -> None:
        if speaker == "a receiver":
            raise_evil()

    with app.app_context():
        speak.enqueue()
        bq.db.session.commit()
    with task_started.connected_to(receive):
        work()
    check(printed.getvalue())
    task = only_task(app, bq)
    if act is raise_evil:
        kept = EVIL.replace("\0", "\\0")
        assert task.error_message == f"ValueError: {kept}"
    if act is raise_evil and not options:
        with app.app_context():
            [event] = bq.db.session.merge(task).events
            assert f"ValueError: {kept}\n" in event.traceback


APP = """
import os
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_beanqueue import BeanQueue

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
db = SQLAlchemy(app)
bq = BeanQueue(app)

@bq.processor()
def fail():
    raise ValueError(EVIL)
"""


@pytest.mark.usefixtures("app")
def test_a_worker_prints_no_forged_line(
    processes: Processes, tmp_path: Path, database_url: str
) -> None:
    path = tmp_path / "evil_app.py"
    path.write_text(APP.replace("EVIL", ascii(EVIL)))
    query(database_url, "INSERT INTO bq_tasks (module, func_name) VALUES ('evil_app', 'fail')")
    process = processes.flask("--app", str(path), "bq", "worker", "--burst", "--name", EVIL)
    assert process.wait() == 0
    check(process.output)
    [(message,)] = query(database_url, "SELECT error_message FROM bq_tasks")
    assert message == f"ValueError: {EVIL}"
