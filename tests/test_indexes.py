"""Which way each statement finds its rows, among a million, whatever the statistics say."""

from __future__ import annotations

import contextlib
import importlib
import json
import pkgutil
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

import flask_beanqueue
from flask_beanqueue.engine import (
    attempt,
    checks,
    claim,
    completer,
    cursor,
    fence,
    heartbeat,
    quarantine,
    queue,
    settle,
    takeover,
)
from flask_beanqueue.engine.connection import connect
from flask_beanqueue.models.make import Models
from flask_beanqueue.sql import Sql, array

from .conftest import with_driver
from .stage import stage

ID = str(uuid.UUID(int=1))
MANY = [str(uuid.UUID(int=number)) for number in range(1, 1001)]
BEHIND = {"channels": ["default"], "priorities": [0], "ats": [0], "ids": [ID]}
SETTLEMENT = {"id": ID, "claims": 1, "state": "PENDING", "was_parked": False, "unknown": False}
FINISHED = {
    "ctids": array('"(0,1)"' for _ in MANY),
    "ids": array(MANY),
    "claims": array("1" for _ in MANY),
    "results": [],
    "lock_timeout": "100ms",
}
WORKER = {"worker_id": ID, "channels": ["default"], "most": 8_000}

#: For each statement that looks for tasks: values, and what it finds them by. By ctid: "tid".
TASKS: dict[str, tuple[Sql, dict[str, Any], set[str]]] = {
    "claim": (claim.CLAIM, {**WORKER, **BEHIND, "limit": 500}, {"pending", "tid"}),
    "first": (
        claim.FIRST,
        {"channel": "default", "priority": 0, "at": 0, "id": ID},
        {"pending"},
    ),
    "look": (cursor.LOOK, {"channels": ["default"]}, {"pending"}),
    "claim from quarantine": (quarantine.CLAIM_QUARANTINED, WORKER, {"suspect", "tid"}),
    "any in quarantine": (quarantine.ANY_QUARANTINED, {"channels": ["default"]}, {"suspect"}),
    "finish": (settle.FINISH, FINISHED, {"tid"}),
    "finish one": (
        settle.FINISH_ONE,
        {"ctid": "(0,1)", "id": ID, "claims": 1, "result": None},
        {"tid"},
    ),
    "settle": (
        settle.SETTLE,
        {"outcomes": json.dumps([SETTLEMENT]), "notify": True, "lock_timeout": None},
        {"key"},
    ),
    "locked": (completer.LOCKED, {"ids": MANY}, {"key"}),
    "cancelled": (completer.CANCELLED, {"ids": MANY}, {"key"}),
    "hold": (fence.HOLD, {"id": uuid.UUID(ID), "claims": 1}, {"key"}),
    "held": (fence.HELD, {"id": uuid.UUID(ID), "most": -1}, {"key"}),
    "arguments": (attempt.ARGUMENTS, {"id": ID, "claims": 1, "largest": 10}, {"key"}),
    "orphans": (
        takeover.ORPHANS,
        {"after": None, "limit": 1000, "known": "{}", "most": -1},
        {"processing"},
    ),
    "mine": (takeover.MINE, {"worker_id": ID, "most": -1}, {"processing"}),
}
#: What looks for no tasks, or for those of dead workers among few.
OTHERS = {
    *(checks.OBSTACLES, queue.INSERT, heartbeat.ADD_WORKER, heartbeat.BEAT, heartbeat.RETIRE),
    *(heartbeat.DECLARE_DEAD, heartbeat.DECLARE_SILENT_DEAD, heartbeat.DECLARE_OVERDUE_DEAD),
    heartbeat.TERMINATE,
}
INDEXES = {
    "ix_bq_tasks_pending": "pending",
    "ix_bq_tasks_processing": "processing",
    "ix_bq_tasks_suspect": "suspect",
    "pk_bq_tasks": "key",
    "bq_tasks_pkey": "key",
}


def test_every_statement_is_looked_at() -> None:
    found = set()
    for module in pkgutil.walk_packages(flask_beanqueue.__path__, "flask_beanqueue."):
        values = vars(importlib.import_module(module.name)).values()
        found |= {value for value in values if isinstance(value, Sql)}
    known = {statement for statement, _, _ in TASKS.values()} | OTHERS
    assert {each.text for each in found - known} == {LOCK_TABLES}


LOCK_TABLES = "SELECT pg_advisory_xact_lock(hashtextextended('flask_beanqueue tables', 0))"

#: 100,000 tasks wait, a million are done, a few run or have been in a crash.
FILL = """
    INSERT INTO bq_tasks (module, func_name, state, scheduled_at, crashes)
    SELECT 'a', 'b',
        CASE WHEN n <= 1000000 THEN 'DONE' WHEN n > 1100000 THEN 'PROCESSING' ELSE 'PENDING' END,
        now() - n * interval '1 millisecond', CASE WHEN mod(n, 100000) = 1 THEN 1 ELSE 0 END
    FROM generate_series(1, 1100100) AS n
"""


@pytest.fixture(scope="module")
def filled(own_databases: list[str]) -> Iterator[tuple[Connection, Models]]:
    with stage(with_driver(own_databases[0])) as on:
        engine = on.bq.engine(on.app)
        with contextlib.closing(connect(engine)) as connection:
            for statement in (
                "ALTER TABLE bq_tasks SET (autovacuum_enabled = false)",
                "INSERT INTO bq_tasks (module, func_name) VALUES ('a', 'b')",
                "ANALYZE bq_tasks",
                FILL,
            ):
                connection.exec_driver_sql(statement)
            yield connection, on.bq.models


#: How to get to such statistics, from those before it.
STATISTICS = {
    "stale": "SELECT 1",  # of one row
    "none": """
        DELETE FROM pg_statistic WHERE starelid = 'bq_tasks'::regclass;
        UPDATE pg_class SET reltuples = -1, relpages = 0 WHERE oid = 'bq_tasks'::regclass
    """,
    "fresh": "ANALYZE bq_tasks",
}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.mark.slow
@pytest.mark.parametrize("statistics", STATISTICS)
def test_each_statement_finds_its_tasks_by_the_index_that_is_there_for_it(
    filled: tuple[Connection, Models], statistics: str
) -> None:
    connection, models = filled
    connection.exec_driver_sql(STATISTICS[statistics])
    for name, (statement, values, expected) in TASKS.items():
        explain = sa.text(f"EXPLAIN (FORMAT JSON) {statement.on(models).text}")
        [plan] = connection.execute(explain, values).scalar_one()
        ways = set()
        for node in nodes(plan["Plan"]):
            if node["Node Type"].startswith("Tid"):
                ways.add("tid")
            elif "Index Name" in node:
                if node["Index Name"].startswith(("ix_bq_tasks", "pk_bq_tasks", "bq_tasks")):
                    ways.add(INDEXES[node["Index Name"]])
            elif node.get("Relation Name") == "bq_tasks" and node["Node Type"] not in (
                "ModifyTable",
                "Bitmap Heap Scan",
            ):
                ways.add(node["Node Type"])
        # Those that run are few.
        assert ways in (expected, expected | {"processing"}), (name, json.dumps(plan))
