"""The outcome of a claim: what becomes of a task."""

from __future__ import annotations

import dataclasses
import datetime
import json
import traceback
import types
import typing as t

import sqlalchemy as sa

from ..codec import to_json
from ..current import Attempt
from ..log import log, shorten
from ..models.task import DONE, FAILED, PENDING, PROCESSING
from ..models.uuid7 import uuid7
from ..options import check_aware
from ..processor import AnyProcessor
from ..retry import SQL
from .claim import Claim
from .database import is_interruption, is_of_letters, text_of
from .notify import notify_name

#: Seconds before a task whose processor nobody knew is offered again, at most.
UNKNOWN_DELAY = 10.0
#: Seconds before a task that lost its database connection is offered again: at first, and at most.
INTERRUPTION_DELAY = 1.0
LONGEST_INTERRUPTION_DELAY = 300.0
#: Interruptions after which that is taken for the task's own doing.
MAX_INTERRUPTIONS = 20
#: Interruptions that are retried almost at once if other tasks were interrupted, too.
SHARED_INTERRUPTIONS = 10
#: Characters of an error message and of a traceback that are kept.
MESSAGE_LENGTH = 2_000
TRACEBACK_LENGTH = 100_000
#: What a function returns that has not run.
UNRUN = (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)


@dataclasses.dataclass(slots=True)
class Outcome:
    """What becomes of a claimed task."""

    claim: Claim
    state: str
    #: The type of the event to write, if any.
    event: str | None = None
    #: As JSON.
    result: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    attempts: int = 0
    crashes: int = 0
    interruptions: int = 0
    parked: bool = False
    #: Whether it waited for something outside its worker to end it.
    was_parked: bool = False
    unknown: bool = False
    #: When a task that is PENDING again is due: in seconds from now, or at a time.
    delay: float | None = None
    scheduled_at: datetime.datetime | None = None
    #: The row is no longer where the claim found it.
    moved: bool = False
    #: Whether workers are told if it waits again; otherwise they find it when they poll.
    notify: bool = True
    #: What was raised, if anything.
    exception: BaseException | None = None
    #: The log has it already.
    logged: bool = False
    #: It could not be written at once, and the log says so.
    kept: bool = False
    #: It is of this worker's own claim, and not of one that is taken over.
    is_own: bool = True
    #: It is in the database.
    written: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether this is what nearly all tasks come to: DONE, and nothing to add."""
        plain = self.state == DONE and self.event is None and self.attempts == 1
        return plain and not self.moved

    @property
    def notifies(self) -> bool:
        """Whether a NOTIFY goes with it."""
        return self.state == PENDING and self.notify

    @property
    def has_letters(self) -> bool:
        """Whether any of its texts may hold a letter that not every encoding has."""
        texts = self.error_message, self.traceback
        return any(text and not text.isascii() for text in texts) or "\\u" in (self.result or "")

    def spell(self, codec: str) -> None:
        """Replace the letters that an encoding lacks. A result that holds some is not stored."""
        for name in ("error_message", "traceback"):
            if (text := getattr(self, name)) is not None:
                setattr(self, name, text.encode(codec, "backslashreplace").decode(codec))
        try:
            json.dumps(json.loads(self.result or "null"), ensure_ascii=False).encode(codec)
        except UnicodeEncodeError as error:
            log.warning(
                "The result of %s is not stored: the database's encoding lacks %r",
                self.claim.label,
                error.object[error.start : error.end],
                extra=self.claim.log_extra(),
            )
            self.result = None

    @property
    def is_retry(self) -> bool:
        """Whether an attempt has failed, and there will be another one."""
        return self.state == PENDING and self.attempts > 0

    def settlement(self) -> dict[str, t.Any]:
        """What the statement that writes it needs to know, as JSON has it."""
        return {
            "id": self.claim.key,
            "claims": self.claim.claims,
            "state": self.state,
            "result": self.result,
            "error_message": self.error_message,
            "attempts": self.attempts,
            "crashes": self.crashes,
            "interruptions": self.interruptions,
            "parked": self.parked,
            "was_parked": self.was_parked,
            "unknown": self.unknown,
            "delay": self.delay,
            "scheduled_at": (
                self.scheduled_at.astimezone(datetime.UTC).isoformat()
                if self.scheduled_at
                else None
            ),
            # Raw SQL may have written a channel without a name, of which nobody can be told.
            "channel": (notify_name(self.claim.channel) or None) if self.notify else None,
            "event_id": str(uuid7()) if self.event else None,
            "event": self.event,
            "traceback": self.traceback,
        }


# What can become of a task.


def succeeded(claim: Claim, result: t.Any, *, event: bool) -> Outcome:
    """The processor returned, and that ends the task."""
    return Outcome(
        claim, DONE, "DONE" if event else None, result=storable(claim, result), attempts=1
    )


def parked(claim: Claim, result: t.Any) -> Outcome:
    """The processor returned, and something else will end the task."""
    return Outcome(claim, PROCESSING, result=storable(claim, result), attempts=1, parked=True)


def failed(
    claim: Claim,
    error: BaseException,
    processor: AnyProcessor | None = None,
    get_task: t.Callable[[], t.Any] | None = None,
    attempt: Attempt | None = None,
) -> Outcome:
    """The processor raised: try again, if its policy says so.

    :param processor: whose policy is asked; none, where it could not help.
    :param get_task: what the policy is asked about.
    :param attempt: which one; none, if nothing of it can have met trouble of the database.
    """
    outcome = Outcome(
        claim,
        FAILED,
        "FAILED",
        error_message=describe(error),
        traceback=storable_text(trace(error), TRACEBACK_LENGTH),
        attempts=1,
        exception=error,
    )
    if processor is None or processor.retry_policy is None or get_task is None:
        return outcome
    try:
        if not isinstance(error, processor.retry_exceptions):
            return outcome
        verdict: t.Any = processor.retry_policy(get_task())
        if isinstance(verdict, SQL):
            verdict = processor.queue.evaluate(claim, verdict)
        if isinstance(verdict, datetime.timedelta):
            # now() + delay must stay a date that Python can read.
            outcome.delay = min(max(verdict.total_seconds(), 0.0), 100 * 365 * 86400.0)
        elif isinstance(verdict, datetime.datetime):
            check_aware("The time that a retry policy answers", verdict)
            outcome.scheduled_at = verdict
        elif verdict is not None:
            raise TypeError(
                "A retry policy answers a timedelta, a datetime with a time zone, SQL for one of"
                f" them, or None, not {verdict!r}"
            )
    except BaseException as problem:
        if attempt is not None and is_interruption(problem, attempt.losses):
            return interrupted(claim, problem, alone=True)
        both = f"{trace(error)}\nIts retry policy failed:\n{trace(problem)}"
        outcome.traceback = storable_text(both, TRACEBACK_LENGTH)
        message = f"{outcome.error_message} (its retry policy failed: {describe(problem)})"
        outcome.error_message = storable_text(message, MESSAGE_LENGTH)
        log.exception("The retry policy of %s failed", claim.label, extra=claim.log_extra())
        return outcome
    if verdict is not None:
        outcome.state, outcome.event = PENDING, "RETRIED"
    return outcome


def interrupted(claim: Claim, error: BaseException, *, alone: bool) -> Outcome:
    """The database was in trouble meanwhile, which is no failure: run the task again.

    :param alone: whether no other task of this worker met the same. Then it may be the task's own
        doing, and it waits ever longer.
    """
    count = claim.interruptions + 1
    outcome = Outcome(claim, PENDING, "INTERRUPTED", interruptions=1)
    if count < MAX_INTERRUPTIONS:
        message = f"The database was in trouble ({count} of {MAX_INTERRUPTIONS} times)."
        exponent = claim.interruptions - (0 if alone else SHARED_INTERRUPTIONS)
        outcome.delay = min(INTERRUPTION_DELAY * 2**exponent, LONGEST_INTERRUPTION_DELAY)
    else:
        message = (
            f"The database was in trouble {count} times while this task ran. It will not be run"
            " again."
        )
        outcome.state, outcome.exception = FAILED, error
    outcome.error_message = f"{message} {describe(error)}"
    return outcome


def crashed(claim: Claim, maximum: int) -> Outcome:
    """The worker died with the task in its hands."""
    crashes = claim.crashes + 1
    if crashes < maximum:
        message = f"Its worker died ({crashes} of {maximum} times)."
        return Outcome(claim, PENDING, "CRASHED", error_message=message, crashes=1)
    message = f"Its worker died {crashes} times while it held this task. It will not be run again."
    return Outcome(claim, FAILED, "CRASHED", error_message=message, crashes=1)


def unknown(claim: Claim, known: int, grace: float) -> Outcome:
    """This worker has no such processor; another one may, in the middle of a deploy."""
    name = storable_text(claim.name, MESSAGE_LENGTH)
    message = f"No processor {name} is registered in this worker, which knows {known}."
    if claim.module == "__main__":
        message += (
            " A script that was run directly, as python app.py, made this task. Run it as a module"
            " that can be imported: flask --app app run."
        )
    else:
        message += " Is its module imported by the app or named in BQ_PROCESSOR_PACKAGES?"
    waited = None if claim.unknown_for is None else claim.unknown_for / 1e6
    if waited is not None and waited >= grace:
        message += f" No worker knew it for {waited:.0f} seconds (BQ_UNKNOWN_GRACE)."
        return Outcome(claim, FAILED, "FAILED", error_message=message)
    delay = min(UNKNOWN_DELAY, grace - (waited or 0.0))
    event = "UNKNOWN" if waited is None else None
    return Outcome(claim, PENDING, event, error_message=message, unknown=True, delay=delay)


def given_back(claim: Claim) -> Outcome:
    """The task has not run, or its worker leaves: as if it had not been claimed."""
    return Outcome(claim, PENDING, unknown=claim.unknown_for is not None)


def fallbacks(outcome: Outcome, error: sa.exc.DBAPIError) -> t.Iterator[Outcome]:
    """What to write in place of an outcome that the database refuses, the best first."""
    if outcome.has_letters and is_of_letters(error):
        outcome = dataclasses.replace(outcome)
        outcome.spell("ascii")
        yield outcome
    if outcome.event is not None:
        yield dataclasses.replace(outcome, event=None, notify=False)
    message = f"Its outcome ({outcome.state}) could not be written. {describe(error)}"
    failure = dataclasses.replace(
        outcome,
        state=FAILED,
        event="FAILED",
        result=None,
        error_message=message,
        parked=False,
        exception=None,
        logged=False,
    )
    failure.spell("ascii")
    yield failure


def ended(claim: Claim, *, result: t.Any = None, error: str | None = None) -> Outcome:
    """Something outside its worker ends a parked task."""
    if error is None:
        try:
            return Outcome(claim, DONE, result=None if result is None else to_json(result))
        except ValueError as problem:
            raise ValueError(
                f"The result of task {claim.id} cannot be stored as JSON: {problem}."
            ) from None
    return Outcome(claim, FAILED, "FAILED", error_message=storable_text(error, MESSAGE_LENGTH))


# Nothing that a task returns or raises may keep its outcome from being written.


def storable(claim: Claim, result: t.Any) -> str | None:
    """A processor's result as JSON, or None if there is none or it cannot be stored.

    :raises TypeError: if it is what a coroutine or generator function returns, which a decorator
        may hide.
    """
    if result is None:
        return None
    try:
        return to_json(result)
    except BaseException as error:  # what is in it may do anything
        if isinstance(result, UNRUN):
            if not isinstance(result, types.AsyncGeneratorType):
                result.close()  # otherwise Python warns of it
            raise TypeError(
                f"The processor returned a {type(result).__name__}, and nothing has run in it. Call"
                " asyncio.run(…) or list(…) in the processor."
            ) from None
        log.warning(
            "The result of %s is not stored: %s",
            claim.label,
            describe(error),
            extra=claim.log_extra(),
        )
        return None


def storable_text(text: str, length: int) -> str:
    """Text that PostgreSQL takes, shortened in its middle."""
    text = shorten(text, length).replace("\0", "\\0")  # first, for it may be very long
    return shorten(text.encode("utf-8", "backslashreplace").decode(), length)


def describe(error: BaseException) -> str:
    """Return an exception as text; one of the database without the statement and the row, whose
    values may be nobody's business."""
    kind, text = type(error).__name__, text_of(error)
    return storable_text(f"{kind}: {text}" if text else kind, MESSAGE_LENGTH)


def trace(error: BaseException) -> str:
    """Return an exception's traceback as text."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception as problem:
        return f"{describe(error)} (its traceback cannot be had: {describe(problem)})"
