"""BeanQueue: a batch of tasks in one transaction, on SQLAlchemy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import bq
import sqlalchemy as sa
from bq.db.base import Base
from sqlalchemy.orm import Mapped, Session, mapped_column

from ...processes import Process
from .. import app as shop
from ..ledger import cursor

#: The threads of a worker.
THREADS = 4


class Queue(bq.BeanQueue):
    def create_default_engine(self) -> sa.Engine:
        # Its settings refuse the URL of a server without a host.
        return sa.create_engine(os.environ["DATABASE_URL"], pool_size=THREADS + 5)


app = Queue()


class Sale(Base):
    __tablename__ = "sale"
    number: Mapped[int] = mapped_column(primary_key=True)


class Shipment(Base):
    __tablename__ = "shipment"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    at: Mapped[Any] = mapped_column(
        sa.DateTime(timezone=True), server_default=sa.func.clock_timestamp()
    )


@app.processor(channel="chaos")
def ship(db: Session, number: int) -> None:
    shop.take_time()
    db.add(Shipment(number=number))


@app.processor(channel="chaos")
def send(number: int) -> None:
    shop.take_time()
    shop.post(number)


class BeanQueue:
    name = "BeanQueue"
    code = -15  # it has no handler for SIGTERM

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)

    def create(self) -> None:
        Base.metadata.create_all(self._engine)

    def sell(self, numbers: Iterable[int]) -> None:
        processors = {"ship": ship, "send": send}
        with Session(self._engine) as session:
            for number in numbers:
                session.add(Sale(number=number))
                session.add(processors[shop.processor(number)].run(number=number))
            session.commit()

    def start(self, env: dict[str, str], *prefix: str, processes: int = 1) -> Process:
        return Process(
            *("-m", "bq.cmds.main", "--log-level", "warning"),
            *("--app", f"{__name__}.app", "process", "chaos"),
            env={
                **env,
                "BQ_PROCESSOR_PACKAGES": f'["{__name__}"]',
                "BQ_METRICS_HTTP_SERVER_ENABLED": "false",
                "BQ_MAX_WORKER_THREADS": str(THREADS),
                "BQ_BATCH_SIZE": str(THREADS),
                # In whole seconds, and so somewhat longer than ours.
                "BQ_WORKER_HEARTBEAT_PERIOD": "1",
                "BQ_WORKER_HEARTBEAT_TIMEOUT": "3",
                "BQ_POLL_TIMEOUT": "1",
            },
            prefix=prefix,
            strict=False,
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
        return []

    def close(self) -> None:
        self._engine.dispose()


SYSTEM: Any = BeanQueue
