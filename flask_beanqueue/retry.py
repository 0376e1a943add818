"""Retry policies: when a task that failed runs again, if at all."""

from __future__ import annotations

import datetime
import math
import random
import typing as t

import sqlalchemy as sa

from .options import check_count

#: What a policy answers: after how long, or when (with a time zone), or None for never.
Time = datetime.timedelta | datetime.datetime | None
#: It may also be SQL that comes to one of them, such as ``func.now() + timedelta(seconds=1)``.
Verdict = Time | sa.SQLColumnExpression[t.Any] | sa.TextClause
SQL = (sa.ClauseElement, sa.SQLColumnExpression)


class Attempted(t.Protocol):
    """What a policy may count on: a task, as it is after the attempt that failed."""

    @property
    def attempts(self) -> int: ...


#: Any callable that takes the task and answers when to try again.
RetryPolicy = t.Callable[[t.Any], Verdict]


def check_policy(policy: t.Any) -> None:
    if isinstance(policy, type):  # it can be called, but answers no time
        name = policy.__name__
        raise TypeError(f"retry_policy is the class {name}; make one: {name}(…)")
    if policy is not None and not callable(policy):
        raise TypeError(f"retry_policy must be callable, such as DelayRetry(…), not {policy!r}")


class DelayRetry:
    """Try again after a fixed time.

    :param delay: the time between the failure and the next attempt.
    """

    def __init__(self, delay: datetime.timedelta) -> None:
        if not isinstance(delay, datetime.timedelta):
            raise TypeError(f"delay must be a datetime.timedelta, not {delay!r}")
        if delay < datetime.timedelta(0):
            raise ValueError(f"delay must not be negative: {delay}")
        self.delay = delay

    def __call__(self, task: Attempted) -> datetime.timedelta:
        return self.delay


class ExponentialBackoffRetry:
    """Try again after a time that grows with each attempt.

    The n-th failure is followed by ``base * factor ** (n - 1)``, at most ``maximum``, of which a
    random share between ``1 - jitter`` and 1 is taken, so that tasks that failed together do not
    come back together.

    :param base: the delay after the first failure.
    :param factor: by how much the delay grows with each attempt.
    :param maximum: the longest delay.
    :param jitter: the share of the delay that is left to chance, from 0 to 1.
    """

    def __init__(
        self,
        base: datetime.timedelta = datetime.timedelta(seconds=1),
        *,
        factor: float = 2.0,
        maximum: datetime.timedelta = datetime.timedelta(hours=1),
        jitter: float = 0.5,
    ) -> None:
        for name, value in (("base", base), ("maximum", maximum)):
            if not isinstance(value, datetime.timedelta):
                raise TypeError(f"{name} must be a datetime.timedelta, not {value!r}")
        if base < datetime.timedelta(0):
            raise ValueError(f"base must not be negative, but is {base}")
        if maximum < base:
            raise ValueError(f"maximum, which is {maximum}, must not be less than base, {base}")
        for name, number in (("factor", factor), ("jitter", jitter)):
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                raise TypeError(f"{name} must be a number, not {number!r}")
        if not 1 <= factor < math.inf:
            raise ValueError(f"factor must be 1 or more, and finite, not {factor}")
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {jitter}")
        self.base = base
        self.factor = factor
        self.maximum = maximum
        self.jitter = jitter

    def __call__(self, task: Attempted) -> datetime.timedelta:
        try:
            seconds = self.base.total_seconds() * self.factor ** (task.attempts - 1)
        except OverflowError:
            seconds = self.maximum.total_seconds()
        seconds = min(seconds, self.maximum.total_seconds())
        return datetime.timedelta(seconds=seconds * (1 - self.jitter * random.random()))


class LimitAttempt:
    """Give up after a number of attempts; until then, ask another policy.

    :param maximum_attempt: how often the task runs at most, the first time included.
    :param retry_policy: the policy that says when; at once, if there is none.
    """

    def __init__(self, maximum_attempt: int, retry_policy: RetryPolicy | None = None) -> None:
        check_count("maximum_attempt", maximum_attempt)
        check_policy(retry_policy)
        self.maximum_attempt = maximum_attempt
        self.retry_policy = retry_policy

    def __call__(self, task: Attempted) -> Verdict:
        if task.attempts >= self.maximum_attempt:
            return None
        if self.retry_policy is None:
            return datetime.timedelta(0)
        return self.retry_policy(task)
