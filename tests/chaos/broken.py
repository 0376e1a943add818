"""The queue without one of its safeguards: what the trials must notice."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flask_beanqueue.engine import completer, fence, heartbeat, settle
from flask_beanqueue.engine.claim import Claimer
from flask_beanqueue.engine.outcome import Outcome
from flask_beanqueue.engine.takeover import Orphans
from flask_beanqueue.sql import Sql


def without_fence() -> None:
    """A completion counts whoever has the task by now."""
    done = sa.text("UPDATE bq_tasks SET state = 'DONE' WHERE id = CAST(:id AS uuid)")

    def write_one(connection: Any, models: Any, outcome: Any) -> bool:
        connection.execute(done, {"id": outcome.claim.key})
        return True

    settle.write_one = write_one


def without_rescue() -> None:
    """What dead workers held stays with them."""

    def next_part(self: Orphans, connection: Any, known: Any) -> list[Outcome]:
        return []

    Orphans.next_part = next_part  # type: ignore[method-assign]


def without_plain() -> None:
    """Tasks that wrote nothing are taken for done, and nobody says so in the database."""
    write = settle.write

    def forget_plain(connection: Any, models: Any, part: Any, **options: Any) -> Any:
        return part if part[0].is_plain else write(connection, models, part, **options)

    settle.write = forget_plain  # type: ignore[assignment]


def without_datname() -> None:
    """The connections of a worker are looked for in all databases of the server."""
    here = "AND backend.datname = current_database()"
    heartbeat.TERMINATE = Sql(heartbeat.TERMINATE.text.replace(here, ""))


def without_passing() -> None:
    """Nothing but a lost connection is passing trouble for a task."""
    vars(fence)["is_passing"] = lambda *args, **kwargs: False


def without_halving() -> None:
    """A claim that failed is tried again as it was."""
    whole = property(lambda self: self._batch_size, lambda self, value: None)
    Claimer._most = whole  # type: ignore[assignment]


def without_silence() -> None:
    """What waits again does so with a NOTIFY, or not at all."""
    always = property(lambda self: True, lambda self, value: None)
    setattr(Outcome, "notify", always)  # noqa: B010 - of which mypy knows no property
    vars(completer)["is_limit"] = lambda error: False


SAFEGUARDS = {
    "fence": without_fence,
    "rescue": without_rescue,
    "plain": without_plain,
    "datname": without_datname,
    "passing": without_passing,
    "halving": without_halving,
    "silence": without_silence,
}
