"""The worker: claims tasks, hands them to its crew, and writes what becomes of them."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
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
from .crew import Crew
from .executor import execute, make_task
from .heartbeat import Heartbeat
from .listen import Listener
from .log import log, reason
from .marks import Marks
from .models import PENDING, uuid7
from .outcome import Outcome

if t.TYPE_CHECKING:
    from .extension import BeanQueue

#: What the loop survives.
TROUBLE = (sa.exc.DBAPIError, sa.exc.TimeoutError)

#: Seconds that an outcome waits for others to be written with.
FLUSH_AFTER = 0.02
#: Seconds that a task which has to run alone waits for that at first, with nothing else begun.
PATIENCE = 0.5
#: Longest sleep, in seconds, while LISTEN is wanted and cannot be had.
LISTEN_LOST = 1.0
#: Seconds after which claimed tasks that cannot start are given back.
GIVE_BACK_AFTER = 0.5


class WorkerDied(RuntimeError):
    """The worker was declared dead by another one, since its heartbeats had stopped coming."""


class Worker:
    """One worker process: a loop in the calling thread, threads that run tasks, a heartbeat.

    :param app: the Flask app in whose contexts the tasks run.
    :param channels: whose tasks it does.
    :param concurrency: how many threads run tasks.
    :param burst: leave when no task is due.
    :param name: what people see; host and process id, unless said.
    :raises ValueError: if the app's pool has fewer connections than that.
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

        self._crew = Crew(
            self.concurrency,
            functools.partial(execute, app, bq, self.config),
            self._news,
            self.config.BATCH_SIZE,
        )
        self._marks = Marks(self.channels)
        self._listener = Listener(self.engine, self.channels)
        self._connection: Connection | None = None
        #: Every claim whose outcome is not written yet.
        self._held: dict[uuid.UUID, Claim] = {}
        #: Outcomes that may have been written although the answer was lost.
        self._unsure: set[uuid.UUID] = set()
        #: A task that was in a crash, and waits until it can run alone; or does so.
        self._suspect: Claim | None = None
        self._suspect_runs = False
        #: How long it may wait, until when it does, and when the next one may be claimed.
        self._patience = PATIENCE
        self._suspect_until = 0.0
        self._next_suspect = 0.0

        #: There is nothing to claim before this time, unless there is news.
        self._quiet_until = 0.0
        self._looked = False
        self._empty = False
        self._failures = 0
        self._strays_at = float("inf")
        self._stopping = False
        self._grace_until = float("inf")
        self._died = False
        self._asleep = False
        self._bell: tuple[socket.socket, socket.socket] | None = None

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
        with self._hung_bell(), named(engines, self.id), self._signal_handlers():
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
            self._crew.start()
            try:
                self._listen()
                self._introduce()
                self._signal(signals.worker_started)
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
            "LISTEN" if self._listener.listens else f"polling every {self._poll_timeout:g} s",
        )

        for channel in set(self.channels) - set(self.bq.registry.channels):
            log.warning("No processor has %r as its channel; is it spelt right?", channel)

    def _signal(self, which: t.Any) -> None:
        signals.send(which, self.app, worker_id=self.id, channels=self.channels)

    def _die(self) -> None:
        self._died = True
        if not self._stopping:
            self.stop()

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
                if self._crew.waiting and self._crew.stuck_for > GIVE_BACK_AFTER:
                    self._give_back_waiting()
                self._return_strays_again()
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
        log.info("Worker %s stops; %d running", self.name, self._crew.running)
        try:
            while True:
                try:
                    self._give_back_waiting()
                    if self._suspect is not None and not self._suspect_runs:
                        self._give_back([self._suspect])
                    self._flush()
                    if self._held and time.monotonic() >= self._grace_until:
                        log.warning("Tasks given back while they run: %d", len(self._held))
                        self._flush(everything=True)
                        self._give_back(self._held.values())
                    if not self._held:
                        heartbeat.stop()  # or it would take the retired for the dead
                        self.bq.queries.retire(self._connected(), self.id)
                        break
                except TROUBLE as error:
                    if time.monotonic() >= self._grace_until:
                        log.error("Worker %s could not say goodbye: %s", self.name, reason(error))
                        break
                    self._reconnect(error)
                    continue
                self._wait()
        finally:
            self._crew.dismiss()
            heartbeat.stop()
            self._disconnect()
            self._listener.close()
            self._signal(signals.worker_stopped)
            log.info("Worker %s has stopped", self.name)

    # Claiming.

    def _fill(self) -> None:
        """Claim as much as will start within a short while."""
        if self._suspect is not None or time.monotonic() < self._quiet_until:
            return
        connection = self._connected()
        if not self._looked and not self._look(connection):
            return
        while len(self._crew.done) < self.config.BATCH_SIZE and (wanted := self._crew.wanted) > 0:
            claims = self.bq.queries.claim(connection, self.id, self._marks.turn(), wanted)
            for claim in claims:
                self._held[claim.id] = claim
                self._crew.add(claim)
            self._marks.passed(claims, wanted)
            enough = len(claims) == wanted
            if self._marks.may_look(busy=enough):
                if not self._look(connection):
                    return
            elif not enough:
                self._quiet_until = self._marks.next_look
                return

    def _look(self, connection: Connection) -> bool:
        """Look from the front for what the marks have passed, and for how long to sleep.

        :return: whether there is anything to claim.
        """
        start = time.monotonic()
        look = self.bq.queries.look(connection, self.channels)
        now = time.monotonic()
        due = self._marks.seen(look, now - start)
        self._looked = True
        if look.suspects and now >= self._next_suspect:
            self._suspect_until = now + self._patience
            self._suspect = self.bq.queries.claim_suspect(connection, self.id, self.channels)
            if self._suspect is not None:
                self._held[self._suspect.id] = self._suspect
                return False
        if not due:
            self._empty = True
            pause = self._poll_timeout if look.next_due is None else look.next_due
            self._quiet_until = now + min(pause, self._poll_timeout)
        return due

    def _start_suspect(self) -> None:
        """Start the task that was in a crash as soon as nothing else is held that it could take
        along. If that lasts too long, give it back for now, and have more patience next time."""
        if self._suspect is None or self._suspect_runs:
            return
        if len(self._held) == 1:
            self._suspect_runs = True
            self._crew.add(self._suspect)
        elif (now := time.monotonic()) >= self._suspect_until:
            self._next_suspect = now + 10 * self._patience
            self._patience *= 2
            self._give_back([self._suspect])

    def _ask_again(self) -> None:
        self._quiet_until = 0.0
        self._empty = False

    # Finishing.

    def _flush(self, *, everything: bool = False) -> None:
        """Write the outcomes that have gathered, if it is time."""
        crew = self._crew
        if not crew.done or not (everything or time.monotonic() >= self._flush_at()):
            return
        done = [crew.done.popleft() for _ in range(len(crew.done))]
        try:
            self._write([each.outcome for each in done if each.outcome is not None])
        except BaseException:
            crew.done.extendleft(reversed(done))
            raise
        for each in done:
            self._release(each.claim)
        if self.burst:  # the tasks may have made others
            self._ask_again()

    def _flush_at(self) -> float:
        """When to write what is done: at once if nothing else is held."""
        done = self._crew.done
        if len(done) >= min(len(self._held), self.config.BATCH_SIZE):
            return 0.0
        return done[0].at + FLUSH_AFTER

    def _give_back(self, claims: t.Iterable[Claim]) -> None:
        self._write([outcomes.given_back(claim) for claim in claims])

    def _give_back_waiting(self) -> None:
        """Give back what no thread has begun."""
        claims = self._crew.take_back()
        try:
            self._give_back(claims)
        except BaseException:
            for claim in claims:
                if claim.id in self._held:
                    self._crew.add(claim)
            raise

    def _write(self, batch: list[Outcome]) -> None:
        size = self.config.BATCH_SIZE
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            ids = {outcome.claim.id for outcome in part}
            try:
                written = self._write_part(part)
            except BaseException:
                self._unsure |= ids
                raise
            for outcome in written:
                ids.discard(outcome.claim.id)
                self._announce(outcome)
                if outcome.state == PENDING:
                    self._ask_again()
            for outcome in part:
                self._release(outcome.claim)
                if outcome.claim.id in ids - self._unsure:
                    outcomes.lost(outcome.claim)
            self._unsure -= ids

    def _write_part(self, part: list[Outcome], *, last_try: bool = False) -> list[Outcome]:
        """Write outcomes together; where the database refuses one, the others without it."""
        try:
            return outcomes.write(self.bq.queries, self._connected(), part)
        except sa.exc.DBAPIError as error:
            if not is_refusal(error):
                raise
            if len(part) > 1:
                return [each for outcome in part for each in self._write_part([outcome])]
            [outcome] = part
            log.error("%s: its outcome is refused: %s", outcome.claim.label, reason(error))
            if last_try:
                return []
            return self._write_part([outcomes.unwritable(outcome, error)], last_try=True)

    def _release(self, claim: Claim) -> None:
        """Hold a task no longer: its outcome is written."""
        self._held.pop(claim.id, None)
        if claim is self._suspect:
            if self._suspect_runs:
                self._patience = PATIENCE
            self._suspect, self._suspect_runs = None, False
            self._marks.look_soon()  # there may be more of them
            self._ask_again()

    def _announce(self, outcome: Outcome) -> None:
        try:
            with self.app.app_context() if signals.any_receivers() else contextlib.nullcontext():
                outcomes.announce(
                    self.app, outcome, lambda: make_task(self.bq, outcome.claim, outcome)
                )
        except Exception:  # of a function that the app runs around its contexts
            log.exception("The app context of a signal raised")

    # Waiting.

    @contextlib.contextmanager
    def _hung_bell(self) -> t.Iterator[None]:
        """What other threads and signal handlers wake the loop with."""
        self._bell = socket.socketpair()
        with self._bell[0], self._bell[1]:
            for end in self._bell:
                end.setblocking(False)
            yield

    def _wake(self) -> None:
        if self._bell is not None:
            with contextlib.suppress(OSError):  # full: it will wake; closed: it has left
                self._bell[1].send(b"\0")

    def _news(self) -> None:
        if self._asleep:
            self._wake()

    def _wait(self) -> None:
        """Sleep until there is something to do."""
        assert self._bell is not None
        bell = self._bell[0]
        # First asleep, then the time: news between the two rings the bell.
        self._asleep = True
        with selectors.DefaultSelector() as selector:
            selector.register(bell, selectors.EVENT_READ)
            if self._listener.listens:
                selector.register(self._listener, selectors.EVENT_READ)
            rung = [key.fileobj for key, _ in selector.select(self._timeout())]
        self._asleep = False
        if bell in rung:
            with contextlib.suppress(BlockingIOError):
                bell.recv(4096)
        if self._listener in rung and self._listener.drain():
            self._quiet_until = 0.0
        self._listen()

    def _timeout(self) -> float:
        """Seconds until there is something to do without news."""
        now = time.monotonic()
        until = [now + self._poll_timeout]
        if self._crew.done:
            until.append(self._flush_at())
        if self._crew.waiting:
            until.append(now + GIVE_BACK_AFTER / 2)
        if self._stopping:
            until.append(self._grace_until)
        else:
            until.append(self._strays_at)
            if self._suspect is not None and not self._suspect_runs:
                until.append(self._suspect_until)
            elif self._suspect is None and self._crew.wanted > 0:
                until.append(self._quiet_until)
            if self.config.LISTEN and not self._listener.listens:
                until.append(self._listener.next_try)
        return max(min(until) - now, 0.0)

    @property
    def _poll_timeout(self) -> float:
        timeout = self.config.poll_timeout
        if self.config.LISTEN and not self._listener.listens:
            return min(timeout, LISTEN_LOST)
        return timeout

    def _listen(self) -> None:
        """LISTEN, if that is not so; then look for what came before."""
        if self.config.LISTEN and not self._stopping and self._listener.listen():
            self._marks.look_soon()
            self._ask_again()

    # The loop's connection.

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = connect(self.engine)
            timeout = self.config.WORKER_HEARTBEAT_TIMEOUT
            alive, _ = self.bq.queries.beat(connection, self.id, timeout, bury=False)
            if not alive and not self._stopping:
                self._die()
            self._return_strays(connection)
            self._connection = connection
            self._strays_at = time.monotonic() + timeout
            self._marks.look_soon()
            self._ask_again()
        return self._connection

    def _return_strays(self, connection: Connection) -> None:
        """Give back claims that were committed although the answer was lost with a connection."""
        strays = [
            outcomes.given_back(claim)
            for claim in self.bq.queries.mine(connection, self.id)
            if claim.id not in self._held or self._held[claim.id].claims != claim.claims
        ]
        if strays:
            outcomes.write(self.bq.queries, connection, strays)

    def _return_strays_again(self) -> None:
        """A lost backend may have been at work still when the connection was made anew."""
        if time.monotonic() >= self._strays_at:
            self._return_strays(self._connected())
            self._strays_at = float("inf")

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


def is_refusal(error: sa.exc.DBAPIError) -> bool:
    """Whether the database refuses what it was given, and would do so again: a value, a
    constraint, a trigger, a limit."""
    if error.connection_invalidated:
        return False
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or ""
    kinds = (sa.exc.DataError, sa.exc.IntegrityError, sa.exc.InternalError)
    return isinstance(error, kinds) or state.startswith("54")


def check_pool(engine: sa.Engine, concurrency: int) -> None:
    """Refuse more threads than the app's pool has connections.

    :raises ValueError: naming both numbers.
    """
    pool = engine.pool
    if not isinstance(pool, sa.pool.QueuePool) or pool._max_overflow < 0:
        return
    most = pool.size() + pool._max_overflow
    if concurrency >= most:
        raise ValueError(
            f"{concurrency} tasks at once need as many connections, and one for the worker to"
            f" connect with, but the app's pool has at most {most}. Lower --concurrency"
            " (BQ_CONCURRENCY), or give it more with SQLALCHEMY_ENGINE_OPTIONS ="
            f' {{"pool_size": {concurrency + 1}}}.'
        )
