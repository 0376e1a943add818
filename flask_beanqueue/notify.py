"""NOTIFY for tasks that the ORM writes."""

from __future__ import annotations

import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .listen import notifies, notify_name
from .models import PENDING
from .queries import NOTIFY

#: The channels that a transaction, or a savepoint, has notified. A savepoint has a set of its own:
#: rolled back, it takes its NOTIFY with it, and what comes later must send another. PostgreSQL
#: folds equal ones.
_notified: weakref.WeakKeyDictionary[t.Any, set[str]] = weakref.WeakKeyDictionary()


def listen_events(model: type[t.Any]) -> None:
    """Send NOTIFY whenever a task of this model is inserted or becomes PENDING again.

    It goes with the transaction: a rollback, also of a savepoint, takes it back. A
    :class:`BeanQueue` calls this for its task model; calling it again changes nothing.

    :param model: a model that derives from :class:`TaskModelMixin`; those that derive from it are
        seen to, too.
    """
    for name, listener in (("after_insert", _inserted), ("after_update", _updated)):
        if not sa.event.contains(model, name, listener):
            sa.event.listen(model, name, listener, propagate=True)


def _inserted(mapper: t.Any, connection: Connection, task: t.Any) -> None:
    # The state's default is filled in by now, also where it is the server's.
    if task.state == PENDING:
        notify(connection, task.channel)


def _updated(mapper: t.Any, connection: Connection, task: t.Any) -> None:
    attributes = sa.inspect(task).attrs
    changed = any(
        attributes[name].history.has_changes()
        for name in ("state", "channel", "priority", "scheduled_at")
    )
    if changed and task.state == PENDING:
        notify(connection, task.channel)


def notify(connection: Connection, channel: str) -> None:
    """Send NOTIFY for a channel, once for each transaction and savepoint."""
    if not notifies(connection):
        return
    root = connection.get_transaction()
    innermost = connection.get_nested_transaction() or root
    if any(channel in _notified.get(transaction, ()) for transaction in (root, innermost)):
        return
    connection.exec_driver_sql(NOTIFY, {"name": notify_name(channel)})
    _notified.setdefault(innermost, set()).add(channel)
