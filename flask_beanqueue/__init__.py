"""A task queue in the app's own PostgreSQL, for Flask and Flask-SQLAlchemy."""

from __future__ import annotations

from .arguments import ArgumentError
from .claim import ClaimLost
from .config import Config, ConfigError
from .extension import BeanQueue, current_task
from .fence import TaskStateError
from .models import (
    EventModelMixin,
    EventModelRefTaskMixin,
    EventType,
    TaskModelMixin,
    TaskModelRefEventMixin,
    TaskModelRefParentMixin,
    TaskModelRefWorkerMixin,
    TaskState,
    WorkerModelMixin,
    WorkerRefMixin,
    WorkerState,
)
from .notify import listen_events
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
from .worker import WorkerDied

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
