"""Signals that a worker sends. The sender is the Flask app, as with Flask's own."""

from __future__ import annotations

import typing as t

from blinker import NamedSignal, Namespace

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


def any_receivers() -> bool:
    """Whether anybody wants to hear what becomes of tasks."""
    return bool(task_succeeded.receivers or task_failed.receivers or task_retried.receivers)


def send(signal: NamedSignal, app: t.Any, **kwargs: t.Any) -> bool:
    """Send a signal. A receiver that raises is logged, for no receiver may stop the queue.

    :return: whether none raised.
    """
    well = True
    for receiver in signal.receivers_for(app):
        try:
            receiver(app, **kwargs)
        except BaseException:  # sys.exit() among them
            log.exception("A receiver of the signal %r raised", signal.name)
            well = False
    return well
