"""What the database's errors mean."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from flask_beanqueue.engine.database import is_hopeless, is_refusal, is_timeout, reason


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


def test_a_lost_connection_refuses_nothing() -> None:
    assert not is_refusal(error("22003", lost=True))


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
