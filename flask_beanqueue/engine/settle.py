"""Settling: how outcomes are written, each fenced by its claim, and with its event."""

from __future__ import annotations

import json
import typing as t

from sqlalchemy.engine import Connection

from ..models.make import Models
from ..sql import Sql, array
from .claim import Claim
from .connection import codec_of
from .notify import notifies
from .outcome import Outcome

# The fence of many tasks at once. The rows are found by the ctid that the claim returned: by id,
# every version that a row has had since the last vacuum would be visited. The id and claims prove
# that it is the row meant. The state is compared as an expression, because a plain comparison lets
# the planner choose the index of PROCESSING rows, which is as full of dead entries as the other.
# The arrays stand in subqueries, because the planner, if it sees how many ctids there are, prefers
# to read a whole table of some ten thousand rows. And patience: how long the statement may wait for
# a lock, as lock_timeout says it (NULL: as the session has it). It holds for the statement's own
# transaction, so no pooler is in its way, and it is part of the statement, so it costs no round
# trip. The plan is made each time: a kept one would stay while the tables grow a thousandfold.
FINISH = Sql("""
    WITH patience AS MATERIALIZED (
        SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
            CASE WHEN CAST(:lock_timeout AS text) IS NOT NULL
                THEN set_config('lock_timeout', :lock_timeout, true) END
    )
    UPDATE {tasks} AS t SET state = 'DONE', attempts = t.attempts + 1,
        result = COALESCE(CAST(done.result AS jsonb), t.result), error_message = NULL,
        unknown_since = NULL, finished_at = clock_timestamp()
    FROM unnest(
        (SELECT CAST(:ctids AS tid[])), (SELECT CAST(:ids AS uuid[])),
        (SELECT CAST(:claims AS int[])), (SELECT CAST(:results AS text[]))
    ) AS done (ctid, id, claims, result)
    CROSS JOIN patience
    WHERE t.ctid = done.ctid AND t.id = done.id AND t.claims = done.claims
      AND t.state || '' = 'PROCESSING'
    RETURNING CAST(t.id AS text), t.claims
""")

# The same for the one task whose transaction this is: planned in a third of the time.
FINISH_ONE = Sql("""
    UPDATE {tasks} SET state = 'DONE', attempts = attempts + 1,
        result = COALESCE(CAST(:result AS jsonb), result), error_message = NULL,
        unknown_since = NULL, finished_at = clock_timestamp()
    WHERE ctid = CAST(:ctid AS tid) AND id = CAST(:id AS uuid) AND claims = :claims
      AND state || '' = 'PROCESSING'
""")

# Every other outcome, with its event and, where the task waits again, its NOTIFY. By id, for these
# are few; and as JSON, for they have many parts. It is also the second chance of a row that has
# moved since its claim. The check of an event's foreign key must be planned each time, too.
SETTLE = Sql("""
    WITH patience AS MATERIALIZED (
        SELECT set_config('plan_cache_mode', 'force_custom_plan', true),
            CASE WHEN CAST(:lock_timeout AS text) IS NOT NULL
                THEN set_config('lock_timeout', :lock_timeout, true) END
    ), outcome AS MATERIALIZED (
        SELECT outcome.* FROM patience
        CROSS JOIN jsonb_to_recordset(CAST(:outcomes AS jsonb)) AS outcome (
            id uuid, claims int, state text, result text, error_message text,
            attempts int, crashes int, interruptions int,
            parked bool, was_parked bool, unknown bool,
            delay float8, scheduled_at timestamptz, channel text,
            event_id uuid, event text, traceback text)
    ), settled AS (
        UPDATE {tasks} AS t SET state = outcome.state,
            result = COALESCE(CAST(outcome.result AS jsonb), t.result),
            error_message = CASE WHEN outcome.state = 'PENDING'
                THEN COALESCE(outcome.error_message, t.error_message)
                ELSE outcome.error_message END,
            attempts = t.attempts + outcome.attempts,
            crashes = t.crashes + outcome.crashes,
            interruptions = t.interruptions + outcome.interruptions,
            parked = outcome.parked,
            unknown_since = CASE WHEN outcome.unknown
                THEN COALESCE(t.unknown_since, clock_timestamp()) END,
            worker_id = CASE WHEN outcome.state IN ('PENDING', 'PROCESSING')
                THEN NULL ELSE t.worker_id END,
            scheduled_at = CASE WHEN outcome.state = 'PENDING' THEN COALESCE(
                outcome.scheduled_at,
                clock_timestamp() + outcome.delay * interval '1 second',
                t.scheduled_at) ELSE t.scheduled_at END,
            finished_at = CASE WHEN outcome.state NOT IN ('PENDING', 'PROCESSING')
                THEN clock_timestamp() END
        FROM outcome
        WHERE t.id = outcome.id AND t.claims = outcome.claims AND t.state = 'PROCESSING'
          AND t.parked = outcome.was_parked
        RETURNING t.id, t.claims, t.state, t.scheduled_at, t.error_message,
            outcome.channel, outcome.event_id, outcome.event, outcome.traceback
    ), written AS (
        INSERT INTO {events}
            (id, task_id, type, error_message, traceback, scheduled_at, created_at)
        SELECT event_id, id, event, error_message, traceback,
            CASE WHEN state = 'PENDING' THEN scheduled_at END, clock_timestamp()
        FROM settled WHERE event IS NOT NULL
    ), notified AS (
        SELECT count(pg_notify(channel, '')) AS channels
        FROM (
            SELECT DISTINCT channel FROM settled
            WHERE state = 'PENDING' AND channel IS NOT NULL
        ) AS waiting
        WHERE :notify
    )
    SELECT CAST(id AS text), claims FROM settled CROSS JOIN notified
""")


