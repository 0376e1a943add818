"""Arguments, by every way in: those that can be stored, and those that cannot.

What cannot be stored has a table for each way: what it is, in words, and what is said of it.
Options, and what can be no processor, are in test_processor; what a webhook brings is in
test_auto_complete.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import json
import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from werkzeug.local import LocalProxy

from flask_beanqueue import ArgumentError, BeanQueue
from flask_beanqueue import codec as arguments

from .probe import query
from .values import (
    CYCLE,
    MOST,
    NUMBERS,
    TEXT,
    VALUES,
    Color,
    Mapping,
    Unprintable,
    bad,
    nested,
    same,
)

Work = Callable[..., None]

NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)

# In the view.

NO_ARGUMENT = {
    "a time": (NOON, "Object of type datetime is not JSON serializable"),
    "a set": ({1}, "Object of type set is not JSON serializable"),
    "bytes": (b"a", "Object of type bytes is not JSON serializable"),
    "a decimal": (decimal.Decimal("1.5"), "Object of type Decimal is not JSON serializable"),
    "a member of an enum": (Color.RED, "Object of type Color is not JSON serializable"),
    "an object that cannot be printed": (Unprintable(), "Object of type Unprintable is not JSON"),
    "a proxy for text": (LocalProxy(lambda: "a"), "it is no str, but a LocalProxy of one; what"),
    "a proxy in a list": ([LocalProxy(list)], "it is no list, but a LocalProxy of one; what"),
    "a proxy for an object": (LocalProxy(object), "it is no object, but a LocalProxy of one; what"),
    "a proxy for nothing": (LocalProxy(lambda: {}["a"]), "it raises KeyError: 'a'"),
    "a mock": (mock.Mock(spec=str), "it is no str, but a Mock of one; what"),
    "a tuple as a key": ({(1, 2): 3}, "keys must be str, int, float, bool or None, not tuple"),
    "NaN": (float("nan"), "NaN and Infinity are not JSON compliant"),
    "Infinity": ([float("inf")], "NaN and Infinity are not JSON compliant"),
    "a number of 5,000 digits": (10**4_999, "Exceeds the limit (4300 digits)"),
    "NUL": ("a\0b", "it holds the character U+0000, which PostgreSQL cannot store"),
    "NUL in a key": ({"a\0b": 1}, "it holds the character U+0000"),
    "NUL after a backslash": ("\\\0", "it holds the character U+0000"),
    "half of a surrogate pair": ("\ud800", "it holds half of a surrogate pair, which is no text"),
    "both halves, each by itself": ("\ud83d\ude00", "it holds half of a surrogate pair"),
    "half of a pair in a key": ({"\udfff": 1}, "it holds half of a surrogate pair"),
    "a list that holds itself": (CYCLE, ""),
    "100 lists within each other": (nested(100), "it is nested too deeply"),
    "101 lists within each other": (nested(101), "it is nested too deeply"),
    "100,000 lists within each other": (nested(100_000), "it is nested too deeply, or holds"),
    "a mapping that raises": (Mapping(a=1), "it raises LookupError: no items"),
}


@pytest.fixture
def resize(bq: BeanQueue) -> Any:
    @bq.processor(channel="images")
    def resize(width: int, height: Any = 1) -> Any:
        return height

    return resize


@pytest.mark.parametrize("way", ["run", "enqueue", "enqueue_many"])
@pytest.mark.parametrize(("value", "words"), NO_ARGUMENT.values(), ids=NO_ARGUMENT)
def test_an_argument_that_cannot_be_stored_is_refused_by_name(
    resize: Any, way: str, value: Any, words: str
) -> None:
    with pytest.raises(ArgumentError) as caught:  # noqa: PT012
        if way == "enqueue_many":
            resize.enqueue_many([{"width": 1}, {"width": 1, "height": value}])
        else:
            getattr(resize, way)(width=1, height=value)
    item = "Item 1: " if way == "enqueue_many" else ""
    message = str(caught.value)
    assert message.startswith(
        f"{item}{__name__}.resize: the argument 'height' cannot be stored as JSON: {words}"
    )
    assert message.endswith(
        ". Pass something plain in its place, such as an id, a string or a number."
    )


@pytest.fixture
def tag(bq: BeanQueue) -> Any:
    @bq.processor()
    def tag(**tags: str) -> None:
        pass

    return tag


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "half of a surrogate pair"])
def test_an_argument_whose_name_cannot_be_stored_is_refused(tag: Any, name: str) -> None:
    with pytest.raises(ArgumentError, match="cannot be stored as JSON"):
        tag.run(**{name: "x"})


def test_an_argument_whose_name_is_no_text_is_refused(tag: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^Item 0: .*keywords must be strings"):
        tag.enqueue_many([{1: "x"}])


@pytest.mark.parametrize(
    ("text", "refused"), [("\\u0000", False), ("\0", True)], ids=["what looks like NUL", "NUL"]
)
def test_many_backslashes_take_little_memory(resize: Any, text: str, refused: bool) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ArgumentError) if refused else contextlib.nullcontext():
            resize.run(width=1, height="\\" * 1_000_000 + text)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_an_argument_that_is_too_large_is_refused_by_name(
    resize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "LARGEST", 100)
    assert resize.run(width=1, height="x" * 70).kwargs["height"]
    with pytest.raises(ArgumentError, match=r"'height' .* too large: 113 characters of JSON, of"):
        resize.run(width=1, height="x" * 99)


@pytest.mark.slow
def test_a_hundred_megabytes_go_in_and_come_out(
    app: Flask, db: SQLAlchemy, resize: Any, work: Work, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue(width=1, height="x" * 100_000_000)
        db.session.commit()
    work()
    [found] = query(
        database_url,
        "SELECT state, kwargs->'height' = result, octet_length(result::text) FROM bq_tasks",
    )
    assert found == ("DONE", True, 100_000_002)


@pytest.fixture
def seen() -> list[Any]:
    """The arguments that have reached ``look``."""
    return []


@pytest.fixture
def look(bq: BeanQueue, seen: list[Any]) -> Any:
    @bq.processor()
    def look(**values: Any) -> None:
        seen.append(values)

    return look


@pytest.mark.parametrize("text", ["\\u0000", "\\\\u0000", "\\ud800", "😀", "é\u2028\x7f"])
def test_text_that_only_looks_odd_is_taken(
    app: Flask, db: SQLAlchemy, look: Any, seen: list[Any], work: Work, text: str
) -> None:
    with app.app_context():
        look.enqueue(text=text)
        look.enqueue_many([{"text": text}])
        db.session.commit()
    work()
    assert seen == [{"text": text}] * 2


@pytest.mark.parametrize("depth", [99, 101, 900, 930, 945, 960])
def test_nested_arguments_are_refused_or_get_done(
    app: Flask, db: SQLAlchemy, look: Any, work: Work, database_url: str, depth: int
) -> None:
    with app.app_context():
        try:
            look.enqueue(value=nested(depth))
        except ArgumentError:
            assert depth > 99
            return
        db.session.commit()
    work()
    assert query(database_url, "SELECT state FROM bq_tasks") == [("DONE",)]


# On the command line.

SUBMITTED = {
    "no JSON": ("{'width': 1}", "Invalid value for '--kwargs': This is not JSON"),
    "a list": ("[1]", 'This is no JSON object, such as {"width": 200}'),
    "text": ('"width"', "This is no JSON object"),
    "null": ("null", "This is no JSON object"),
    "NaN": ('{"width": NaN}', "the argument 'width' cannot be stored as JSON: NaN and Infinity"),
    "1e400": ('{"width": 1e400}', "NaN and Infinity are not JSON compliant"),
    "a number of 5,000 digits": (f'{{"width": {"9" * 5_000}}}', "Exceeds the limit (4300 digits)"),
    "NUL": ('{"width": "\\u0000"}', "the argument 'width' cannot be stored as JSON: it holds the"),
    "half of a surrogate pair": ('{"width": "\\ud800"}', "it holds half of a surrogate pair"),
    "bytes that are no text": ('{"width": "\udce9"}', "it holds half of a surrogate pair"),
    "101 lists within each other": (f'{{"width": {nested(101)}}}', "it is nested too deeply"),
    "50,000 lists": ('{"width": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
    "an argument too few": ("{}", "missing a required argument: 'width'"),
    "an argument too many": ('{"width": 1, "depth": 2}', "unexpected keyword argument 'depth'"),
}


def test_submit_says_what_is_wrong_with_its_arguments(
    app: Flask, resize: Any, database_url: str
) -> None:
    for name, (kwargs, words) in SUBMITTED.items():
        result = app.test_cli_runner().invoke(
            args=["bq", "submit", "images", __name__, "resize", "-k", kwargs]
        )
        assert isinstance(result.exception, SystemExit), name
        assert result.exit_code in (1, 2), name
        assert words in result.output, name
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


# Tasks that are made by hand: what cannot be stored raises in the view, with the commit.

BY_HAND: dict[str, dict[str, Any]] = {
    "NaN": {"kwargs": {"a": float("nan")}},
    "NUL": {"kwargs": {"a": "\0"}},
    "half of a surrogate pair": {"kwargs": {"a": "\ud800"}},
    "an object": {"kwargs": {"a": object()}},
    "no module": {"module": None},
    "a channel without a name": {"channel": ""},
    "a channel with NUL": {"channel": "a\0b"},
    "a state that there is not": {"state": "SLEEPING"},
    "a priority that is too large": {"priority": MOST + 1},
    "a time that is none": {"scheduled_at": "tomorrow-ish"},
}


def test_a_task_that_is_made_badly_raises_in_the_view(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    for columns in BY_HAND.values():
        with app.app_context():
            db.session.add(bq.Task(**{"module": __name__, "name": "resize"} | columns))
            with pytest.raises((sa.exc.SQLAlchemyError, TypeError, ValueError)):
                db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


# Values go through unchanged, or are refused.

GOOD_NUMBERS = st.integers(-(10**300), 10**300) | st.floats(-1e15, 1e15, allow_nan=False)
GOOD_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
GOOD = st.recursive(
    st.none() | st.booleans() | GOOD_NUMBERS | GOOD_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(GOOD_TEXT, inner, max_size=4),
    max_leaves=8,
)


def test_arguments_reach_the_processor_unchanged(
    app: Flask, db: SQLAlchemy, look: Any, seen: list[Any], work: Work
) -> None:
    @settings(max_examples=15)
    @given(batch=st.lists(st.dictionaries(GOOD_TEXT, GOOD, max_size=4), min_size=4, max_size=20))
    def check(batch: list[dict[str, Any]]) -> None:
        seen.clear()
        half = len(batch) // 2
        with app.app_context():
            for values in batch[:half]:
                look.enqueue(**values)
            db.session.flush()
            look.enqueue_many(batch[half:])
            db.session.commit()
        work(concurrency=1)
        assert same(batch, seen)

    check()


class Size(enum.IntEnum):
    SMALL = 1


ODD = st.recursive(
    st.none()
    | NUMBERS
    | TEXT
    | st.binary()
    | st.datetimes()
    | st.uuids()
    | st.decimals()
    | st.fractions()
    | st.sampled_from([Color.RED, Size.SMALL, object(), NotImplemented, range(3), 1j])
    | st.integers(0, 150).map(nested),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.none() | st.booleans() | st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=4,
)


def test_odd_arguments_are_refused_or_stored(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, look: Any
) -> None:
    @settings(max_examples=30)
    @given(batch=st.lists(st.dictionaries(st.text(), ODD, max_size=2), min_size=5, max_size=20))
    @example(batch=[{"a": "\0"}, {"\0": "a"}, {"a": "\ud800"}, {"\ud800": "a"}])
    def check(batch: list[dict[str, Any]]) -> None:
        with app.app_context():
            for values in batch:
                try:
                    task: Any = look.run(**values)
                except ArgumentError:
                    with pytest.raises(ArgumentError):
                        look.enqueue_many([values])
                    continue
                db.session.add(task)
                db.session.flush()
                [other] = look.enqueue_many([values])
                stored = db.session.scalars(
                    sa.select(sa.cast(bq.Task.kwargs, sa.Text)).where(
                        bq.Task.id.in_([task.id, other])
                    )
                ).all()
                assert stored[0] == stored[1]
                json.loads(stored[0])
            db.session.rollback()

    check()


def test_an_argument_is_refused_by_name_or_reaches_the_processor(
    app: Flask, db: SQLAlchemy, look: Any, seen: list[Any], work: Work
) -> None:
    refused = pytest.raises(ArgumentError, match="the argument 'value' cannot be stored as JSON")

    @settings(max_examples=12)
    @given(values=st.lists(VALUES, min_size=10, max_size=30))
    @example(values=["\0", "\ud800", float("nan"), float("-inf"), 10**4_300, 1e23, -0.0, 5e-324])
    @example(values=[{"\0": 1}, {"\ud800": 1}, "\\u0000", "\\ud800", 10**4_299, 1e308, nested(99)])
    @example(values=[nested(100)])
    def check(values: list[Any]) -> None:
        seen.clear()
        taken = []
        with app.app_context():
            for value in values:
                for enqueue in (look.enqueue, lambda value: look.enqueue_many([{"value": value}])):
                    with refused if bad({"value": value}) else contextlib.nullcontext():
                        enqueue(value=value)
                        taken.append({"value": value})
                db.session.flush()
            db.session.commit()
        work(concurrency=1)
        assert same(taken, seen)

    check()
