"""What is current: the attempt whose processor runs here, and its task."""

from __future__ import annotations

import contextvars
import typing as t
import uuid

from flask import Flask, current_app
from werkzeug.local import LocalProxy

if t.TYPE_CHECKING:
    from .engine.claim import Claim
    from .models.make import BQTask


class Attempt:
    """One run of a claimed task, which is the current one while it is entered.

    A class, for the context manager of a generator takes twice as long, for each task.

    :param app: the app that runs it.
    """

    __slots__ = (
        "_token",
        "app",
        "changed_in",
        "claim",
        "completing",
        "ended_in",
        "fenced_in",
        "losses",
    )

    def __init__(self, claim: Claim, app: Flask) -> None:
        self.claim = claim
        self.app = app
        #: What was raised when there was passing trouble meanwhile, such as a lost connection to
        #: the queue's database.
        self.losses: tuple[BaseException, ...] = ()
        #: Its outcome is being written with what the processor wrote.
        self.completing = False
        #: The session's transaction that has changed the task's row last, and so may keep it
        #: locked.
        self.changed_in: t.Any = None
        #: The session's transaction, or savepoint, that holds the task's outcome.
        self.ended_in: t.Any = None
        #: The session's transaction that has written it through the fence, as its last statement.
        self.fenced_in: t.Any = None

    def __enter__(self) -> None:
        self._token = _current.set(self)

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)


#: The attempt whose processor runs in this context, or around it.
_current: contextvars.ContextVar[Attempt] = contextvars.ContextVar("bq_attempt")


def this_app() -> Flask:
    """Return the current app itself."""
    return current_app._get_current_object()  # type: ignore[attr-defined, no-any-return]


def current_attempt() -> Attempt | None:
    """Return the attempt whose processor runs here. In the context of another app there is none:
    its queue is another, and so may be its database."""
    if (attempt := _current.get(None)) is None:
        return None
    try:
        return attempt if this_app() is attempt.app else None
    except RuntimeError:  # in no context at all
        return attempt


def current_task_id() -> uuid.UUID | None:
    """Return the id of the task that runs in this context; the parent of those made meanwhile."""
    attempt = current_attempt()
    return None if attempt is None else attempt.claim.id


def _current_task() -> t.Any:
    attempt = current_attempt()
    if attempt is None:
        raise RuntimeError(
            "Working outside of a task. current_task is there while a worker runs a processor."
        )
    return this_app().extensions["beanqueue"].attach_task(attempt.claim)


#: The ``bq.Task`` that is being done, anywhere below its processor.
current_task = t.cast("BQTask", LocalProxy(_current_task))
