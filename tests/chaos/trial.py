"""The trial: one scenario, from an empty database to the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psycopg2

from ..postgres import Server
from ..processes import Process
from . import systems
from .ledger import LASTING, Ledger, Verdict, cursor, rate, recovered
from .network import Network
from .shop import Shop
from .watch import Watch

#: Seconds that a task waits.
PAUSE = 0.05
#: Seconds until the rate is steady, and for which it is then measured before the faults.
STEADY, BEFORE = 2.0, 6.0
#: Seconds after which nothing more is expected, neither the former rate nor the end of the tasks.
PATIENCE = 60.0
#: Seconds that workers have for their first hundred shipments.
START = 60.0

#: Ours: short enough for a suite that takes minutes, long enough for a busy machine.
HEARTBEAT = {"BQ_WORKER_HEARTBEAT_PERIOD": "0.5", "BQ_WORKER_HEARTBEAT_TIMEOUT": "3"}


@dataclasses.dataclass
class Place:
    """Where a trial takes place."""

    server: Server
    #: How workers reach the database, and how the shop does.
    worker_url: str
    shop_url: str
    #: How the books do, whatever is done to the others.
    dsn: str
    #: What comes before the command of a worker.
    prefix: tuple[str, ...] = ()
    #: Settings of the workers, and of each by itself.
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    each_env: Sequence[Mapping[str, str]] = ()
    #: What is between the workers and the server, and who follows it, if that is so.
    network: Network | None = None
    second: Server | None = None


@dataclasses.dataclass
class Scenario:
    """One kind of fault.

    :param inject: injects it, as often as it says.
    :param codes: with which exit codes workers end by it.
    """

    name: str
    inject: Callable[[Trial], None]
    place: Callable[[], contextlib.AbstractContextManager[Place]]
    workers: int = 2
    #: How many processes each worker has.
    processes: int = 1
    codes: Sequence[int] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Start(Protocol):
    """Starts a worker, given its number and settings of its own."""

    def __call__(self, number: int, **own: str) -> Process: ...


class Trial:
    """What a scenario has in its hands."""

    def __init__(
        self,
        place: Place,
        system: systems.System,
        ledger: Ledger,
        watch: Watch,
        start: Start,
        *,
        hasty: bool = False,
    ) -> None:
        #: Starts another worker, which nobody watches over.
        self.start = start
        self.place = place
        self.system = system
        self.ledger = ledger
        self.watch = watch
        #: How many were seen, and how many were to be, at least.
        self.faults = 0
        self.wanted = 0
        self.broken: list[str] = []
        self.remarks: list[str] = []
        #: Whether it is enough to see each fault a few times.
        self.hasty = hasty

    @property
    def server(self) -> Server:
        return self.place.server

    @property
    def workers(self) -> list[Process]:
        return self.watch.workers

    def fault(self, seen: int, of: int = 1) -> None:
        """Count faults: not those that were ordered, but those that were seen to happen.

        :param of: how many there were to be, at least.
        """
        self.faults += seen
        self.wanted += of

    def sees(self, condition: Callable[[], bool]) -> bool:
        """Wait for something, and tell whether it came."""
        with contextlib.suppress(TimeoutError):
            wait_until(condition, "what was to be seen", self.watch)
            return True
        return False

    @property
    def dead(self) -> int:
        """How many workers count as dead."""
        return self.system.dead(self.place.dsn)

    def execute(self, statement: str) -> int:
        """Do something in the database, past all faults; return how many rows it was about."""
        with cursor(self.place.dsn) as database:
            database.execute(statement)
            return int(database.rowcount)

    def ask(self, query: str) -> Any:
        """The one value that a query comes to, past all faults."""
        with cursor(self.place.dsn) as database:
            database.execute(query)
            [(value,)] = database
            return value

    def add(self, func_name: str, count: int = 1, kwargs: str = "'{}'") -> None:
        """Let tasks beside the sales be done before them, one after the other.

        :param kwargs: their arguments, as SQL, in which ``number`` counts from 1.
        """
        self.execute(
            "INSERT INTO bq_tasks (channel, module, func_name, kwargs, priority, scheduled_at)"
            f" SELECT 'chaos', 'tests.chaos.app', '{func_name}', {kwargs}, -1,"
            " now() + number * interval '1 microsecond'"
            f" FROM generate_series(1, {count}) AS number"
        )

    def wait_for_next(self, number: int, before: Process) -> Process:
        """Wait until another worker has taken one's place."""
        wait_until(lambda: self.workers[number] is not before, "the next worker", self.watch)
        return self.workers[number]

    def every(self, seconds: float, times: int) -> Iterator[int]:
        """Go on at a pace."""
        for each in range(min(times, 3) if self.hasty else times):
            if each:
                time.sleep(seconds)
            yield each


