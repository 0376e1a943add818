"""The queue without one of its safeguards: what the trials must notice."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from flask_beanqueue import outcome as outcomes
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


SAFEGUARDS = {"fence": without_fence, "rescue": without_rescue, "plain": without_plain}
