"""The worker: claims tasks, hands them to its crew, and writes what becomes of them."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import os
import socket
import sys
import threading
import types
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection, Engine

from . import clock as time
from . import signals
from .bell import Bell
from .claim import Claim
from .claimer import Claimer
from .config import PREFIX, Config, ConfigError
from .connection import Line, SetupError, named
from .crew import Crew
from .errors import TROUBLE, is_hopeless, reason
from .executor import Executor
from .handover import check_autocommit
from .heartbeat import Heartbeat
from .listen import Listener, Source
from .log import log
from .marks import Marks
from .models import DONE, FAILED, PENDING, PROCESSING, uuid7
from .queries import application_name
from .queue import Queue
from .registry import Registry
from .shutdown import Impatience, handling, heeded
from .suspect import Suspect
from .version import __version__
from .watchdog import Watchdog
from .writer import Writer

#: Seconds that an outcome waits for others to be written with.
FLUSH_AFTER = 0.02
#: Seconds after which a busy loop attends to what it is told. Not each time: Python's lock is given
#: away for it, and got back only when the threads are through or have had their turns.
ATTEND_AFTER = 0.1
#: Longest sleep, in seconds, while LISTEN is wanted and cannot be had.
LISTEN_LOST = 1.0
#: Seconds that a claimed task may wait before it is given back.
GIVE_BACK_AFTER = 0.5


class WorkerDied(RuntimeError):
    """The worker cannot go on, and another one is to take its place: it was declared dead, since
    its heartbeats had stopped coming, or has lost a thread."""


class Worker:
    """One worker process: a loop in the calling thread, threads that run tasks, a heartbeat.

    :param app: the Flask app in whose contexts the tasks run.
    :param queue: whose tasks; likewise ``registry``, whose processors, and ``engine``, where.
    :param channels: whose tasks it does.
    :param concurrency: how many threads run tasks.
    :param burst: leave when no task is due.
    :param name: what people see; host and process id, unless said.
    :param source: what tells it of news; a LISTEN connection of its own, unless said.
    :param watched: whether the process may end by its watchdog, which then is there for it.
    :raises ValueError: if the app's pool has fewer connections than that, or but one for all.
    :raises SetupError: if greenlets stand in for threads.
    """

    def __init__(
        self,
        app: Flask,
        queue: Queue,
        registry: Registry,
        config: Config,
        engine: Engine,
        channels: t.Sequence[str],
        *,
        concurrency: int | None = None,
        burst: bool = False,
        name: str | None = None,
        source: Source | None = None,
        watched: bool = False,
    ) -> None:
        self.app = app
        self.queue = queue
        self.registry = registry
        self.config = config
        self.engine = engine
        self.channels = tuple(channels)
        self.concurrency = concurrency or config.CONCURRENCY
        self.burst = burst
        self.name = name or f"{socket.gethostname()}-{os.getpid()}"
        self.id = uuid7()
        self._predecessors: t.Collection[uuid.UUID] = ()
        #: Where it LISTENs.
        self.listen_engine = make_listen_engine(engine, config)
        check_pool(engine, self.concurrency)
        check_threads()

        self._bell = Bell()
        self._executor = Executor(app, queue, registry, config, engine)
        self._crew = Crew(
            self.concurrency,
            self._executor.execute,
            self._bell.ring_if_asleep,
            self._lost_thread,
            config.BATCH_SIZE,
        )
        self._writer = Writer(app, queue, config.BATCH_SIZE, self._released)
        self._marks = Marks(self.channels)
        self._claimer = Claimer(
            queue,
            self.channels,
            self._marks,
            config.BATCH_SIZE,
            config.largest_held,
        )
        self._suspect = Suspect()
        self._source = source or self.listener()
        self._line = Line(engine)
        self._watchdog = Watchdog(config.WORKER_HEARTBEAT_TIMEOUT) if watched else None

        #: There is nothing to claim before this time, unless there is news.
        self._quiet_until = 0.0
        self._looked = False
        self._empty = False
        self._failures = 0
        self._strays_at = float("inf")
        self._take_over_at = 0.0
        #: Whether others have died since it looked for their tasks last.
        self._more_dead = False
        self._stuck_at = 0.0
        #: Tokens of the claims that have been named as stuck.
        self._stuck: set[str] = set()
        self._stopping = False
        self._heartbeat: Heartbeat | None = None
        self._grace_until = float("inf")
        self._attend_at = 0.0
        #: Why it cannot go on, once that is so.
        self._cause_of_death = ""

    def listener(self, name: str | None = None) -> Listener:
        """Make what it LISTENs with.

        :param name: what the database calls the connection, if it is not this worker's own but its
            parent's, which must have no threads.
        """
        return Listener(
            self.listen_engine,
            self.channels,
            name=name,
            timeout=self.config.WORKER_HEARTBEAT_TIMEOUT,
            teller=None if self.listen_engine is self.engine else self.engine,
            ring=None if name else self._bell.ring,
        )

    def takes_place(self, worker_id: uuid.UUID, predecessors: t.Collection[uuid.UUID]) -> None:
        """Before it runs: be the worker of that id, and take over from those that were there
        before and are known to have ended."""
        self.id = worker_id
        self._predecessors = predecessors

    @property
    def running(self) -> int:
        """How many tasks its threads are at, also when it has left."""
        return self._crew.running

    # Life.

    def run(self) -> None:
        """Work until told to stop. A worker works once.

        :raises WorkerDied: if another worker declared this one dead, or it has lost a thread.
        """
        # An app context around the loop would collect what the app keeps for each context, such
        # as SQLALCHEMY_RECORD_QUERIES: the loop runs outside of any.
        contextvars.Context().run(self._run)

    def stop(self, *, at_once: bool = False) -> None:
        """Claim no more, end what runs within the grace time, and return. Called again, it changes
        nothing, unless it is to be at once.

        It may be called from any thread, and from a signal handler.

        :param at_once: give back what runs.
        """
        grace = 0.0 if at_once else self.config.SHUTDOWN_TIMEOUT
        self._grace_until = min(self._grace_until, time.monotonic() + grace)
        self._stopping = True
        self._bell.ring()

    def _run(self) -> None:
        with self.app.app_context():
            engines = list(self.queue.db.engines.values())
        engines.append(self.listen_engine)
        timeout = self.config.WORKER_HEARTBEAT_TIMEOUT
        with (
            named(engines, application_name(self.id), timeout),
            self._watchdog or contextlib.nullcontext(),
            self._bell,
            self._signal_handlers(),
            contextlib.closing(self._line),
            contextlib.closing(self._source),
        ):
            queries = self.queue.queries
            queries.check_tables(self._line.connection)
            with self.engine.connect() as connection:  # as tasks get it
                check_autocommit(connection)
            queries.add_worker(self._line.connection, self.id, self.name, self.channels)
            if self._predecessors:
                queries.bury(self._line.connection, self._predecessors)
            if self.burst:  # where there are none but bursts, nobody else finds out
                queries.bury_overdue(self._line.connection, timeout)
                queries.terminate(self._line.connection)
            self._heartbeat = heartbeat = Heartbeat(
                self.engine,
                queries,
                self.config,
                self.id,
                on_death=self._declared_dead,
                on_loss=self._lost_heartbeat,
                on_burial=self._take_over_soon,
            )
            heartbeat.start()
            try:
                self._crew.start()
                self._listen()
                self._introduce()
                self._signal(signals.worker_started)
                self._loop()
            finally:
                self._leave(heartbeat)
        if self._cause_of_death:
            raise WorkerDied(
                f"Worker {self.name} {self._cause_of_death}. What it has not ended goes to other"
                " workers."
            )

    def _introduce(self) -> None:
        log.info(
            "flask_beanqueue %s: worker %s (%s) on %s; %d at once; %d processor%s known; %s",
            __version__,
            self.name,
            self.id,
            ", ".join(self.channels),
            self.concurrency,
            len(self.registry),
            "" if len(self.registry) == 1 else "s",
            "LISTEN" if self._source.listens else f"polling every {self._poll_timeout:g} s",
        )

        for channel in set(self.channels) - set(self.registry.channels):
            log.warning("No processor has %r as its channel; is it spelt right?", channel)

    def _signal(self, which: t.Any) -> None:
        about = {"worker_id": self.id, "channels": self.channels}
        signals.send(which, self.app, lambda: about)

    def _declared_dead(self) -> None:
        self._die(
            "was declared dead: it sent no heartbeat for"
            f" {self.config.WORKER_HEARTBEAT_TIMEOUT:g} s (BQ_WORKER_HEARTBEAT_TIMEOUT), or its row"
            " was deleted"
        )

    def _lost_heartbeat(self) -> None:
        # To be gone before the others take it for dead, and with it the tasks that it still runs.
        patience = self.config.WORKER_HEARTBEAT_TIMEOUT / 2
        self._grace_until = min(self._grace_until, time.monotonic() + patience)
        self._die("has lost the thread that sends its heartbeats")

    def _lost_thread(self) -> None:
        self._die("has lost a thread that runs tasks")

    def _die(self, why: str) -> None:
        self._cause_of_death = self._cause_of_death or why
        self.stop()

    def _signal_handlers(self) -> contextlib.AbstractContextManager[None]:
        if threading.current_thread() is not threading.main_thread():
            return contextlib.nullcontext()  # whoever made the thread tells us to stop
        impatience = Impatience()

        def handler(number: int, frame: types.FrameType | None) -> None:
            self.stop(at_once=impatience.grows(number))

        return handling(dict.fromkeys(heeded(), handler), self._bell.wakes)

    def _loop(self) -> None:
        while not self._stopping:
            try:
                if self._failures:
                    self._come_back()
                self._fill()
                self._flush()
                self._serve_suspect()
                if self._crew.waited_for > GIVE_BACK_AFTER:
                    self._give_back_waiting()
                for at, act in self._agenda:
                    if time.monotonic() >= at:
                        act()
                if self._is_through:
                    break
            except TROUBLE as error:
                self._fail(error)
                continue
            self._failures = 0
            self._wait()

    @property
    def _agenda(self) -> t.Iterable[tuple[float, t.Callable[[], None]]]:
        """What else is to be done, and when."""
        yield self._strays_at, self._give_back_strays
        yield self._take_over_at, self._take_over
        yield self._stuck_at, self._name_the_stuck

    def _name_the_stuck(self) -> None:
        """Name what has run for long, if nothing else can begin because of it."""
        now, after = time.monotonic(), self.config.STUCK_AFTER
        began = self._crew.began
        newest = max(began.values(), default=now)
        if newest + after > now:
            self._stuck_at = newest + after
            return
        self._stuck_at = now + after
        if len(began) < self.concurrency and not self._occupied:
            return
        for claim, at in began.items():
            if claim.token in self._stuck:
                continue
            since = datetime.datetime.now() - datetime.timedelta(seconds=now - at)
            log.warning(
                "%s has run since %s, and worker %s begins no other task until one of its own ends",
                claim.label,
                since.isoformat(" ", "seconds"),
                self.name,
                extra=claim.log_extra(),
            )
        self._stuck = {claim.token for claim in began}

    @property
    def _is_through(self) -> bool:
        """Whether a burst has done what is due, also what dead workers left behind."""
        idle = self.burst and self._empty and not self._writer.held
        return idle and time.monotonic() < self._take_over_at

    def _leave(self, heartbeat: Heartbeat) -> None:
        """Give back what has not started, wait for what runs, and say goodbye."""
        try:
            self.stop()
            log.info("Worker %s stops; %d running", self.name, self._crew.running)
            self._writer.give_back(self._crew.take_back())
            if self._suspect.claim is not None and self._suspect.waits:
                self._writer.give_back([self._suspect.claim])
            while not self._has_left(heartbeat):
                if not self._failures:
                    self._wait()
        finally:
            self._crew.dismiss()
            heartbeat.stop()
            self._signal(signals.worker_stopped)
            ended = self._writer.ended
            log.info(
                "Worker %s has stopped: %d tasks done, %d failed, %d to be tried again",
                self.name,
                ended[DONE] + ended[PROCESSING],  # which something else ends
                ended[FAILED],
                ended[PENDING],
            )

    def _has_left(self, heartbeat: Heartbeat) -> bool:
        """Whether all is written, or the grace time is over and the rest given back."""
        try:
            self._gather()
            if self._failures:
                self._come_back()
            self._write()
            self._failures = 0
            late = time.monotonic() >= self._grace_until
            if self._writer.held and late:
                self._gather(everything=True)  # in one go with what is given back
                for claim in self._writer.undecided:
                    log.warning("%s is given back while it runs", claim.label)
                self._give_back(self._writer.undecided)
                if locked := self._writer.abandon_locked():
                    log.warning(
                        "Tasks left to other workers, for their rows are locked: %d", locked
                    )
            if self._writer.held:
                return False
            heartbeat.stop()  # or it would take the retired for the dead
            self.queue.queries.retire(self._line.connection, self.id)
            return True
        except TROUBLE as error:
            # Who holds nothing can leave without a word: nobody waits for it.
            if time.monotonic() >= self._grace_until or not self._writer.held:
                log.error("Worker %s could not say goodbye: %s", self.name, reason(error))
                return True
            self._fail(error)
            return False

    # Claiming.

    def _fill(self) -> None:
        """Claim as much as will start within a short while."""
        if self._stopping or self._occupied or time.monotonic() < self._quiet_until:
            return
        connection = self._line.connection
        if self._suspect.may_follow and self._claim_suspect(connection):
            return
        self._suspect.ends_turn()
        if not self._looked and not self._look(connection):
            return
        if (wanted := self._claimer.at_once(self._crew.wanted)) > 0:
            start = time.monotonic()
            if (claims := self._claimer.claim(connection, self.id, wanted)) is None:
                if self._marks.may_look(busy=True):  # what is more urgent does not wait for it
                    self._look(connection)
                return
            self._writer.held.update(claims)
            self._crew.add(claims)
            if self._marks.passed(claims, wanted):
                return
            enough = len(claims) == wanted
            if self._marks.may_look(busy=enough):
                self._look(connection)
            elif not enough:
                self._quiet_until = self._marks.next_claim(time.monotonic() - start)

    def _look(self, connection: Connection) -> bool:
        """Look from the front for what the marks have passed, and for how long to sleep.

        :return: whether there is anything to claim.
        """
        start = time.monotonic()
        look = self.queue.queries.look(connection, self.channels)
        now = time.monotonic()
        due = self._marks.seen(look, now - start)
        self._looked = True
        welcome = look.suspects and (self._suspect.welcome or not self._writer.held)
        if welcome and self._claim_suspect(connection):
            return False
        self._empty = not due or self._marks.in_vain
        if self._empty and self.burst:
            self._take_over_at = 0.0
        if not due:
            pause = self._poll_timeout if look.next_due is None else look.next_due
            self._quiet_until = now + min(pause, self._poll_timeout)
        return due

    def _claim_suspect(self, connection: Connection) -> bool:
        claim = self._claimer.claim_suspect(connection, self.id)
        if claim is None:
            return False
        self._writer.held.add(claim)
        self._suspect.took(claim)
        return True

    @property
    def _occupied(self) -> bool:
        """Whether a suspect is here, beside which nothing may begin. One that is through and waits
        for somebody's lock is no danger."""
        claim = self._suspect.claim
        return claim is not None and not self._writer.keeps(claim)

    def _serve_suspect(self) -> None:
        """Start the suspect as soon as nothing else is held that it could take along; give it
        back if that lasts too long."""
        if not self._suspect.waits:
            return
        if self._writer.free == 1:
            suspect = self._suspect.begins()
            # Should it hang the process, nothing else says which task that was.
            log.info("%s was in a crash, and runs alone", suspect.label, extra=suspect.log_extra())
            self._crew.add([suspect])
        elif (claim := self._suspect.gives_way()) is not None:
            self._give_back([claim])

    def _ask_again(self) -> None:
        self._quiet_until = 0.0
        self._empty = False

    # Taking over.

    def _take_over_soon(self) -> None:
        """From the heartbeat's thread: others have been declared dead."""
        self._more_dead = True
        self._take_over_at = 0.0
        self._bell.ring()

    def _take_over(self) -> None:
        """Let what dead workers held wait again."""
        timeout = self.config.WORKER_HEARTBEAT_TIMEOUT
        self._take_over_at = time.monotonic() + timeout
        try:
            anew, self._more_dead = self._more_dead, False
            all_of_them = self._writer.take_over(
                self._line.connection, self.config.MAX_CRASHES, anew=anew
            )
        except TROUBLE:
            # Or at once, if the heartbeat has found others meanwhile.
            self._take_over_at = min(self._take_over_at, time.monotonic() + timeout / 4)
            raise
        if not all_of_them:
            self._take_over_at = 0.0  # the rest, after what else is to be done

    # Finishing.

    def _flush(self) -> None:
        """Write the outcomes that have gathered, if it is time."""
        self._gather()
        self._write()

    def _gather(self, *, everything: bool = False) -> None:
        """Take what the crew is through with: let go of it, or let it be written if it is time."""
        while self._crew.through:
            claim = self._crew.through.popleft()
            self._writer.ended[DONE] += claim in self._writer.held  # or it has come before
            self._writer.release(claim)
        done = self._crew.done
        if done and (everything or time.monotonic() >= self._flush_at()):
            # What is more than one statement takes can wait for others.
            count = len(done) if everything else min(len(done), self.config.BATCH_SIZE)
            for _ in range(count):
                outcome = done.popleft().outcome
                if outcome.claim in self._writer.held:  # or it has come before
                    self._writer.add(outcome)

    def _flush_at(self) -> float:
        """When to write what is done: at once if nothing else is held."""
        done = self._crew.done
        if len(done) >= min(self._writer.free, self.config.BATCH_SIZE):
            return 0.0
        return done[0].at + FLUSH_AFTER

    def _write(self) -> None:
        if time.monotonic() >= self._writer.next_try:
            self._writer.write(self._line.connection)

    def _give_back(self, claims: t.Iterable[Claim]) -> None:
        self._writer.give_back(claims)
        self._write()

    def _give_back_waiting(self) -> None:
        """Give back what no thread has begun, so that other workers can have it."""
        self._give_back(self._crew.take_back())
        self._marks.look_soon()
        self._looked = False  # it lies before the marks, and so before what they have not passed

    def _released(self, claim: Claim, waits: bool) -> None:
        """A claim is held no longer."""
        if claim is self._suspect.claim:
            self._suspect.released()
            self._marks.look_soon()  # there may be more of them
            self._ask_again()
        elif waits or self.burst:  # it is due again, or may have made others
            self._ask_again()

    # Waiting.

    def _wait(self) -> None:
        """Sleep until there is something to do."""
        now = time.monotonic()
        if now < self._attend_at and self._timeout() <= 0.0:
            return
        self._attend_at = now + ATTEND_AFTER
        self._crew.watch()
        watched = [self._source] if self._source.fileno() >= 0 else []
        if self._bell.wait(self._timeout, *watched) and self._source.drain():
            self._quiet_until = 0.0
        self._listen()

    def _timeout(self) -> float:
        """Seconds until there is something to do without news."""
        now = time.monotonic()
        until = [now + self._poll_timeout, self._writer.next_try]
        if self._crew.through:  # since the last flush; nobody rings again for it
            until.append(now)
        if self._crew.done:
            until.append(self._flush_at())
        if self._crew.waiting:
            until.append(now + GIVE_BACK_AFTER / 2)
        if self._stopping:
            until.append(self._grace_until)
        else:
            until += [at for at, _ in self._agenda]
            if self._suspect.waits:
                until.append(self._suspect.until)
            elif not self._occupied and self._crew.wanted > 0:
                until.append(self._quiet_until)
            if self.config.LISTEN and not self._source.listens:
                until.append(self._source.next_try)
        return max(min(until) - now, 0.0)

    @property
    def _poll_timeout(self) -> float:
        timeout = self.config.poll_timeout
        if self.config.LISTEN and not self._source.listens:
            return min(timeout, LISTEN_LOST)
        return timeout

    def _listen(self) -> None:
        """LISTEN, if that is not so, and look for what came before; poll where it cannot be had."""
        if not self.config.LISTEN or self._stopping or self._source.listens:
            return
        if self._source.listen():
            self._marks.look_soon()
            self._ask_again()
        else:
            self._quiet_until = min(self._quiet_until, time.monotonic() + LISTEN_LOST)

    # Losing the database.

    def _fail(self, error: Exception) -> None:
        """Give up the connection, and wait for a moment before the loop comes back on another;
        tasks go on running meanwhile.

        :raises sqlalchemy.exc.SQLAlchemyError: the error, if connecting again cannot help.
        """
        if isinstance(error, sa.exc.DBAPIError) and is_hopeless(error):
            raise error
        why = reason(error) or type(error).__name__
        log.warning("The database fails, and is tried again: %s", why)
        self._executor.note_trouble()
        self._line.close()
        until: float = time.monotonic() + min(0.05 * 2**self._failures, 2.0)
        self._failures = min(self._failures + 1, 10)

        def left() -> float:
            return max(min(until, self._grace_until) - time.monotonic(), 0.0)

        # On the bell: who is told to stop, and holds nothing, leaves at once.
        while (self._writer.held or not self._stopping) and left() > 0.0:
            self._bell.wait(left)

    def _come_back(self) -> None:
        """Tell the others that this worker lives, and see what has become of its claims."""
        timeout = self.config.WORKER_HEARTBEAT_TIMEOUT
        connection = self._line.connection
        alive, _ = self.queue.queries.beat(connection, self.id, timeout)
        if not alive and not self._stopping:
            self._declared_dead()
        # Something else than the outcomes may be what fails again and again.
        self._gather(everything=True)
        self._give_back_strays()
        # A backend that was lost may be at work still.
        self._strays_at = time.monotonic() + timeout
        self._marks.look_soon()
        self._ask_again()

    def _give_back_strays(self) -> None:
        self._strays_at = float("inf")
        self._writer.give_back_strays(self._line.connection, self.id)
        self._write()


