"""The tables: tasks, workers and events, as mixins and as the models made of them."""

from __future__ import annotations

import typing as t

if t.TYPE_CHECKING:
    from .make import BQEvent as BQEvent
    from .make import BQTask as BQTask
    from .make import BQWorker as BQWorker
