"""A task queue in the app's own PostgreSQL, for Flask and Flask-SQLAlchemy."""

from __future__ import annotations

from .config import Config
from .current import current_task
from .engine.notify import listen_events
from .exceptions import ArgumentError, ClaimLost, ConfigError, TaskStateError, WorkerDied
from .extension import BeanQueue
from .models.event import EventModelMixin, EventModelRefTaskMixin, EventType
from .models.task import (
    TaskModelMixin,
    TaskModelRefEventMixin,
    TaskModelRefParentMixin,
    TaskModelRefWorkerMixin,
    TaskState,
)
from .models.worker import WorkerModelMixin, WorkerRefMixin, WorkerState
from .processor import Processor
from .retry import DelayRetry, ExponentialBackoffRetry, LimitAttempt, RetryPolicy
from .signals import (
    task_failed,
    task_retried,
    task_started,
    task_succeeded,
    worker_started,
    worker_stopped,
)
from .version import __version__ as __version__

__all__ = [
    "ArgumentError",
    "BeanQueue",
    "ClaimLost",
    "Config",
    "ConfigError",
    "DelayRetry",
    "EventModelMixin",
    "EventModelRefTaskMixin",
    "EventType",
    "ExponentialBackoffRetry",
    "LimitAttempt",
    "Processor",
    "RetryPolicy",
    "TaskModelMixin",
    "TaskModelRefEventMixin",
    "TaskModelRefParentMixin",
    "TaskModelRefWorkerMixin",
    "TaskState",
    "TaskStateError",
    "WorkerDied",
    "WorkerModelMixin",
    "WorkerRefMixin",
    "WorkerState",
    "current_task",
    "listen_events",
    "task_failed",
    "task_retried",
    "task_started",
    "task_succeeded",
    "worker_started",
    "worker_stopped",
]
