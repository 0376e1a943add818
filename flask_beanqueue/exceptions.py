"""Every exception of the queue's own.

::

    TypeError
     └── ArgumentError     a task's arguments do not fit, or cannot be stored
    ValueError
     └── ConfigError       a setting cannot be used
    RuntimeError
     ├── SetupError        the database, or how it is reached, cannot carry the queue
     │    ├── PoolerError
     │    └── EncodingError
     ├── TaskStateError    a task's state does not allow what was asked
     └── WorkerDied        a worker cannot go on
    Exception
     └── ClaimLost         in a processor: the task is no longer this worker's
"""

from __future__ import annotations


class ArgumentError(TypeError):
    """A task's arguments do not fit its processor, or cannot be stored."""


class ConfigError(ValueError):
    """A ``BQ_…`` setting holds something that the queue cannot use."""


class SetupError(RuntimeError):
    """The queue cannot work as things are set up; the message says what to change."""


class PoolerError(SetupError):
    """A pooler stands before the database, and the queue cannot work through it."""


class EncodingError(SetupError):
    """The texts that the database holds may be such as no driver can read."""


class TaskStateError(RuntimeError):
    """The task's present state does not allow what was asked: to end it, or another state.

    :ivar state: the task's state. ``PENDING`` or ``PROCESSING``: it is too early, for its processor
        has not returned; try again later. Another: the task has ended, perhaps by the same call
        that came twice.
    """

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.state = state


class WorkerDied(RuntimeError):
    """The worker cannot go on, and another one is to take its place: it was declared dead, since
    its heartbeats had stopped coming, or has lost a thread."""


class ClaimLost(Exception):
    """The task is no longer as it was claimed; nothing that its processor wrote may be committed.

    It was given to another worker, cancelled or deleted, or its processor has changed it past the
    ORM.
    """
