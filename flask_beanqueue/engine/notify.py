"""NOTIFY for tasks that the ORM writes."""

from __future__ import annotations

import hashlib
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine import Connection, TwoPhaseTransaction

from ..models.task import PENDING

# As the driver takes it: to compile it, or to find what was compiled, takes SQLAlchemy as long as
# the server takes for the whole.
NOTIFY = "SELECT pg_notify(%(name)s, '')"

#: The channels that a transaction, or a savepoint, has notified. A savepoint has a set of its own:
#: rolled back, it takes its NOTIFY with it, and what comes later must send another. PostgreSQL
#: folds equal ones.
_notified: weakref.WeakKeyDictionary[t.Any, set[str]] = weakref.WeakKeyDictionary()


def notify_name(channel: str) -> str:
    """The name to NOTIFY and LISTEN for a channel: itself, or a digest where it is too long.

    PostgreSQL takes names of at most 63 bytes.
    """
    if len(channel.encode("utf-8", "surrogatepass")) < 64:
        return channel
    return "bq_" + hashlib.sha256(channel.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def notifies(connection: Connection) -> bool:
    """Whether tasks that are written on this connection NOTIFY (``BQ_NOTIFY``). A transaction that
    has done so could not be prepared."""
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        return False
    settings = connection.get_execution_options().get("bq_settings", {})  # app.config
    return settings.get("BQ_NOTIFY", True) is not False


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
