"""The options of a task: what it may have of its own, beside its arguments."""

from __future__ import annotations

import dataclasses
import datetime
import typing as t

import sqlalchemy as sa

#: The longest delay, so that it ends in a year that Python knows.
CENTURIES = datetime.timedelta(days=365_000)
#: Bytes of a channel's name: a row of an index takes 2,704, and the channel is not alone in it.
LONGEST_CHANNEL = 2_500


@dataclasses.dataclass(frozen=True)
class Options:
    """What one task may have of its own, beside its arguments."""

    channel: str
    priority: int = 0
    scheduled_at: datetime.datetime | None = None
    delay: datetime.timedelta | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not value.__class__:
                raise TypeError(
                    f"{name} is no {value.__class__.__name__}, but a {type(value).__name__} of one."
                    " Give what is behind it: that of a LocalProxy is its _get_current_object()."
                )
        check_channel(self.channel)
        if not is_whole(self.priority) or not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority must be a whole number of 32 bits, not {self.priority!r}")
        if self.delay is not None:
            if self.scheduled_at is not None:
                raise ValueError("Give scheduled_at or delay, not both.")
            if not isinstance(self.delay, datetime.timedelta):
                raise TypeError(f"delay must be a datetime.timedelta, not {self.delay!r}")
            if abs(self.delay) > CENTURIES:
                raise ValueError(f"delay is longer than ten centuries: {self.delay!r}")
        if self.scheduled_at is not None:
            check_aware("scheduled_at", self.scheduled_at)

    def due(self) -> t.Any:
        """The value of ``scheduled_at``: a delay counts by the database's clock."""
        if self.delay is not None:
            return sa.func.clock_timestamp() + self.delay
        return self.scheduled_at


def check_channel(channel: t.Any) -> None:
    check_text("channel", channel)
    if (size := len(channel.encode())) > LONGEST_CHANNEL:
        raise ValueError(
            f"channel takes {size} bytes, but at most {LONGEST_CHANNEL} go into an index of"
            f" PostgreSQL: {channel[:50]!r}…"
        )


def check_text(name: str, text: t.Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text, not {text!r}")
    if not text or "\0" in text:
        raise ValueError(f"{name} must not be empty or hold U+0000: {text!r}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{name} must not hold half of a surrogate pair: {text!r}")


def is_whole(number: t.Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)  # which is an int to Python


def check_count(name: str, number: t.Any) -> None:
    if not is_whole(number):
        raise TypeError(f"{name} must be a whole number, not {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, not {number}")


def check_aware(name: str, moment: t.Any) -> None:
    if not isinstance(moment, datetime.datetime):
        raise TypeError(f"{name} must be a datetime.datetime, not {moment!r}")
    if moment.utcoffset() is None:
        raise ValueError(
            f"{name} has no time zone: {moment!r}. Use datetime.now(timezone.utc) as its base,"
            " or give delay=timedelta(…)."
        )
    # In another time zone, PostgreSQL's answer may be a year that Python does not know.
    if not datetime.MINYEAR < moment.year < datetime.MAXYEAR:
        raise ValueError(f"{name} is out of range: {moment!r}")
