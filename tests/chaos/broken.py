"""The queue without one of its safeguards: what the trials must notice."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flask_beanqueue import fence, writer
from flask_beanqueue import outcome as outcomes
from flask_beanqueue.claimer import Claimer
from flask_beanqueue.outcome import Outcome
from flask_beanqueue.queries import Queries
from flask_beanqueue.writer import Writer


def without_fence() -> None:
    """A completion counts whoever has the task by now."""
    done = sa.text("UPDATE bq_tasks SET state = 'DONE' WHERE id = CAST(:id AS uuid)")

    def write_one(queries: Any, connection: Any, outcome: Any) -> bool:
        connection.execute(done, {"id": outcome.claim.key})
        return True

    outcomes.write_one = write_one


def without_rescue() -> None:
    """What dead workers held stays with them."""

    def take_over(self: Writer, connection: Any, max_crashes: int, *, anew: bool = False) -> bool:
        return True

    Writer.take_over = take_over  # type: ignore[method-assign]


def without_plain() -> None:
    """Tasks that wrote nothing are taken for done, and nobody says so in the database."""
    write = outcomes.write

    def forget_plain(queries: Any, connection: Any, part: Any, **options: Any) -> Any:
        return part if part[0].is_plain else write(queries, connection, part, **options)

    outcomes.write = forget_plain  # type: ignore[assignment]


def without_datname() -> None:
    """The connections of a worker are looked for in all databases of the server."""
    terminate = Queries.terminate

    def terminate_everywhere(self: Queries, connection: Any) -> set[str]:
        here = "AND backend.datname = current_database()"
        self._terminate = sa.text(self._terminate.text.replace(here, ""))
        return terminate(self, connection)

    Queries.terminate = terminate_everywhere  # type: ignore[method-assign]


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
    vars(writer)["is_limit"] = lambda error: False


SAFEGUARDS = {
    "fence": without_fence,
    "rescue": without_rescue,
    "plain": without_plain,
    "datname": without_datname,
    "passing": without_passing,
    "halving": without_halving,
    "silence": without_silence,
}
