"""What a task costs who makes it: a request, and somebody who makes very many."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flask_beanqueue.codec import ENCODER
from flask_beanqueue.models.uuid7 import uuid7s

from .. import app as bench
from ..sizes import Sizes
from ..step import Figures, Step
from ..system import System
from ..systems.bare import connect
from ..systems.ours import FlaskBeanQueue


def add_note(number: int) -> None:
    bench.db.session.add(bench.Note(kind="nothing", content={"number": number}))


def add_task(number: int) -> None:
    bench.nothing.enqueue(number=number)


#: What a request writes beside a row of its own.
BESIDE: dict[str, Callable[[int], None]] = {
    "alone": lambda number: None,
    "row": add_note,
    "task": add_task,
}


def requests(number: int) -> Figures:
    """Seconds of a request that writes a row: alone, beside a second one, and beside a task.

    They take turns, so that whatever else the machine does hits all of them.
    """
    system = FlaskBeanQueue()
    system.clean()
    took: dict[str, list[float]] = {each: [] for each in BESIDE}
    for each in range(number):
        for name, add in BESIDE.items():
            with system.app.test_request_context():
                begun = time.perf_counter()
                bench.db.session.add(bench.Row(number=each))
                add(each)
                bench.db.session.commit()
                took[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in took.items()}


def many(number: int) -> Figures:
    """Tasks a second of ``enqueue_many``, from arguments to commit."""
    system = FlaskBeanQueue()
    system.clean()
    arguments = [{"number": each} for each in range(number)]
    with system.app.app_context():
        begun = time.perf_counter()
        bench.nothing.enqueue_many(arguments)
        bench.db.session.commit()
        return {"rate": number / (time.perf_counter() - begun)}


COLUMNS = "id, channel, module, func_name, kwargs, priority, scheduled_at, parent_id"


def copy(number: int, *, ready: bool) -> Figures:
    """Tasks a second of COPY into the same columns, with NOTIFY and the commit.

    :param ready: whether the text that COPY sends has been made beforehand; if not, the clock
        starts with the arguments, as that of ``enqueue_many`` does.
    """
    FlaskBeanQueue().clean()
    arguments = [{"number": each} for each in range(number)]
    begun = time.perf_counter()
    text = copy_text(arguments)
    if ready:
        begun = time.perf_counter()
    with contextlib.closing(connect(autocommit=False)) as connection:
        cursor = connection.cursor()
        cursor.copy_expert(f"COPY bq_tasks ({COLUMNS}) FROM STDIN", io.StringIO(text))
        cursor.execute("SELECT pg_notify('bench', '')")
        connection.commit()
    return {"rate": number / (time.perf_counter() - begun)}


def copy_text(arguments: list[dict[str, Any]]) -> str:
    """Tasks in COPY's text format, made in the way of ``enqueue_many``."""
    now = time.strftime("%Y-%m-%d %H:%M:%S+00", time.gmtime())
    return "".join(
        f"{id}\tbench\tbenchmarks.app\tnothing\t{escaped(ENCODER.encode(each))}\t0\t{now}\t\\N\n"
        for id, each in zip(uuid7s(len(arguments)), arguments, strict=True)
    )


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")


def steps(sizes: Sizes, peers: Sequence[System]) -> Iterator[Step]:
    def step(case: str, system: str, run: Callable[[], Figures]) -> Step:
        seconds = sizes.requests / 200 if case == "request" else sizes.many / 100_000
        return Step("enqueue", case, system, run, seconds + 0.5, rounds=2)

    ours = str(FlaskBeanQueue())
    yield step("request", ours, lambda: requests(sizes.requests))
    yield step("many", ours, lambda: many(sizes.many))
    yield step("many", "COPY from arguments", lambda: copy(sizes.many, ready=False))
    yield step("many", "COPY of ready text", lambda: copy(sizes.many, ready=True))
