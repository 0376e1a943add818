"""Announcements: what is logged of an outcome, and whom signals tell of it."""

from __future__ import annotations

import logging
import typing as t

from .. import signals
from ..log import log
from ..models.task import DONE, FAILED, PROCESSING
from .database import clear_frames
from .outcome import Outcome
from .queue import Queue


def tells_success() -> bool:
    """Whether anybody hears of tasks that are DONE."""
    return bool(signals.task_succeeded.receivers) or log.isEnabledFor(logging.DEBUG)


def log_failure(outcome: Outcome) -> None:
    """Log that a task has failed or waits again, once, with what was raised.

    In the task's thread, if possible: what hears the log finds the task's app context there, and
    the variables of each frame. They are gone afterwards, for they may hold connections and
    sessions, and a thousand outcomes may wait to be written.
    """
    claim, error = outcome.claim, outcome.exception
    about: t.Any = {"extra": claim.log_extra()}
    if error is not None:  # not by its truth, and so not itself
        about["exc_info"] = type(error), error, error.__traceback__
    if outcome.state == FAILED:
        log.error("%s failed: %s", claim.label, outcome.error_message, **about)
    elif outcome.is_retry:
        log.warning("%s will be retried: %s", claim.label, outcome.error_message, **about)
    elif outcome.error_message:
        log.warning("%s waits again: %s", claim.label, outcome.error_message, **about)
    outcome.logged = True
    if error is not None:
        clear_frames(error)


def announce(app: t.Any, queue: Queue, outcome: Outcome) -> None:
    """Log an outcome and send its signal, once it is committed."""
    claim = outcome.claim

    def about() -> dict[str, t.Any]:
        message = outcome.error_message
        attempts = claim.attempts + outcome.attempts
        values = {"state": outcome.state, "attempts": attempts, "error_message": message}
        told = {"task": queue.task_after(claim, **values)}
        if outcome.state == DONE:
            return told
        return told | {"error": message, "exception": outcome.exception}

    if outcome.state == DONE:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s is done", claim.label, extra=claim.log_extra())
        signals.send(signals.task_succeeded, app, about)
    elif outcome.state != PROCESSING:
        if not outcome.logged:
            log_failure(outcome)
        if outcome.state == FAILED:
            signals.send(signals.task_failed, app, about)
        elif outcome.is_retry:
            signals.send(signals.task_retried, app, about)
        outcome.exception = None  # whose frames lead back to this outcome


def lost(outcome: Outcome, *, cancelled: bool) -> None:
    """Log that the claim of an outcome is no longer this worker's.

    :param cancelled: whether somebody has cancelled the task, which is nothing to warn of.
    """
    claim = outcome.claim
    if cancelled:
        words = "was cancelled; what it wrote is rolled back"
        log.info("%s %s", claim.label, words, extra=claim.log_extra())
        return
    if outcome.interruptions:
        words = "had ended, or was taken over, when it lost its connection"
    elif outcome.attempts:
        words = "is no longer this worker's; what it wrote is rolled back"
    else:
        words = "had ended, or was taken over, when it was to be given back"
    log.warning("%s %s", claim.label, words, extra=claim.log_extra())
