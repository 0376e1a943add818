"""The handover of tasks: with the commit of their session, to the tables where workers look."""

from __future__ import annotations

import typing as t
import weakref

import sqlalchemy as sa
from flask import Flask, Response, after_this_request, has_request_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction, object_session

from ..exceptions import SetupError
from ..log import log
from ..models.task import TaskModelMixin

#: What was done in a session's transaction, or in a savepoint, and needs its commit: in words.
_uncommitted: weakref.WeakKeyDictionary[SessionTransaction, set[str]] = weakref.WeakKeyDictionary()

#: Whether a session is asked for such things at the end of its app context, in ``Session.info``.
ASKED = "beanqueue_asked"


def listen_writes(model: type[t.Any]) -> None:
    """Watch what is written of a task model: when, where, and whether it is committed."""
    sa.event.listen(model, "before_insert", _before_insert, propagate=True)
    sa.event.listen(model, "before_update", _before_update, propagate=True)
    for name, listener in (("before_attach", _before_attach), ("after_commit", _after_commit)):
        if not sa.event.contains(Session, name, listener):
            sa.event.listen(Session, name, listener)


def _before_attach(session: Session, instance: t.Any) -> None:
    if isinstance(instance, TaskModelMixin) and sa.inspect(instance).transient:
        check_open(session)
        _ask(session)


def _before_insert(mapper: t.Any, connection: Connection, task: t.Any) -> None:
    _before_update(mapper, connection, task)
    note(object_session(task), f"the task {task.module}.{task.func_name}")


def _before_update(mapper: t.Any, connection: Connection, task: t.Any) -> None:
    check_autocommit(connection)
    check_schema(connection.get_execution_options(), mapper.local_table)


def _after_commit(session: Session) -> None:
    # A savepoint that is released hands over what was done in it.
    savepoint = session.get_nested_transaction()
    if savepoint is not None and savepoint.parent is not None and savepoint in _uncommitted:
        _uncommitted.setdefault(savepoint.parent, set()).update(_uncommitted.pop(savepoint))


# When: with the commit, and before it.


def check_autocommit(connection: Connection) -> None:
    """Refuse a session's connection that commits each statement at once.

    :raises SetupError: if it is one.
    """
    raw: t.Any = connection.connection.dbapi_connection
    if raw.autocommit:  # also if the driver was told so past SQLAlchemy
        raise SetupError(
            "This session is in AUTOCOMMIT, where each statement is committed at once, and nothing"
            " together with another or with its task. Take that out of SQLALCHEMY_ENGINE_OPTIONS,"
            " and use a connection of your own for what needs it:"
            ' db.engine.connect().execution_options(isolation_level="AUTOCOMMIT").'
        )


def check_open(session: Session) -> None:
    """Refuse to enqueue a task in a transaction that can no longer commit.

    :raises RuntimeError: if that is so.
    """
    transaction = session.get_transaction()
    if transaction is not None and not transaction.is_active:
        raise RuntimeError(
            "This transaction is over, and a task that is enqueued in it now would be lost. Enqueue"
            " before the commit: it hands the task over, so no after_commit hook is needed. After"
            " an error, call db.session.rollback() first."
        )


def note(session: Session | None, what: str) -> None:
    """Note that something was done in a session's transaction which its commit is to hand over."""
    if session is not None and (transaction := innermost(session)) is not None:
        _uncommitted.setdefault(transaction, set()).add(what)
        _ask(session)


def _ask(session: Session) -> None:
    """Ask the session at the end of its app context, unless its request answers with an error."""
    if ASKED not in session.info:
        session.info[ASKED] = True
        if has_request_context():

            def forgive(response: Response) -> Response:
                session.info[ASKED] = response.status_code < 400
                return response

            after_this_request(forgive)


def innermost(session: Session) -> SessionTransaction | None:
    """Return the session's open savepoint, or its transaction."""
    return session.get_nested_transaction() or session.get_transaction()


def tell_uncommitted(app: Flask, db: SQLAlchemy) -> None:
    """Warn when an app context ends well and what was done in it is not committed.

    A commit, or a rollback, at the end of the context may be the app's own: it comes before this.
    """

    def tell(error: BaseException | None) -> None:
        if error is not None or not db.session.registry.has():
            return
        session: Session = db.session()
        if not session.info.get(ASKED):
            return
        lost = {
            f"the task {task.module}.{task.func_name}"
            for task in session.new
            if isinstance(task, TaskModelMixin)
        }
        transaction = innermost(session)
        while transaction is not None:
            lost |= _uncommitted.get(transaction, set())
            transaction = transaction.parent
        if lost:
            log.warning(
                "Lost, since the app context has ended without a commit: %s. Call"
                " db.session.commit(), or db.session.rollback() if it was to be dropped.",
                ", ".join(sorted(lost)),
            )

    functions = app.teardown_appcontext_funcs  # the last comes first
    removes = [getattr(each, "__self__", None) is db for each in functions]
    functions.insert(removes.index(True) + 1, tell)


# Where: in the tables of the workers.


def check_schema(options: t.Mapping[str, t.Any], *tables: t.Any) -> None:
    """Refuse execution options that rename the schema of the queue's tables. They hold for the ORM
    and not for the queue's own statements, nor for workers.

    :raises RuntimeError: naming the table.
    """
    if not (renamed := options.get("schema_translate_map")):
        return
    for table in tables:
        if (schema := renamed.get(table.schema, table.schema)) != table.schema:
            raise RuntimeError(
                f"The schema_translate_map moves {table.name} to the schema {schema!r}, where no"
                " worker looks: make tables of the queue's own in a schema that it does not name"
                ' (__table_args__ = {"schema": …}, docs/own-tables.md), or set search_path instead.'
            )
