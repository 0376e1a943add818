"""What the database's errors mean."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from flask_beanqueue.errors import (
    is_hopeless,
    is_misfit,
    is_refusal,
    is_timeout,
    reason,
    without_values,
)


class DriverError(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        self.sqlstate = sqlstate


def error(sqlstate: str | None, *, lost: bool = False) -> sa.exc.DBAPIError:
    return sa.exc.DBAPIError("SELECT", {}, DriverError(sqlstate), connection_invalidated=lost)


@pytest.mark.parametrize(
    ("sqlstate", "refuses"),
    [
        ("22003", True),  # numeric value out of range
        ("23514", True),  # check violation
        ("42P01", True),  # undefined table, perhaps a trigger's
        ("54000", True),  # program limit exceeded
        ("57014", True),  # query canceled: too slow, or by a trigger
        ("P0001", True),  # raised by a trigger
        ("45000", True),  # the like, as other databases have it
        ("A0001", True),  # the like, by a code of the app's own
        ("XX001", True),  # data corrupted
        ("08006", False),  # connection failure
        ("25006", False),  # read-only transaction: a standby, for now
        ("40001", False),  # serialization failure
        ("53100", False),  # disk full
        ("57P01", False),  # admin shutdown
        ("58030", False),  # I/O error
        ("F0000", False),  # the configuration is in error
        (None, False),  # the driver's own
    ],
)
def test_what_is_nobodys_passing_trouble_is_a_refusal(sqlstate: str | None, refuses: bool) -> None:
    assert is_refusal(error(sqlstate)) is refuses


@pytest.mark.parametrize(
    ("raised", "sqlstate", "hopeless"),
    [
        (sa.exc.ProgrammingError, "42P01", True),
        (sa.exc.ProgrammingError, None, True),  # no such URL
        (sa.exc.ProgrammingError, "P0001", False),  # by a trigger, as psycopg 3 has it
        (sa.exc.InternalError, "P0001", False),  # and psycopg2
        (sa.exc.ProgrammingError, "26000", False),  # no such prepared statement on this connection
        (sa.exc.ProgrammingError, "42P05", False),  # or one that is there already
        (sa.exc.ProgrammingError, "21000", False),  # by a trigger's subquery
        (sa.exc.NotSupportedError, "0A000", False),  # a plan that was made for another table
        (sa.exc.OperationalError, None, False),
    ],
)
def test_only_what_fits_no_table_is_not_tried_again(
    raised: type[sa.exc.DBAPIError], sqlstate: str | None, hopeless: bool
) -> None:
    assert is_hopeless(raised("SELECT", {}, DriverError(sqlstate))) is hopeless
    assert not is_hopeless(raised("SELECT", {}, DriverError(sqlstate), connection_invalidated=True))


@pytest.mark.parametrize(
    ("sqlstate", "misfit"),
    [
        ("0A000", True),  # feature not supported
        ("3F000", True),  # no such schema
        ("42501", True),  # insufficient privilege
        ("42703", True),  # undefined column
        ("22003", False),
        ("40001", False),
        (None, False),
    ],
)
def test_a_misfit_may_be_refused_whatever_the_values(sqlstate: str | None, misfit: bool) -> None:
    assert is_misfit(error(sqlstate)) is misfit


def test_a_lost_connection_refuses_nothing() -> None:
    assert not is_refusal(error("22003", lost=True))
    assert not is_misfit(error("42703", lost=True))


@pytest.mark.parametrize(
    ("sqlstate", "timeout"),
    [
        ("55P03", True),  # lock not available
        ("57014", True),  # query canceled
        ("40P01", False),  # deadlock
    ],
)
def test_a_timeout_is_told_by_its_code(sqlstate: str, timeout: bool) -> None:
    assert is_timeout(error(sqlstate)) is timeout


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("22P02", "invalid text representation (22P02)"),
        ("22003", "numeric value out of range (22003)"),
        ("22ABC", "data error (22ABC)"),  # of which the drivers know nothing
    ],
)
@pytest.mark.parametrize(
    "message",
    [
        'invalid input syntax for type integer: "secret"',
        "ungültige Eingabesyntax für Typ integer: »secret«",
        "syntaxe en entrée invalide pour le type integer : « secret »",
        "型integerの入力構文が不正です: secret",
    ],
)
def test_of_an_error_about_a_value_its_kind_is_said_and_no_value_in_any_language(
    database_url: str, message: str, code: str, kind: str
) -> None:
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    statement = f"DO $$ BEGIN RAISE '%', '{message}' USING ERRCODE = '{code}'; END $$"
    with engine.connect() as connection, pytest.raises(sa.exc.DataError) as raised:
        connection.exec_driver_sql(statement.replace("%", "%%"))
    assert reason(raised.value) == kind
    assert raised.value.orig is not None
    assert reason(raised.value.orig) == kind


#: In no line of this file.
SECRET = "".join(["horse", "staple"])


def refused(database_url: str) -> sa.exc.DataError:
    """What the database says of a value."""
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    with engine.connect() as connection, pytest.raises(sa.exc.DataError) as raised:
        connection.execute(sa.text("SELECT CAST(:password AS int)"), {"password": SECRET})
    return raised.value


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


class Own(Exception):
    """One that cannot be made as others are."""

    def __init__(self, *, number: int) -> None:
        super().__init__(f"number {number}")
        self.number = number


def test_an_error_is_shown_without_values_and_itself_stays_as_it_is(database_url: str) -> None:
    error = refused(database_url)
    before = shown(error)
    assert SECRET in before
    copy = without_values(error)
    assert SECRET not in shown(copy)
    assert type(copy) is type(error)
    assert isinstance(copy, sa.exc.DataError)
    assert type(copy.orig) is type(error.orig)
    assert copy.__traceback__ is error.__traceback__
    assert "invalid text representation (22P02)" in str(copy)
    assert shown(error) == before
    assert not error.hide_parameters
    assert SECRET in str(error.orig)


@pytest.mark.parametrize("way", ["cause", "context", "group", "group in a group"])
def test_errors_behind_and_in_an_error_are_shown_without_values(
    database_url: str, way: str
) -> None:
    error, own = refused(database_url), Own(number=5)
    own.add_note("a note")
    whole: BaseException = own
    if way == "cause":
        own.__cause__ = error
    elif way == "context":
        own.__context__ = error
    else:
        whole = ExceptionGroup("several", [LookupError("none"), own, error])
        error.__context__ = whole  # and round about
    if way == "group in a group":
        whole = BaseExceptionGroup("more", [whole, KeyboardInterrupt()])
    before = shown(whole)
    assert SECRET in before
    after = shown(without_values(whole))
    assert SECRET not in after
    lines = [line for line in before.splitlines() if SECRET not in line]
    for words in ("number 5", "a note", "LookupError: none", "more (2 sub-exceptions)"):
        assert (words in after) is any(words in line for line in lines)
    assert after.count("Traceback") == before.count("Traceback")
    assert shown(whole) == before


class Slotted(Exception):
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __str__(self) -> str:
        return f"number {self.number}"


class Single(Exception):
    def __new__(cls, *args: object) -> Single:
        raise RuntimeError("there is one")


class Undecodable(UnicodeDecodeError):
    def __init__(self, text: bytes) -> None:
        super().__init__("utf-8", text, 0, 1, "odd")


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "error",
    [
        raised(lambda: os.listdir("/no/such/folder")),
        raised(lambda: os.rename("/no/such/file", "/nowhere")),
        raised(lambda: b"\xff".decode()),
        raised(lambda: compile("1 +", "some.py", "exec")),
        raised(lambda: {}["key"]),
        Slotted(5),
        Undecodable(b"\xff"),
        Exception.__new__(Single, "one"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_any_kind_say_the_same_where_one_of_the_database_is_behind_them(
    error: Exception, database_url: str
) -> None:
    error.__cause__ = refused(database_url)
    after = shown(without_values(error))
    assert SECRET not in after
    name, words = type(error).__name__, traceback.format_exception_only(error)[-1]
    assert f"{name}: {words.partition(f'{name}: ')[2]}" in after


def test_an_error_whose_attributes_raise_is_shown_all_the_same(database_url: str) -> None:
    class Odd(Exception):
        @property
        def diag(self) -> None:
            raise RuntimeError("no diag")

    odd = Odd("odd")
    odd.__cause__ = refused(database_url)
    after = shown(without_values(odd))
    assert "Odd: odd" in after
    assert SECRET not in after


def test_an_error_that_has_nothing_of_the_database_is_shown_itself() -> None:
    error = Own(number=5)
    assert without_values(error) is error


def test_a_group_is_shown_as_it_is_where_what_is_in_it_comes_first(database_url: str) -> None:
    inside, error = LookupError("none"), LookupError("last")
    group = ExceptionGroup("several", [inside, refused(database_url)])
    group.add_note("a note")
    error.__context__, error.__cause__ = inside, group
    after = shown(without_values(error))
    assert "ExceptionGroup: several (2 sub-exceptions)" in after
    assert "a note" in after
    assert SECRET not in after


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


class Undecided(Exception):
    def __bool__(self) -> bool:
        raise ValueError("neither")


@pytest.mark.parametrize(
    ("cause", "words"),
    [(Mute(), "(its message cannot be read: ValueError)"), (Undecided("why"), "why")],
)
def test_a_reason_can_be_had_of_whatever_an_app_raises_when_it_connects(
    cause: Exception, words: str
) -> None:
    assert reason(cause) == words
    assert reason(sa.exc.OperationalError(None, None, cause)) == words
