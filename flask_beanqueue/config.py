"""The queue's settings: what they are called, what they hold, where they come from."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import types
import typing as t
import warnings

import sqlalchemy as sa

from .exceptions import ConfigError

PREFIX = "BQ_"

#: Seconds that a worker can be told to sleep: select() takes no more than 24 days.
LONGEST = 1e6
#: Beyond it, a count is a slip, and PostgreSQL's integers end.
LARGEST = 2**31 - 1


def _limited(default: t.Any, limit: tuple[float, float], words: str) -> t.Any:
    """A setting that takes numbers within limits; ``words`` say them."""
    return dataclasses.field(default=default, metadata={"limit": limit, "words": words})


def _count(default: int) -> t.Any:
    return _limited(default, (1, LARGEST), f"1 or more, at most {LARGEST}")


def _pause(default: float | None) -> t.Any:
    words = f"a number of seconds above 0, at most {LONGEST:.0f}"
    return _limited(default, (sys.float_info.min, LONGEST), words)


def _allowance(default: float) -> t.Any:
    return _limited(default, (0.0, sys.float_info.max), "a number of seconds, 0 or more")


#: How the names of BeanQueue's settings begin that are none here, and what to use in their place.
OF_BEANQUEUE = {
    "MAX_WORKER_THREADS": f"Use {PREFIX}CONCURRENCY.",
    "DATABASE_URL": "Use SQLALCHEMY_DATABASE_URI, or name one of SQLALCHEMY_BINDS with bind_key=.",
    "POSTGRES_": "Use SQLALCHEMY_DATABASE_URI, or name one of SQLALCHEMY_BINDS with bind_key=.",
    "METRICS_HTTP_SERVER_": "Workers have no such server; count by signals, or ask bq.Task.",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one app's queue, from ``app.config["BQ_…"]``, else the environment, else here.

    All durations are in seconds.
    """

    #: Packages to import, with their submodules, before a worker starts.
    PROCESSOR_PACKAGES: list[str] = dataclasses.field(default_factory=list)
    #: Most tasks that a worker claims, or completes, with one statement.
    BATCH_SIZE: int = _count(1000)
    #: Most bytes of arguments that a worker holds, beside those of the tasks that run.
    CLAIM_BYTES: int = _count(16_000_000)
    #: Threads that run tasks in one worker process.
    CONCURRENCY: int = _count(4)
    #: Whether workers LISTEN; if not, they poll.
    LISTEN: bool = True
    #: Where they LISTEN, if a pooler stands before the app's database: its own address.
    LISTEN_DATABASE_URL: str | None = None
    #: Whether new tasks NOTIFY.
    NOTIFY: bool = True
    #: Longest sleep of an idle worker; unset: 30 where it listens, 1 where it does not.
    POLL_TIMEOUT: float | None = _pause(None)
    #: Time between two heartbeats of a worker.
    WORKER_HEARTBEAT_PERIOD: float = _pause(4.0)
    #: Silence after which a worker counts as dead. The same for all workers of a database.
    WORKER_HEARTBEAT_TIMEOUT: float = _pause(20.0)
    #: Whether a worker process ends itself when none of its threads gets a turn for that long.
    WATCHDOG: bool = True
    #: Time that running tasks have to end after SIGTERM.
    SHUTDOWN_TIMEOUT: float = _allowance(25.0)
    #: Time after which a worker that can begin no other task names those that it is at.
    STUCK_AFTER: float = _pause(600.0)
    #: Crashes after which a task is FAILED.
    MAX_CRASHES: int = _count(3)
    #: How long a task waits for a worker that knows its processor.
    UNKNOWN_GRACE: float = _allowance(600.0)
    #: Whether success is written as an Event, too. The task's row says it anyway.
    SUCCESS_EVENTS: bool = False
    #: Dotted names of own models, where the constructor did not get the classes.
    TASK_MODEL: str | None = None
    WORKER_MODEL: str | None = None
    EVENT_MODEL: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and "limit" in field.metadata:
                least, most = field.metadata["limit"]
                if not least <= value <= most:
                    words = field.metadata["words"]
                    raise ConfigError(f"{PREFIX}{field.name} must be {words}, not {value}.")
        if self.WORKER_HEARTBEAT_TIMEOUT < 2 * self.WORKER_HEARTBEAT_PERIOD:
            raise ConfigError(
                f"{PREFIX}WORKER_HEARTBEAT_TIMEOUT ({self.WORKER_HEARTBEAT_TIMEOUT:g} s) must be"
                f" at least twice {PREFIX}WORKER_HEARTBEAT_PERIOD"
                f" ({self.WORKER_HEARTBEAT_PERIOD:g} s), or a healthy worker would be declared"
                " dead."
            )
        if self.LISTEN_DATABASE_URL is not None and not is_postgresql(self.LISTEN_DATABASE_URL):
            raise ConfigError(  # without the value, which may hold a password
                f"{PREFIX}LISTEN_DATABASE_URL must be a URL of PostgreSQL for psycopg2 or psycopg"
                " 3, such as postgresql+psycopg2://user@host/name."
            )

    @property
    def largest_held(self) -> int:
        """The largest arguments, or result, that a worker holds for one task, in bytes: twice
        BATCH_SIZE of them share CLAIM_BYTES. The thread that runs a task reads, and writes, what
        is larger."""
        return self.CLAIM_BYTES // (2 * self.BATCH_SIZE)

    @property
    def poll_timeout(self) -> float:
        """Longest sleep of an idle worker, in seconds."""
        return self.POLL_TIMEOUT or (30.0 if self.LISTEN else 1.0)

    @classmethod
    def load(
        cls, settings: t.Mapping[str, t.Any], environ: t.Mapping[str, str] = os.environ
    ) -> Config:
        """Read the settings of one app.

        :param settings: ``app.config``.
        :param environ: where to look for what ``settings`` does not name.
        :raises ConfigError: for a value of the wrong type, by the setting's name.
        """
        hints = t.get_type_hints(cls)
        values: dict[str, t.Any] = {}
        for field in dataclasses.fields(cls):
            name = PREFIX + field.name
            if name in settings:
                values[field.name] = check(name, settings[name], hints[field.name])
            elif environ.get(name):  # an empty one is as good as none
                values[field.name] = parse(name, environ[name], hints[field.name])
        known = [PREFIX + field.name for field in dataclasses.fields(cls)]
        for name in {*settings, *environ} - {*known}:
            if not name.startswith(PREFIX):
                continue
            for theirs, instead in OF_BEANQUEUE.items():
                if name.startswith(PREFIX + theirs):
                    message = f"{name} is a setting of BeanQueue, and none of flask_beanqueue."
                    warnings.warn(f"{message} {instead}", stacklevel=3)
            if near := difflib.get_close_matches(name, known, 1, 0.82):
                message = f"{name} is no setting of flask_beanqueue."
                warnings.warn(f"{message} Did you mean {near[0]}?", stacklevel=3)
        return cls(**values)


