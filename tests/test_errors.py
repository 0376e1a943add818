"""What the database's errors mean."""

from __future__ import annotations

import traceback

import pytest
import sqlalchemy as sa

from flask_beanqueue.errors import is_misfit, is_refusal, is_timeout, reason, without_values


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


def test_an_error_that_cannot_be_copied_is_named(database_url: str) -> None:
    class Single(Exception):
        def __new__(cls, *args: object) -> Single:
            raise RuntimeError("there is one")

    single = Exception.__new__(Single)
    single.__cause__ = refused(database_url)
    after = shown(without_values(single))
    assert "Exception: Single" in after
    assert "DataError" in after
    assert SECRET not in after


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
