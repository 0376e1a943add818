"""BeanQueue: SQLAlchemy on PostgreSQL, a batch of tasks in one transaction."""

from __future__ import annotations

import os
import subprocess

import bq
import sqlalchemy as sa
from bq.db.base import Base
from sqlalchemy.orm import Mapped, Session, mapped_column

from .. import tally
from ..system import System, clean_database, execute, run, settle_database

MODULE = "benchmarks.systems.beanqueue"


class Queue(bq.BeanQueue):
    def create_default_engine(self) -> sa.Engine:
        # Its settings refuse the URL of a server without a host; the pools are its own choice.
        threads = self.config.MAX_WORKER_THREADS
        if threads == 1:
            return sa.create_engine(
                os.environ["DATABASE_URL"], poolclass=sa.pool.SingletonThreadPool
            )
        return sa.create_engine(os.environ["DATABASE_URL"], pool_size=threads + 5)


app = Queue()


class Row(Base):
    __tablename__ = "bench_rows"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


@app.processor(channel="bench")
def nothing(number: int) -> None:
    tally.tick()


@app.processor(channel="bench")
def write(db: Session, number: int) -> None:
    db.add(Row(number=number))
    tally.tick()


@app.processor(channel="bench")
def mark(number: int) -> None:
    tally.mark(number)


#: It hands a session to its tasks, which is what an app uses.
PROCESSORS = {"nothing": nothing, "write": write, "session": write, "mark": mark}


class BeanQueue(System):
    """:param environ: settings of its worker, without their ``BQ_``."""

    name = "BeanQueue"

    def __init__(self, settings: str = "", log: str = "info", **environ: str) -> None:
        super().__init__(settings)
        self.log = log
        self.environ = {f"BQ_{key}": value for key, value in environ.items()}

    def clean(self) -> None:
        clean_database()
        Base.metadata.create_all(app.engine)

    def fill(self, kind: str, number: int) -> None:
        name = PROCESSORS[kind].run().func_name
        with app.make_session() as session:
            session.execute(
                sa.insert(bq.Task),
                [
                    {
                        "channel": "bench",
                        "module": MODULE,
                        "func_name": name,
                        "kwargs": {"number": each},
                    }
                    for each in range(number)
                ],
            )
            session.commit()
        settle_database()

    def enqueue(self, kind: str, number: int) -> None:
        with app.make_session() as session:
            session.add(PROCESSORS[kind].run(number=number))
            session.commit()

    def start(self) -> subprocess.Popen[bytes]:
        return run(
            "bq.cmds.main",
            *("--log-level", self.log, "--app", f"{MODULE}.app", "process", "bench"),
            BQ_PROCESSOR_PACKAGES=f'["{MODULE}"]',
            # A thread with a server for health checks, on a port that others may have.
            BQ_METRICS_HTTP_SERVER_ENABLED="false",
            **self.environ,
        )

    def left(self) -> int:
        # It knows no SIGTERM: the batch at work is broken off, and rolled back.
        [(count,)] = execute("SELECT count(*) FROM bq_tasks WHERE state <> 'DONE'")
        return int(str(count))


SYSTEMS: list[System] = [
    BeanQueue(),
    BeanQueue("batch 1000, no log", log="warning", BATCH_SIZE="1000"),
]
