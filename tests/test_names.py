"""What a task's row names is looked up among the processors, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue

from .probe import query

Work = Callable[..., None]

seen: list[str] = []


def plain_function(**kwargs: Any) -> None:
    seen.append("plain_function")


def _private_function(**kwargs: Any) -> None:
    seen.append("_private_function")


class AnyClass:
    def __init__(self, **kwargs: Any) -> None:
        seen.append("AnyClass")

    @staticmethod
    def method(**kwargs: Any) -> None:
        seen.append("method")


@pytest.fixture
def known(bq: BeanQueue) -> Any:
    seen.clear()

    @bq.processor()
    def known(**kwargs: Any) -> None:
        seen.append("known")

    return known


def unknown_to(app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, names: Any) -> list[str]:
    """Let a worker meet tasks of these names, and return what modules it imported."""
    work("default")  # whatever a worker imports for itself
    with app.app_context():
        db.session.add_all(bq.Task(module=module, name=name) for module, name in names)
        db.session.commit()
    before = set(sys.modules)
    work("default")
    return sorted(set(sys.modules) - before)


NAMES = [
    ("os", "system"),
    ("subprocess", "call"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "__import__"),
    ("__builtins__", "eval"),
    ("importlib", "import_module"),
    ("os.path", "join"),
    ("os", "path.join"),
    ("this", "d"),  # whose import prints something
    ("trap", "spring"),
    ("trap", ""),
    ("", "trap"),
    ("trap:spring", "spring"),
    (".trap", "spring"),
    ("..", "trap"),
    ("__import__('trap')", "spring"),
    (__name__, "plain_function"),
    (__name__, "_private_function"),
    (__name__, "AnyClass"),
    (__name__, "AnyClass.method"),
    (f"{__name__}.AnyClass", "method"),
    (__name__, "known.func"),
    (__name__, "known.__call__"),
    (f"{__name__}.known", "func"),
    (__name__, "__init__"),
    (__name__, "Known"),
    (__name__, "known "),
    (__name__, "known()"),
    (__name__, "known;trap"),
    (__name__, "__dict__"),
    (__name__.rpartition(".")[2], "known"),
    (f".{__name__.rpartition('.')[2]}", "known"),
    ("", "known"),
    ("", f"{__name__}.known"),
    (f"{__name__}.known", ""),
    ("flask_beanqueue.registry", "import_packages"),
    ("flask_beanqueue", "BeanQueue"),
]


def test_names_that_are_no_processors_are_unknown_and_import_nothing(
    app: Flask,
    db: SQLAlchemy,
    bq: BeanQueue,
    known: Any,
    work: Work,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit\ndef spring(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "this" not in sys.modules
    assert unknown_to(app, db, bq, work, NAMES) == []
    assert seen == []
    rows = query(
        database_url,
        "SELECT module, func_name, state, attempts, unknown_since IS NULL, error_message"
        " FROM bq_tasks ORDER BY id",
    )
    assert [row[:5] for row in rows] == [(*names, "PENDING", 0, False) for names in NAMES]
    for module, name, *_, message in rows:
        assert message.startswith(f"No processor {module}.{name} is registered in this worker")


def test_the_trap_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        __import__("trap")


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
PART = TEXT | st.sampled_from([__name__, "known", "os", "builtins", "eval", "tests", ".", "%s"])


def test_any_other_name_is_unknown(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, known: Any, work: Work, database_url: str
) -> None:
    @settings(max_examples=15)
    @given(names=st.lists(st.tuples(PART, PART), min_size=1, max_size=30))
    @example(names=[("{", "}"), ("%(name)s", ":name"), ("'; --", '"'), ("\r\n", "\x1b[2J")])
    def check(names: list[tuple[str, str]]) -> None:
        assume((__name__, "known") not in names)
        query(database_url, "DELETE FROM bq_tasks")
        assert unknown_to(app, db, bq, work, names) == []
        assert seen == []
        assert query(
            database_url,
            "SELECT state, unknown_since IS NULL, count(*) FROM bq_tasks GROUP BY 1, 2",
        ) == [("PENDING", False, len(names))]

    check()


@pytest.mark.parametrize(
    "value",
    [
        {"py/object": "os.system"},
        {"__class__": "os.system", "__reduce__": ["os.system", ["true"]]},
        "!!python/object/apply:os.system ['true']",
        "gASVAgAAAAAAAAAu",
        "__import__('trap')",
        "{{ 7 * 7 }}",
        "${jndi:ldap://nowhere.invalid/}",
    ],
    ids=str,
)
def test_arguments_and_results_are_nothing_but_json(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str, value: Any
) -> None:
    @bq.processor()
    def echo(value: Any) -> Any:
        seen.append(value)
        return value

    seen.clear()
    with app.app_context():
        task = echo.enqueue(value=value)
        db.session.commit()
        work()
        assert seen == [value]
        assert task.result == value


def test_a_name_from_a_row_cannot_look_like_a_line_of_the_log(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    name = "a\nERROR in worker: all is lost\x1b[2J\u202e"
    with app.app_context():
        db.session.add(bq.Task(module=name, name="b"))
        db.session.commit()
    work("default")
    [message] = [each.getMessage() for each in caplog.records if "waits again" in each.getMessage()]
    assert message.isprintable()
    assert repr(f"{name}.b") in message
