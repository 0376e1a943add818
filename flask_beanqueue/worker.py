"""The worker: claims tasks, hands them to threads, and writes what becomes of them."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import os
import queue
import selectors
import signal
import socket
import threading
import time
import types
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from . import outcome as outcomes
from . import signals
from .claim import Claim
from .connection import connect, named
from .executor import execute, make_task
from .heartbeat import Heartbeat
from .listen import Listener
from .log import log
from .models import PENDING, uuid7
from .outcome import Outcome
from .queries import Level

if t.TYPE_CHECKING:
    from .extension import BeanQueue

#: What the loop survives.
TROUBLE = (sa.exc.DBAPIError, sa.exc.TimeoutError)

#: Seconds within which a claimed task should start: how much is claimed ahead.
HORIZON = 0.1
#: Seconds that an outcome waits for others to be written with.
FLUSH_AFTER = 0.02
#: Seconds after which claimed tasks that cannot start are given back.
GIVE_BACK_AFTER = 0.5
#: A look from the front may take one twentieth of the time, and comes after a second at most.
LOOK_SHARE = 20
LOOK_WITHIN = 1.0
#: Levels that a worker keeps in mind although nothing waits there.
MANY_LEVELS = 100
#: Weight of the newest duration in their running mean.
NEWEST = 0.1


class WorkerDied(RuntimeError):
    """The worker was declared dead by another one, since its heartbeats had stopped coming."""


class Done(t.NamedTuple):
    """A task that a thread is through with."""

    at: float
    claim: Claim
    #: What is still to be written, if anything.
    outcome: Outcome | None


class Worker:
    """One worker process: a loop in the calling thread, threads that run tasks, a heartbeat.

    :param app: the Flask app in whose contexts the tasks run.
    :param channels: whose tasks it does.
    :param concurrency: how many threads run tasks.
    :param burst: leave when no task is due.
    :param name: what people see; host and process id, unless said.
    """

    def __init__(
        self,
        app: Flask,
        bq: BeanQueue,
        channels: t.Sequence[str],
        *,
        concurrency: int | None = None,
        burst: bool = False,
        name: str | None = None,
    ) -> None:
        self.app = app
        self.bq = bq
        self.config = bq.config(app)
        self.engine = bq.engine(app)
        self.channels = tuple(channels)
        self.concurrency = concurrency or self.config.CONCURRENCY
        self.burst = burst
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.id = uuid7()
        check_pool(self.engine, self.concurrency)

        # What is where. A claim is held until its outcome is written.
        self._held: dict[uuid.UUID, Claim] = {}
        self._ready: queue.SimpleQueue[Claim | None] = queue.SimpleQueue()
        self._running: dict[int, tuple[Claim, float]] = {}
        self._done: collections.deque[Done] = collections.deque()
        self._unsure: set[uuid.UUID] = set()
        #: A task that was in a crash, and waits until it can run alone; or does so.
        self._suspect: Claim | None = None
        self._suspect_runs = False

        # Where the queue stands.
        self._levels: dict[tuple[str, int], Level] = {}
        self._turns = 0
        self._mean: float | None = None
        self._next_look = 0.0
        self._fruitless = 0
        self._quiet_until = 0.0
        self._empty = False

        self._stopping = False
        self._grace_until = float("inf")
        self._died = False
        self._asleep = False
        self._wake_read: socket.socket | None = None
        self._wake_write: socket.socket | None = None
        self._connection: Connection | None = None
        self._listener: Listener | None = None
        self._next_listen = 0.0
        self._failures = 0

    # Life.

    def run(self) -> None:
        """Work until told to stop.

        :raises WorkerDied: if another worker declared this one dead.
        """
        # An app context around the loop would collect what the app keeps for each context, such
        # as SQLALCHEMY_RECORD_QUERIES: the loop runs outside of any.
        contextvars.Context().run(self._run)

    def stop(self) -> None:
        """Claim no more, end what runs within the grace time, and return; called again, at once.

        It may be called from any thread, and from a signal handler.
        """
        if self._stopping:
            self._grace_until = time.monotonic()
        else:
            self._grace_until = time.monotonic() + self.config.SHUTDOWN_TIMEOUT
            self._stopping = True
        self._wake()

    def _run(self) -> None:
        with self.app.app_context():
            engines = list(self.bq.db.engines.values())
        with self._bell(), named(engines, self.id), self._signal_handlers():
            self._connection = connect(self.engine)
            try:
                self.bq.queries.add_worker(self._connection, self.id, self.name, self.channels)
            except BaseException:
                self._disconnect()
                raise
            heartbeat = Heartbeat(
                self.engine,
                self.bq.queries,
                self.config,
                self.id,
                on_death=self._die,
                on_outcome=self._announce,
            )
            heartbeat.start()
            for number in range(self.concurrency):
                threading.Thread(
                    target=self._perform, args=(number,), name=f"beanqueue-{number}", daemon=True
                ).start()
            try:
                self._listen()
                self._introduce()
                signals.send(
                    signals.worker_started, self.app, worker_id=self.id, channels=self.channels
                )
                self._loop()
            finally:
                self._leave(heartbeat)
        if self._died:
            raise WorkerDied(
                f"Worker {self.name} was declared dead: it sent no heartbeat for"
                f" {self.config.WORKER_HEARTBEAT_TIMEOUT:g} s (BQ_WORKER_HEARTBEAT_TIMEOUT)."
                " Its tasks were given to other workers."
            )

    def _introduce(self) -> None:
        from . import __version__

        log.info(
            "flask_beanqueue %s: worker %s (%s) on %s; %d at once; %d processor%s known; %s",
            __version__,
            self.name,
            self.id,
            ", ".join(self.channels),
            self.concurrency,
            len(self.bq.registry),
            "" if len(self.bq.registry) == 1 else "s",
            "LISTEN" if self._listener else f"polling every {self.config.poll_timeout:g} s",
        )

    def _die(self) -> None:
        self._died = True
        self.stop()

    @contextlib.contextmanager
    def _bell(self) -> t.Iterator[None]:
        """What other threads and signal handlers wake the loop with."""
        self._wake_read, self._wake_write = socket.socketpair()
        with self._wake_read, self._wake_write:
            self._wake_read.setblocking(False)
            self._wake_write.setblocking(False)
            yield

    @contextlib.contextmanager
    def _signal_handlers(self) -> t.Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # whoever made the thread tells us to stop
            return

        seen = set()

        def handler(number: int, frame: types.FrameType | None) -> None:
            # Ctrl-C reaches the whole process group, and a parent may send SIGTERM on top of it.
            # Only the same signal again means impatience.
            if not self._stopping or number in seen:
                self.stop()
            seen.add(number)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, handler) for number in numbers]
        try:
            yield
        finally:
            for number, previous in zip(numbers, before, strict=True):
                signal.signal(number, previous)

    def _loop(self) -> None:
        while not self._stopping:
            try:
                self._fill()
                self._flush()
                self._start_suspect()
                self._give_back_waiting()
            except TROUBLE as error:
                self._reconnect(error)
                continue
            self._failures = 0
            if self.burst and self._empty and not self._held:
                break
            self._wait()

    def _leave(self, heartbeat: Heartbeat) -> None:
        """Give back what has not started, wait for what runs, and say goodbye."""
        if not self._stopping:
            self.stop()
        log.info("Worker %s stops; %d running", self.name, len(self._running))
        try:
            while True:
                try:
                    self._give_back(self._take_ready())
                    if self._suspect is not None and not self._suspect_runs:
                        self._give_back([self._suspect])
                    self._flush()
                    if self._held and time.monotonic() >= self._grace_until:
                        log.warning("The time is up: %d tasks are given back", len(self._held))
                        self._flush(everything=True)
                        self._give_back(list(self._held.values()))
                    if not self._held:
                        heartbeat.stop()  # or it would take the retired for the dead
                        self.bq.queries.retire(self._connected(), self.id)
                        break
                except TROUBLE as error:
                    if time.monotonic() >= self._grace_until:
                        log.error("Worker %s could not say goodbye: %s", self.name, error)
                        break
                    self._reconnect(error)
                    continue
                self._wait()
        finally:
            for _ in range(self.concurrency):
                self._ready.put(None)
            heartbeat.stop()
            self._disconnect()
            self._deafen()
            signals.send(
                signals.worker_stopped, self.app, worker_id=self.id, channels=self.channels
            )
            log.info("Worker %s has stopped", self.name)

    # Claiming.

    def _fill(self) -> None:
        """Claim as much as will start within a short while."""
        if self._suspect is not None or time.monotonic() < self._quiet_until:
            return
        connection = self._connected()
        if not self._levels:
            self._levels = {(channel, 0): Level(channel, 0) for channel in self.channels}
            if not self._look(connection):
                return
        while (wanted := self._wanted()) > 0:
            self._empty = False
            claims = self.bq.queries.claim(connection, self.id, self._turn(), wanted)
            self._take(claims)
            now = time.monotonic()
            if claims:
                self._fruitless = 0
            if len(claims) == wanted:
                if now < self._next_look + LOOK_WITHIN / 4:
                    continue
            else:
                for level in self._levels.values():
                    level.return_()
                if now < self._next_look:
                    self._quiet_until = self._next_look
                    return
            if not self._look(connection):
                return

    def _turn(self) -> list[Level]:
        """The levels by priority; of equal ones, each channel comes first in its turn."""
        self._turns += 1
        levels = list(self._levels.values())
        start = self._turns % max(len(levels), 1)
        return sorted(levels[start:] + levels[:start], key=lambda level: level.priority)

    def _wanted(self) -> int:
        """How many tasks to claim now."""
        now = time.monotonic()
        started = [at for _, at in list(self._running.values())]
        free = self.concurrency - len(started)
        ahead = 0
        if self._mean is not None:
            # A thread that has been busy for longer may be so for a while.
            moving = self.concurrency - sum(now - at > HORIZON for at in started)
            ahead = min(self.config.BATCH_SIZE, int(moving * HORIZON / max(self._mean, 1e-6)))
        target = max(free, ahead)
        ready = self._ready.qsize()
        return min(target - ready, self.config.BATCH_SIZE) if 2 * ready <= target else 0

    def _take(self, claims: list[Claim]) -> None:
        for claim in claims:
            self._held[claim.id] = claim
            self._levels[claim.channel, claim.priority].mark = claim.scheduled_at, claim.id
            self._ready.put(claim)

    def _look(self, connection: Connection) -> bool:
        """Look from the front for what the marks have passed, and for how long to sleep.

        :return: whether anything is due.
        """
        start = time.monotonic()
        look = self.bq.queries.look(connection, self.channels)
        now = time.monotonic()
        # Where something is due and yet not to be had, each look comes later than the one before.
        pause = max(LOOK_SHARE * (now - start), 0.01 * 2 ** min(self._fruitless, 10))
        self._next_look = now + min(pause, LOOK_WITHIN)
        self._fruitless += 1
        if len(self._levels) > MANY_LEVELS:  # keep those that are in use
            fronts = {(front.channel, front.priority) for front in look.fronts}
            self._levels = {key: self._levels[key] for key in self._levels if key in fronts}
        due = False
        for front in look.fronts:
            level = self._levels.setdefault(
                (front.channel, front.priority), Level(front.channel, front.priority)
            )
            if front.due_in <= 0:
                due = True
                if (front.at, front.id) <= level.mark:
                    level.go_back(front)
        if look.suspects:
            suspect = self.bq.queries.claim_suspect(connection, self.id, self.channels)
            if suspect is not None:
                self._suspect = self._held[suspect.id] = suspect
                self._fruitless = 0
                return False
        if due:
            return True
        self._fruitless = 0
        self._empty = True
        self._quiet_until = now + self.config.poll_timeout
        if look.next_due is not None:
            self._quiet_until = min(self._quiet_until, now + look.next_due)
        return False

    def _start_suspect(self) -> None:
        """Start the task that was in a crash as soon as nothing else is held that it could take
        along."""
        if self._suspect is not None and not self._suspect_runs and len(self._held) == 1:
            self._suspect_runs = True
            self._ready.put(self._suspect)

    def _give_back_waiting(self) -> None:
        """Give back what was claimed but cannot start soon, because long tasks have all threads."""
        now = time.monotonic()
        started = [at for _, at in list(self._running.values())]
        if len(started) == self.concurrency and now - max(started) > GIVE_BACK_AFTER:
            self._give_back(self._take_ready())

    def _take_ready(self) -> list[Claim]:
        """Take back what no thread has begun."""
        claims = []
        with contextlib.suppress(queue.Empty):
            while (claim := self._ready.get_nowait()) is not None:
                claims.append(claim)
        return claims

    def _give_back(self, claims: list[Claim]) -> None:
        try:
            self._write([outcomes.given_back(claim) for claim in claims])
        except BaseException:
            for claim in claims:
                if claim.id in self._held and claim is not self._suspect:
                    self._ready.put(claim)
            raise

    # Finishing.

    def _flush(self, *, everything: bool = False) -> None:
        """Write the outcomes that have gathered, if it is time."""
        if not self._done:
            return
        if not (
            everything
            or self._idle()
            or len(self._done) >= self.config.BATCH_SIZE
            or time.monotonic() - self._done[0].at >= FLUSH_AFTER
        ):
            return
        done = [self._done.popleft() for _ in range(len(self._done))]
        try:
            self._write([each.outcome for each in done if each.outcome is not None])
        except BaseException:
            self._done.extendleft(reversed(done))
            raise
        for each in done:
            self._held.pop(each.claim.id, None)
            if each.claim is self._suspect:
                self._suspect, self._suspect_runs = None, False
                self._ask_again()
        if self.burst:  # the tasks may have made others
            self._ask_again()

    def _idle(self) -> bool:
        """Whether all that is held is done."""
        return len(self._held) <= len(self._done)

    def _ask_again(self) -> None:
        self._quiet_until = 0.0
        self._empty = False

    def _write(self, batch: list[Outcome]) -> None:
        size = self.config.BATCH_SIZE
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            connection = self._connected()
            try:
                written = outcomes.write(self.bq.queries, connection, part)
            except BaseException:
                # They may have been written although the answer was lost.
                self._unsure.update(outcome.claim.id for outcome in part)
                raise
            for outcome in part:
                self._held.pop(outcome.claim.id, None)
                if outcome.claim is self._suspect:
                    self._suspect, self._suspect_runs = None, False
            if any(outcome.state == PENDING for outcome in written):
                self._ask_again()
            for outcome in written:
                self._announce(outcome)
            if len(written) < len(part):
                ids = {outcome.claim.id for outcome in written}
                for outcome in part:
                    if outcome.claim.id not in ids | self._unsure:
                        outcomes.lost(outcome.claim)
            self._unsure.difference_update(outcome.claim.id for outcome in part)

    def _announce(self, outcome: Outcome) -> None:
        def announce() -> None:
            outcomes.announce(self.app, outcome, lambda: make_task(self.bq, outcome.claim, outcome))

        if signals.any_receivers():
            with self.app.app_context():
                announce()
        else:
            announce()

    # The threads that run tasks.

    def _perform(self, number: int) -> None:
        while (claim := self._ready.get()) is not None:
            start = time.monotonic()
            self._running[number] = claim, start
            outcome = execute(self.app, self.bq, self.config, claim)
            end = time.monotonic()
            took = end - start
            self._mean = took if self._mean is None else self._mean + NEWEST * (took - self._mean)
            self._done.append(Done(end, claim, outcome))
            del self._running[number]
            if self._asleep and (
                self._ready.empty() or len(self._done) >= self.config.BATCH_SIZE
            ):
                self._wake()

    # Waiting.

    def _wait(self) -> None:
        """Sleep until there is something to do."""
        self._asleep = True
        try:
            timeout = self._timeout()
            with selectors.DefaultSelector() as selector:
                selector.register(t.cast(socket.socket, self._wake_read), selectors.EVENT_READ)
                if self._listener is not None:
                    selector.register(self._listener, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(timeout)]
        finally:
            self._asleep = False
        if self._wake_read in ready and self._wake_read is not None:
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
        if self._listener in ready:
            self._hear()
        if self._listener is None:
            self._listen()

    def _timeout(self) -> float:
        now = time.monotonic()
        until = now + self.config.poll_timeout
        if self._stopping:
            until = min(until, self._grace_until)
        if self._done:
            until = min(until, now if self._idle() else self._done[0].at + FLUSH_AFTER)
        if not self._ready.empty():
            until = min(until, now + GIVE_BACK_AFTER / 2)
        if not self._stopping and self._suspect is None and self._wanted() > 0:
            until = min(until, self._quiet_until)
        if self.config.LISTEN and self._listener is None and not self._stopping:
            until = min(until, self._next_listen)
        return max(until - now, 0.0)

    def _wake(self) -> None:
        if self._wake_write is not None:
            with contextlib.suppress(OSError):  # full: it will wake; closed: it has left
                self._wake_write.send(b"\0")

    def _hear(self) -> None:
        """Take notifications; find out if the connection has gone."""
        assert self._listener is not None
        try:
            if self._listener.drain():
                self._quiet_until = 0.0
        except Exception as error:
            log.warning("The LISTEN connection is lost: %s", reason(error))
            self._deafen()

    def _listen(self) -> None:
        """LISTEN, and look once more for what came before."""
        now = time.monotonic()
        if not self.config.LISTEN or self._stopping or now < self._next_listen:
            return
        try:
            self._listener = Listener(self.engine, self.channels)
        except Exception as error:
            log.warning("LISTEN fails, polling meanwhile: %s", reason(error))
            self._next_listen = now + 1.0
        self._quiet_until = self._next_look = 0.0

    def _deafen(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(Exception):
                self._listener.close()
            self._listener = None

    # The loop's connection.

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = connect(self.engine)
            timeout = self.config.WORKER_HEARTBEAT_TIMEOUT
            alive, _ = self.bq.queries.beat(connection, self.id, timeout, bury=False)
            if not alive and not self._stopping:
                self._die()
            # A claim may have been committed whose answer was lost with the old connection.
            mine = self.bq.queries.mine(connection, self.id)
            strays = [
                outcomes.given_back(claim)
                for claim in mine
                if claim.id not in self._held or self._held[claim.id].claims != claim.claims
            ]
            if strays:
                outcomes.write(self.bq.queries, connection, strays)
            self._connection = connection
            self._quiet_until = self._next_look = 0.0
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def _reconnect(self, error: sa.exc.SQLAlchemyError) -> None:
        """Connect again, however long it takes; tasks go on running meanwhile.

        :raises sqlalchemy.exc.SQLAlchemyError: the error, if connecting again cannot help.
        """
        while True:
            if isinstance(error, sa.exc.ProgrammingError) and not error.connection_invalidated:
                raise error
            log.warning("The database fails, and is tried again: %s", reason(error))
            self._disconnect()
            time.sleep(min(0.05 * 2**self._failures, 2.0))
            self._failures = min(self._failures + 1, 10)
            if self._stopping and time.monotonic() >= self._grace_until:
                return
            try:
                self._connected()
                return
            except TROUBLE as again:
                error = again


def reason(error: BaseException) -> str:
    """An error of the database in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def check_pool(engine: sa.Engine, concurrency: int) -> None:
    """Refuse more threads than the app's pool has connections.

    :raises ValueError: naming both numbers.
    """
    pool = engine.pool
    if not isinstance(pool, sa.pool.QueuePool) or pool._max_overflow < 0:
        return
    most = pool.size() + pool._max_overflow
    # One is borrowed for a moment whenever the worker opens a connection of its own.
    if concurrency > most:
        raise ValueError(
            f"{concurrency} tasks at once need as many connections, but the app's pool has at most"
            f' {most}. Give it more with SQLALCHEMY_ENGINE_OPTIONS = {{"pool_size": {concurrency}}},'
            " or lower --concurrency (BQ_CONCURRENCY)."
        )
