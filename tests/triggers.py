"""Triggers, as an app may have them on its own tables and on the queue's."""

from __future__ import annotations


def trigger(
    name: str,
    event: str,
    body: str,
    *,
    each: str = "ROW",
    condition: str = "true",
    deferred: bool = False,
) -> str:
    """SQL that makes a trigger.

    :param event: such as ``BEFORE UPDATE ON bq_tasks``.
    :param body: what it does, for each row with that as ``NEW``.
    :param each: whether for each ROW or STATEMENT.
    :param condition: which rows it is for.
    :param deferred: whether it does so at COMMIT.
    """
    kind, when = ("CONSTRAINT TRIGGER", "INITIALLY DEFERRED") if deferred else ("TRIGGER", "")
    return f"""
        CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            {body};
            RETURN NEW;
        END $$;
        CREATE {kind} {name} {event} {when}
            FOR EACH {each} WHEN ({condition}) EXECUTE FUNCTION {name}();
    """