def write(
    connection: Connection,
    models: Models,
    outcomes: t.Sequence[Outcome],
    *,
    lock_timeout: float | None = None,
) -> list[Outcome]:
    """Write outcomes with one statement, each fenced by its claim; return those that were written.

    The rest has been claimed by somebody else, cancelled or deleted in the meantime: whatever
    belongs to it must not be committed. Or its row has moved: then it is marked so, is plain no
    longer, and can be written again.

    :param outcomes: all of them plain, or none.
    :param lock_timeout: seconds to wait for a row that somebody else has locked, in autocommit.
    :raises sqlalchemy.exc.OperationalError: if that is over; nothing is then written.
    """
    plain = outcomes[0].is_plain
    if not plain or any(outcome.result for outcome in outcomes):
        spell(connection, outcomes)
    if plain:
        done = [(outcome.claim, outcome.result) for outcome in outcomes]
        held = finish(connection, models, done, lock_timeout)
    else:
        held = settle(connection, models, [each.settlement() for each in outcomes], lock_timeout)
    written = []
    for outcome in outcomes:
        if (outcome.claim.key, outcome.claim.claims) in held:
            written.append(outcome)
        elif plain:
            outcome.moved = True
    return written


def write_one(connection: Connection, models: Models, outcome: Outcome) -> bool:
    """Write one outcome wherever its row is, and tell whether the claim held."""
    if outcome.is_plain:
        if outcome.result:
            spell(connection, [outcome])
        if finish_one(connection, models, outcome.claim, outcome.result):
            return True
        outcome.moved = True
    return bool(write(connection, models, [outcome]))


def check(connection: Connection, models: Models, *, plain: bool) -> None:
    """See whether outcomes can be written, whichever they are; write none.

    :param plain: whether those of tasks that succeeded and wrote nothing, or all others.
    :raises sqlalchemy.exc.DBAPIError: if not.
    """
    if plain:
        finish(connection, models, [])
    else:
        settle(connection, models, [])


def finish(
    connection: Connection,
    models: Models,
    done: t.Sequence[tuple[Claim, str | None]],
    lock_timeout: float | None = None,
) -> set[tuple[str, int]]:
    """Mark claimed tasks DONE, each with its result as JSON.

    :param lock_timeout: seconds to wait for a locked row, in autocommit.
    :return: key and number of those claims whose row was still where it was, and still theirs.
    """
    any_result = any(result is not None for _, result in done)
    wanted = {
        "ctids": array(f'"{claim.ctid}"' for claim, _ in done),
        "ids": array(claim.key for claim, _ in done),
        "claims": array(str(claim.claims) for claim, _ in done),
        "results": [result for _, result in done] if any_result else [],
        "lock_timeout": milliseconds(lock_timeout),
    }
    return {(key, claims) for key, claims in connection.execute(FINISH.on(models), wanted)}


def finish_one(connection: Connection, models: Models, claim: Claim, result: str | None) -> bool:
    """Mark one claimed task DONE in the transaction at hand, and tell whether its row was still
    where it was, and still claimed."""
    wanted = {"ctid": claim.ctid, "id": claim.key, "claims": claim.claims, "result": result}
    return connection.execute(FINISH_ONE.on(models), wanted).rowcount == 1


def settle(
    connection: Connection,
    models: Models,
    settlements: t.Sequence[dict[str, t.Any]],
    lock_timeout: float | None = None,
) -> set[tuple[str, int]]:
    """Write other outcomes with their events.

    :param lock_timeout: seconds to wait for a locked row, in autocommit.
    :return: key and number of the claims that still held.
    """
    wanted = {
        "outcomes": json.dumps(settlements),
        "notify": notifies(connection),
        "lock_timeout": milliseconds(lock_timeout),
    }
    return {(key, claims) for key, claims in connection.execute(SETTLE.on(models), wanted)}


def spell(connection: Connection, outcomes: t.Iterable[Outcome]) -> None:
    """Let outcomes hold no letter that the database's encoding lacks."""
    with_letters = [outcome for outcome in outcomes if outcome.has_letters]
    if with_letters and (codec := codec_of(connection)) is not None:
        for outcome in with_letters:
            outcome.spell(codec)


def milliseconds(seconds: float | None) -> str | None:
    """Write a time as PostgreSQL's settings take it."""
    return None if seconds is None else f"{seconds * 1000:.0f}ms"
