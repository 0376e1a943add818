"""Signals that a worker sends. The sender is the Flask app, as with Flask's own."""

from __future__ import annotations

import contextlib
import typing as t

from blinker import NamedSignal, Namespace
from flask import Flask, has_app_context

from .log import log

_signals = Namespace()

#: A worker has started: ``worker_id``, ``channels``.
worker_started = _signals.signal("worker-started")
#: A worker has stopped: ``worker_id``, ``channels``.
worker_stopped = _signals.signal("worker-stopped")
#: A task is about to run, in the task's thread and app context: ``task``.
task_started = _signals.signal("task-started")
#: A task is DONE, and its commit is through: ``task``.
task_succeeded = _signals.signal("task-succeeded")
#: A task is FAILED, and that is committed: ``task``, ``error`` (text), ``exception`` (what was
#: raised, without the variables of its frames; None after a crash, say).
task_failed = _signals.signal("task-failed")
#: A task will run again, and that is committed: ``task``, ``error``, ``exception``.
task_retried = _signals.signal("task-retried")


def send(signal: NamedSignal, app: Flask, arguments: t.Callable[[], dict[str, t.Any]]) -> bool:
    """Send a signal, in the task's app context or in one of its own. What raises is logged, for
    nothing of the app's may stop the queue.

    :param arguments: makes what the receivers are given; it is called in that context, and only if
        there are any.
    :return: whether nothing raised.
    """
    if not signal.receivers:
        return True
    well = True
    try:
        with contextlib.nullcontext() if has_app_context() else app.app_context():
            given = arguments()
            for receiver in signal.receivers_for(app):
                try:
                    receiver(app, **given)
                except BaseException:  # sys.exit() among them
                    log.exception("A receiver of the signal %r raised", signal.name)
                    well = False
    except BaseException:
        log.exception("The app context of the signal %r raised", signal.name)
        well = False
    return well
