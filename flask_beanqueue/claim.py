"""The claim: what a worker holds of a task while it runs."""

from __future__ import annotations

import contextvars
import dataclasses
import json
import typing as t
import uuid

from flask import Flask, current_app


class ClaimLost(Exception):
    """The task is no longer as it was claimed; nothing that its processor wrote may be committed.

    It was given to another worker, cancelled or deleted, or its processor has changed it past the
    ORM.
    """


@dataclasses.dataclass(slots=True, eq=False)
class Claim:
    """One claim of one task: the row's columns as the claim returned them."""

    #: Where the row lies. It moves when the row is written, so it is a hint and never a proof.
    ctid: str
    #: The row's id as text: in and out of a UUID it would take longer than the whole rest.
    key: str
    #: How often the row has been claimed, this time included: the fence.
    claims: int
    channel: str
    module: str
    func_name: str
    #: The arguments as JSON. They are decoded by who runs the task: raw SQL may have written
    #: what Python cannot read. None if they are too large for the claim to bring them.
    arguments: str | None
    priority: int
    #: Microseconds since 1970; together with the id, the place in the queue.
    scheduled_at: int
    attempts: int
    crashes: int
    interruptions: int
    #: Microseconds for which workers have met this task without knowing its processor.
    unknown_for: int | None
    #: The app that runs it.
    app: t.Any = None
    #: What the driver raised when there was passing trouble with the queue's database meanwhile,
    #: such as a lost connection.
    losses: tuple[BaseException, ...] = ()
    #: Its outcome is being written with what the processor wrote.
    completing: bool = False
    #: The session's transaction that has changed the task's row last, and so may keep it locked.
    changed_in: t.Any = None
    #: The session's transaction, or savepoint, that holds the task's outcome.
    ended_in: t.Any = None
    #: The session's transaction that has written it through the fence, as its last statement.
    fenced_in: t.Any = None
    #: It waits for something outside its worker to end it.
    parked: bool = False
    #: The outcome is committed: there is no outcome left to write.
    settled: bool = False

    @property
    def id(self) -> uuid.UUID:
        return uuid.UUID(self.key)

    @property
    def token(self) -> str:
        """What tells it from all other claims, also of its task."""
        return f"{self.key}/{self.claims}"

    @property
    def name(self) -> str:
        """What it names, for people: a row may hold what would look like a line of the log."""
        name = f"{self.module}.{self.func_name}"
        return name if name.isprintable() else repr(name)

    @property
    def label(self) -> str:
        """What log messages call it."""
        return f"{self.name} {self.key}"

    def log_extra(self) -> dict[str, str]:
        return {"task_id": self.key, "task_name": self.name, "task_channel": self.channel}


def decode(arguments: str) -> dict[str, t.Any]:
    """Decode a task's arguments.

    :raises ValueError: if they are no JSON object that Python can read.
    """
    try:
        kwargs = json.loads(arguments)
    except RecursionError:
        raise ValueError("the task's kwargs are nested too deeply") from None
    if not isinstance(kwargs, dict):
        raise ValueError("the task's kwargs are no JSON object")
    return kwargs


#: The claim whose processor runs in this context, or around it.
_current: contextvars.ContextVar[Claim] = contextvars.ContextVar("bq_claim")


class running:
    """Let a claim be the current one while an app runs its task.

    A class, for the context manager of a generator takes twice as long, for each task.
    """

    __slots__ = ("_claim", "_token")

    def __init__(self, claim: Claim, app: Flask) -> None:
        claim.app = app
        self._claim = claim

    def __enter__(self) -> None:
        self._token = _current.set(self._claim)

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)


def this_app() -> Flask:
    """The current app itself."""
    return current_app._get_current_object()  # type: ignore[attr-defined, no-any-return]


def current_claim() -> Claim | None:
    """The claim whose processor runs here. In the context of another app there is none: its queue
    is another, and so may be its database."""
    if (claim := _current.get(None)) is None:
        return None
    try:
        return claim if this_app() is claim.app else None
    except RuntimeError:  # in no context at all
        return claim


def current_task_id() -> uuid.UUID | None:
    """The id of the task that runs in this context; the parent of those made meanwhile."""
    claim = current_claim()
    return None if claim is None else claim.id
