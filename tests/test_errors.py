"""What the database's errors mean."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from flask_beanqueue.errors import is_lock_timeout, is_misfit, is_refusal


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
        ("54000", True),  # program limit exceeded
        ("P0001", True),  # raised by a trigger
        ("XX001", True),  # data corrupted
        ("42501", False),  # insufficient privilege: any value would be refused
        ("25006", False),  # read-only transaction: a standby, for now
        ("40001", False),  # serialization failure
        ("53100", False),  # disk full
        ("55P03", False),  # lock not available
        ("57P01", False),  # admin shutdown
        (None, False),  # the driver's own
    ],
)
def test_a_refusal_is_what_would_come_again(sqlstate: str | None, refuses: bool) -> None:
    assert is_refusal(error(sqlstate)) is refuses


@pytest.mark.parametrize(
    ("sqlstate", "misfit"),
    [
        ("0A000", True),  # a cached plan of a table that has changed
        ("42501", True),  # insufficient privilege
        ("42703", True),  # undefined column
        ("22003", False),
        ("40001", False),
        (None, False),
    ],
)
def test_a_misfit_is_a_statement_that_is_refused_whatever_the_values(
    sqlstate: str | None, misfit: bool
) -> None:
    assert is_misfit(error(sqlstate)) is misfit


def test_a_lost_connection_refuses_nothing() -> None:
    assert not is_refusal(error("22003", lost=True))
    assert not is_misfit(error("42703", lost=True))


def test_a_lock_timeout_is_told_by_its_code() -> None:
    assert is_lock_timeout(error("55P03"))
    assert not is_lock_timeout(error("40P01"))
