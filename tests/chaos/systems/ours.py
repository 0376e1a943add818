"""This queue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from flask import Flask

from ...processes import Process
from .. import app as shop
from ..ledger import cursor


class Ours:
    name = "flask_beanqueue"
    code = 0

    def __init__(self, url: str) -> None:
        self._app: Flask = shop.create_app(url)

    def create(self) -> None:
        with self._app.app_context():
            shop.db.create_all()

    def sell(self, numbers: Iterable[int]) -> None:
        with self._app.app_context():
            numbers = list(numbers)
            session = shop.db.session
            session.execute(sa.insert(shop.Sale), [{"number": number} for number in numbers])
            for processor in (shop.ship, shop.send):
                mine = [each for each in numbers if shop.processor(each) == processor.func_name]
                if len(mine) == 1:
                    processor.enqueue(number=mine[0])
                elif mine:
                    processor.enqueue_many([{"number": number} for number in mine])
            session.commit()

    def start(self, env: dict[str, str], *prefix: str, processes: int = 1) -> Process:
        return Process(
            *("-m", "flask", "--app", "tests.chaos.app", "bq", "worker"),
            *("--concurrency", "4", "--processes", str(processes)),
            env=env,
            prefix=prefix,
        )

    def dead(self, dsn: str) -> int:
        with cursor(dsn) as database:
            database.execute("SELECT count(*) FROM bq_workers WHERE state = 'NO_HEARTBEAT'")
            return int(database.fetchone()[0])

    def undone(self, dsn: str) -> dict[str, int]:
        with cursor(dsn) as database:
            database.execute(
                "SELECT state, count(*) FROM bq_tasks WHERE state <> 'DONE' GROUP BY state"
            )
            return dict(database.fetchall())

    def remarks(self, dsn: str) -> list[str]:
        remarks = []
        with cursor(dsn) as database:
            database.execute("SELECT count(*) FROM bq_tasks WHERE attempts > 1")
            [(attempts,)] = database
            database.execute("SELECT max(crashes), max(interruptions) FROM bq_tasks")
            [(crashes, interruptions)] = database
        if attempts:
            remarks.append(f"{attempts} tasks have more than one attempt")
        if crashes:
            remarks.append(f"at most {crashes} crashes of a task")
        if interruptions:
            remarks.append(f"at most {interruptions} interruptions of a task")
        return remarks

    def close(self) -> None:
        with self._app.app_context():
            shop.db.engine.dispose()


SYSTEM: Any = Ours