def make_listen_engine(engine: Engine, config: Config) -> Engine:
    """An engine for LISTEN: the app's, unless it has an address of its own.

    :raises ConfigError: if the address's driver is not there; none but a worker needs it.
    """
    if config.LISTEN_DATABASE_URL is None:
        return engine
    try:
        return sa.create_engine(config.LISTEN_DATABASE_URL, poolclass=sa.NullPool)
    except ImportError as error:
        raise ConfigError(
            f"{PREFIX}LISTEN_DATABASE_URL names a driver that cannot be imported: {reason(error)}"
        ) from error


def check_threads() -> None:
    """Refuse a process in which greenlets stand in for threads: one that waits for the database
    would hold up all others.

    :raises SetupError: naming the library that has replaced them.
    """
    # By library: debuggers put functions of their own there, too, and their threads are real.
    for library, module, asks in (
        ("gevent", "gevent.monkey", "is_module_patched"),
        ("eventlet", "eventlet.patcher", "is_monkey_patched"),
    ):
        is_patched = getattr(sys.modules.get(module), asks, None)
        # What a worker sleeps with is as bad as its threads.
        if is_patched and any(map(is_patched, ("threading", "thread", "select"))):
            raise SetupError(
                f"{library} has patched threads, or what waits, with greenlets, and a worker needs"
                " real threads. Let the web server patch (as gunicorn -k does), and not a module"
                " that the worker imports, too. Tasks can be made in a process that is patched."
            )


def check_pool(engine: sa.Engine, concurrency: int) -> None:
    """Refuse more threads than the app's pool has connections.

    :raises ValueError: naming both numbers; or the kind of pool, if all threads get the same one.
    """
    pool = engine.pool
    if isinstance(pool, sa.pool.StaticPool):
        raise ValueError(
            "The app's pool is a StaticPool, with one connection, and so one transaction, for all"
            ' that it does. Take "poolclass" out of SQLALCHEMY_ENGINE_OPTIONS.'
        )
    if not isinstance(pool, sa.pool.QueuePool) or pool._max_overflow < 0:
        return
    most = pool.size() + pool._max_overflow
    if concurrency > most:
        raise ValueError(
            f"{concurrency} tasks at once need as many connections, but the app's pool has at most"
            f" {most}. Lower --concurrency (BQ_CONCURRENCY), or give it more with"
            f' SQLALCHEMY_ENGINE_OPTIONS = {{"pool_size": {concurrency}}}.'
        )