def check(name: str, value: t.Any, hint: t.Any) -> t.Any:
    """Return a value from ``app.config`` if it has the type that the setting's hint names."""
    kinds = t.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # a whole number beyond 1e308
                return float(value)
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is types.NoneType and value is None:
            return value
        if kind in (str, bool) and isinstance(value, kind):
            return value
        if kind == list[str] and isinstance(value, (list, tuple)) and all(map(is_name, value)):
            return list(value)
    raise ConfigError(f"{name} must be {wanted(kinds)}, not {value!r}.")


def is_postgresql(url: str) -> bool:
    """Whether it is a URL for a driver that the queue works with."""
    try:
        name = sa.make_url(url).drivername
    except sa.exc.ArgumentError:
        return False
    return name in ("postgresql", "postgresql+psycopg2", "postgresql+psycopg")


def is_name(value: t.Any) -> bool:
    """Whether it can be a package's name: an empty part would make it none, or a relative one."""
    return isinstance(value, str) and all(value.split("."))


def parse(name: str, text: str, hint: t.Any) -> t.Any:
    """Return the value that an environment variable's text stands for."""
    kinds = t.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    value: t.Any = text
    if str not in kinds:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text.lower() if bool in kinds else text)
        if bool in kinds and value in (0, 1):
            value = bool(value)
    return check(name, value, hint)


def wanted(kinds: t.Iterable[t.Any]) -> str:
    words = {
        int: "a whole number",
        float: "a number of seconds",
        bool: "true or false",
        str: "text",
        list[str]: 'a list of package names (in the environment: JSON, such as ["my_app.tasks"])',
        types.NoneType: "None",
    }
    return " or ".join(words[kind] for kind in kinds)