def conduct(scenario: Scenario, system_name: str, *, hasty: bool = False) -> Verdict:
    """Put a system through a scenario."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.chmod(0o777)
        place = stack.enter_context(scenario.place())
        system = systems.load(system_name)(place.shop_url)
        stack.callback(system.close)
        system.create()
        ledger = Ledger(place.dsn, folder)
        shop = Shop(system.sell, ledger)
        stack.callback(shop.close)
        shop.open()

        def start(number: int, **own: str) -> Process:
            env = {
                "DATABASE_URL": place.worker_url,
                "CHAOS_FOLDER": str(folder),
                "CHAOS_PAUSE": str(PAUSE),
                **HEARTBEAT,
                **place.env,
                **(place.each_env[number] if place.each_env else {}),
                **scenario.env,
                **own,
            }
            return system.start(env, *place.prefix, processes=scenario.processes)

        watch = Watch(start, scenario.workers)
        stack.callback(watch.stop)
        wait_until(lambda: len(ledger.times()) > 100, "the first shipments", watch, START)
        time.sleep(STEADY)
        began = time.time()
        time.sleep(BEFORE)
        trial = Trial(place, system, ledger, watch, start, hasty=hasty)
        fault_at = time.time()
        scenario.inject(trial)
        over = time.time()
        before = rate(times(ledger), began, fault_at)
        back, end = wait_for_rate(ledger, over, before)
        after = rate(times(ledger), end - LASTING, end)
        if during := [each for each in times(ledger) if fault_at <= each <= over]:
            trial.remarks.insert(0, f"{len(during) / (over - fault_at):.0f}/s during the faults")

        shop.close()
        (folder / "closing").touch()
        with contextlib.suppress(TimeoutError):
            wait_until(
                lambda: ledger.open_sales() == 0 and not system.undone(place.dsn),
                "the end of all tasks",
                watch,
            )
        if trial.faults < (wanted := max(trial.wanted, 1)):
            trial.broken.append(f"{trial.faults} faults seen of {wanted}")
        codes = watch.stop()
        if set(codes) != {system.code}:
            trial.broken.append(f"workers left with {codes}")
        if odd := sorted(set(watch.codes) - set(scenario.codes)):
            trial.broken.append(f"workers ended with {odd} by themselves")
        if verbose := os.environ.get("CHAOS_OUTPUT"):
            Path(verbose).write_text("\n=====\n".join(watch.outputs))
        sold, undone = ledger.sold, system.undone(place.dsn)
        trial.remarks += [f"{count} tasks are {state}" for state, count in undone.items()]
        return Verdict(
            scenario=scenario.name,
            system=system.name,
            faults=trial.faults,
            tasks=len(sold),
            lost=ledger.lost(),
            doubled=ledger.doubled(),
            unfinished=sum(undone.values()),
            posted_again=sum(ledger.posted.values()) - len(ledger.posted),
            refused=len(ledger.refused),
            recovery=None if back is None else back - over,
            before=before,
            after=after,
            broken=trial.broken,
            remarks=trial.remarks + system.remarks(place.dsn),
        )


def wait_until(
    condition: Callable[[], bool], what: str, watch: Watch, patience: float | None = None
) -> None:
    deadline = time.monotonic() + (PATIENCE if patience is None else patience)
    while time.monotonic() < deadline:
        with contextlib.suppress(psycopg2.Error):
            if condition():
                return
        time.sleep(0.1)
    said = "\n".join(worker.output[-2000:] for worker in watch.workers)
    raise TimeoutError(f"{what} did not come. The workers said:\n{said}")


def times(ledger: Ledger) -> list[float]:
    """When shipments were made, as soon as the database tells."""
    while True:
        with contextlib.suppress(psycopg2.Error):
            return ledger.times()
        time.sleep(0.1)


def wait_for_rate(ledger: Ledger, since: float, wanted: float) -> tuple[float | None, float]:
    """Wait until the rate is back; return when that was, and until when it was looked at."""
    while True:
        # Without the last moment, of which not all is committed yet.
        now = time.time() - 0.2
        back = recovered(times(ledger), since, now, wanted)
        if back is not None:
            return back, back + LASTING
        if now > since + PATIENCE:
            return None, now
        time.sleep(0.5)
