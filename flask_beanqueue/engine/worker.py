"""The worker: its life, from the first heartbeat to the goodbye."""

from __future__ import annotations

import contextlib
import contextvars
import os
import socket
import threading
import types
import typing as t
import uuid

from blinker import NamedSignal
from flask import Flask
from sqlalchemy.engine import Connection, Engine

from .. import signals
from ..config import Config
from ..exceptions import WorkerDied
from ..log import log
from ..models.task import DONE, FAILED, PENDING, PROCESSING
from ..models.uuid7 import uuid7
from ..registry import Registry
from ..version import __version__
from . import heartbeat
from .attempt import Executor
from .checks import check_pool, check_tables, check_threads, make_listen_engine
from .connection import OwnConnection, application_name, named
from .handover import check_autocommit
from .heartbeat import Heartbeat
from .listener import Listener, Source
from .loop import Loop
from .queue import Queue
from .shutdown import Impatience, handling, heeded
from .threads import Threads
from .wakeup import Wakeup
from .watchdog import Watchdog


class Worker:
    """One worker: a loop in the calling thread, threads that run tasks, a heartbeat.

    :param app: the Flask app in whose contexts the tasks run.
    :param queue: whose tasks; likewise ``registry``, whose processors, and ``engine``, where.
    :param channels: whose tasks it does.
    :param concurrency: how many threads run tasks.
    :param burst: leave when no task is due.
    :param name: what people see; host and process id, unless given.
    :param source: what tells it of news; a LISTEN connection of its own, unless given.
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

        self._wakeup = Wakeup()
        self._own = OwnConnection(engine)
        self._executor = Executor(app, queue, registry, config, engine)
        self._threads = Threads(
            self.concurrency,
            self._executor.execute,
            self._wakeup.ring_if_asleep,
            self._lost_thread,
            config.BATCH_SIZE,
        )
        self._source = source or self.listener()
        self._watchdog = Watchdog(config.WORKER_HEARTBEAT_TIMEOUT) if watched else None
        self._loop = self._make_loop()
        #: Why it cannot go on, once that is so.
        self._cause_of_death = ""

    def _make_loop(self) -> Loop:
        return Loop(
            self.app,
            self.queue,
            self.config,
            self._own,
            self.id,
            self.name,
            self.channels,
            threads=self._threads,
            wakeup=self._wakeup,
            source=self._source,
            burst=self.burst,
            on_trouble=self._executor.note_trouble,
            on_death=self._declared_dead,
        )

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
            ring=None if name else self._wakeup.ring,
        )

    def take_place(self, worker_id: uuid.UUID, predecessors: t.Collection[uuid.UUID]) -> None:
        """Before it runs: be the worker of that id, and take over from those that were there
        before and are known to have ended."""
        self.id = worker_id
        self._predecessors = predecessors
        self._loop = self._make_loop()

    @property
    def running(self) -> int:
        """How many tasks its threads are at, also when it has left."""
        return self._threads.running

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
        self._loop.stop(0.0 if at_once else self.config.SHUTDOWN_TIMEOUT)

    def _run(self) -> None:
        with self.app.app_context():
            engines = list(self.queue.db.engines.values())
        engines.append(self.listen_engine)
        with (
            named(engines, application_name(self.id), self.config.WORKER_HEARTBEAT_TIMEOUT),
            self._watchdog or contextlib.nullcontext(),
            self._wakeup,
            self._signal_handlers(),
            contextlib.closing(self._own),
            contextlib.closing(self._source),
        ):
            self._register(self._own.connection)
            beats = Heartbeat(
                self.engine,
                self.queue.models,
                self.config,
                self.id,
                on_death=self._declared_dead,
                on_loss=self._lost_heartbeat,
                on_others_dead=self._loop.take_over_soon,
            )
            beats.start()
            try:
                self._threads.start()
                self._loop.listen()
                self._introduce()
                self._signal(signals.worker_started)
                self._loop.run()
            finally:
                self._leave(beats)
        if self._cause_of_death:
            raise WorkerDied(
                f"Worker {self.name} {self._cause_of_death}. What it has not ended goes to other"
                " workers."
            )

    def _register(self, connection: Connection) -> None:
        """See that it can work, and let others know of it."""
        models = self.queue.models
        check_tables(connection, models)
        with self.engine.connect() as of_tasks:
            check_autocommit(of_tasks)
        heartbeat.add_worker(connection, models, self.id, self.name, self.channels)
        if self._predecessors:
            heartbeat.declare_dead(connection, models, self._predecessors)
        if self.burst:  # if there are none but bursts, nobody else finds out
            heartbeat.declare_overdue_dead(connection, models, self.config.WORKER_HEARTBEAT_TIMEOUT)
            heartbeat.terminate(connection, models)

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
            "LISTEN" if self._source.listens else f"polling every {self._loop.poll_timeout:g} s",
        )
        for channel in set(self.channels) - set(self.registry.channels):
            log.warning("No processor has %r as its channel; is it spelt right?", channel)

    def _signal(self, which: NamedSignal) -> None:
        about = {"worker_id": self.id, "channels": self.channels}
        signals.send(which, self.app, lambda: about)

    def _signal_handlers(self) -> contextlib.AbstractContextManager[None]:
        if threading.current_thread() is not threading.main_thread():
            return contextlib.nullcontext()  # whoever made the thread tells us to stop
        impatience = Impatience()

        def handler(number: int, frame: types.FrameType | None) -> None:
            self.stop(at_once=impatience.grows(number))

        return handling(dict.fromkeys(heeded(), handler), self._wakeup.wakes)

    # Why it cannot go on.

    def _declared_dead(self) -> None:
        self._die(
            "was declared dead: it sent no heartbeat for"
            f" {self.config.WORKER_HEARTBEAT_TIMEOUT:g} s (BQ_WORKER_HEARTBEAT_TIMEOUT), or its row"
            " was deleted"
        )

    def _lost_heartbeat(self) -> None:
        # To be gone before the others take it for dead, and with it the tasks that it still runs.
        self._loop.stop(self.config.WORKER_HEARTBEAT_TIMEOUT / 2)
        self._die("has lost the thread that sends its heartbeats")

    def _lost_thread(self) -> None:
        self._die("has lost a thread that runs tasks")

    def _die(self, why: str) -> None:
        self._cause_of_death = self._cause_of_death or why
        self.stop()

    def _leave(self, beats: Heartbeat) -> None:
        """Give back what has not started, wait for what runs, and say goodbye."""

        def say_goodbye(connection: Connection) -> None:
            beats.stop()  # otherwise it would take the retired for the dead
            heartbeat.retire(connection, self.queue.models, self.id)

        try:
            self.stop()
            log.info("Worker %s stops; %d running", self.name, self._threads.running)
            self._loop.leave(say_goodbye)
        finally:
            self._threads.dismiss()
            beats.stop()
            self._signal(signals.worker_stopped)
            ended = self._loop.ended
            log.info(
                "Worker %s has stopped: %d tasks done, %d failed, %d to be tried again",
                self.name,
                ended[DONE] + ended[PROCESSING],  # which something else ends
                ended[FAILED],
                ended[PENDING],
            )
