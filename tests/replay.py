"""The model's steps, taken by the package itself, on a PostgreSQL.

Workers are the package's, with all that they have but time: nothing in them runs by itself. The
steps are taken by the executor with its fence, the completer, ``Heartbeat.beat``,
``Loop._come_back``, ``_take_over`` and ``_give_back_strays``, and by the statements for claiming,
coming and going. In place of the loop, the replay decides which step is next, what is given back,
and when a worker may leave; in place of its threads are threads of the replay's own. A process that
is frozen is one that is not told to go on. A connection is lost by shutting down the socket on the
client's side.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
import types
import uuid
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue, LimitAttempt, task_failed, task_retried, task_succeeded
from flask_beanqueue.engine import heartbeat, settle
from flask_beanqueue.engine.attempt import Executor
from flask_beanqueue.engine.claim import CLAIM, Claim, claim_tasks
from flask_beanqueue.engine.completer import Completer
from flask_beanqueue.engine.connection import OwnConnection, application_name, connect, named
from flask_beanqueue.engine.cursor import Level
from flask_beanqueue.engine.heartbeat import Heartbeat
from flask_beanqueue.engine.quarantine import CLAIM_QUARANTINED, Quarantine
from flask_beanqueue.engine.takeover import Orphans
from flask_beanqueue.models.task import DONE, FAILED, PENDING
from flask_beanqueue.models.uuid7 import uuid7
from flask_beanqueue.models.worker import RUNNING

from . import model
from .triggers import trigger

TIMEOUT = 600.0

# COMMIT of what a processor wrote waits until the replay lets it through.
GATE = "CREATE TABLE effect (task int NOT NULL);" + trigger(
    "gate",
    "AFTER INSERT ON effect",
    "PERFORM pg_advisory_xact_lock_shared(42, NEW.task)",
    deferred=True,
)

LOOK = """
SELECT priority AS number, worker_id AS id, state, claims, worker_id, attempts, crashes,
    interruptions, parked, (SELECT count(*) FROM effect WHERE task = priority) AS effects
FROM bq_tasks
UNION ALL SELECT NULL, id, state, 0, NULL, 0, 0, 0, false, 0 FROM bq_workers
ORDER BY number
"""


class Raised(Exception):
    """What a processor raises if it is told to fail."""


class Performance(threading.Thread):
    """A thread that performs one task, and goes on when it is told to."""

    def __init__(self, executor: Executor, claim: Claim) -> None:
        super().__init__(daemon=True)
        self.claim = claim
        self.outcome: Any = None
        #: The driver's connection, if the processor uses one.
        self.connection: Any = None
        self._executor = executor
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(self) -> None:
        self.outcome = self._executor.execute(self.claim)
        self._news.put(model.THROUGH)

    def pause(self) -> None:
        """From within the processor."""
        self._news.put(model.RUNS)
        if (error := self._orders.get()) is not None:
            raise error

    def go_on(self, error: BaseException | None = None) -> None:
        self._orders.put(error)

    def wait(self, thread: str) -> None:
        assert self._news.get(timeout=60) == thread

    @property
    def is_through(self) -> bool:
        return not self._news.empty()

    def cut(self) -> None:
        """Lose the connection. A server that is at work does not notice."""
        with contextlib.suppress(Exception):  # it is closed
            wire = socket.socket(fileno=os.dup(self.connection.fileno()))
            wire.shutdown(socket.SHUT_RDWR)
            wire.close()


class Unanswered:
    """A connection that is lost when one of some statements has been sent."""

    def __init__(self, connection: Any, *statements: Any) -> None:
        self._connection = connection
        self._statements = statements
        self.sent: Any = None

    def execute(self, statement: Any, parameters: Any) -> Any:
        if statement not in self._statements:
            return self._connection.execute(statement, parameters)
        self.sent = statement, parameters
        raise sa.exc.OperationalError("", {}, Exception("lost"), connection_invalidated=True)

    def scalars(self, statement: Any, parameters: Any) -> Any:
        return self.execute(statement, parameters).scalars()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class Worker:
    """What a worker has, without its loop.

    :param line: the loop's connection.
    :param control: what the heartbeat has for its own, so that it need not be lost and made again.
    """

    def __init__(
        self, bq: BeanQueue, app: Flask, worker_id: uuid.UUID, line: OwnConnection, control: Any
    ) -> None:
        self.id = worker_id
        self.line = line
        self.app = app
        self.executor = Executor(app, bq, bq.registry, bq.config(app), bq.engine(app))
        self.package: Any = bq.worker(["default"], app=app)
        self.package._own = line
        self.package.take_place(worker_id, ())
        self.loop: Any = self.package._loop
        self.completer: Completer = self.loop._completer
        #: How often the heartbeat told that it has declared others dead.
        self.burials = 0
        self.heartbeat: Any = Heartbeat(
            bq.engine(app),
            bq.models,
            bq.config(app),
            worker_id,
            on_death=self.package._declared_dead,
            on_loss=self.package._lost_heartbeat,
            on_others_dead=self._bury,
        )
        self.heartbeat.own = types.SimpleNamespace(connection=control)
        #: By task and number of claims.
        self.claims: dict[tuple[int, int], Claim] = {}
        self.crew: dict[tuple[int, int], Performance] = {}

    def _bury(self) -> None:
        self.burials += 1

    @contextlib.contextmanager
    def writing_later(self) -> Iterator[None]:
        """Writing is a step of its own: another worker may come between."""
        self.completer.write = lambda connection: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.completer.write


class Replay:
    """Replays walks through a model.

    :param apps: one for each worker, all with one database, and with ``pool_pre_ping``: their pools
        would hand out connections that are lost.
    """

    def __init__(self, db: SQLAlchemy, bq: BeanQueue, apps: list[Flask], of: model.Model) -> None:
        self._db, self._bq, self._apps, self._model = db, bq, apps, of
        self._models = bq.models
        self._ids = [uuid7() for _ in apps]
        self._lines = [OwnConnection(bq.engine(app)) for app in apps]
        self._clean_up = contextlib.ExitStack()
        self._control = connect(bq.engine(apps[0]))
        self._clean_up.callback(self._control.close)
        self._sql(GATE)
        for app, worker_id in zip(apps, self._ids, strict=True):
            name = application_name(worker_id)
            self._clean_up.enter_context(named([bq.engine(app)], name, TIMEOUT))
        for signal, state in (
            (task_succeeded, DONE),
            (task_failed, FAILED),
            (task_retried, PENDING),
        ):
            self._clean_up.enter_context(signal.connected_to(self._hear(state)))
        self._heard: list[tuple[int, str]] = []
        self._register_processors()

    def _register_processors(self) -> None:
        policy = LimitAttempt(self._model.max_attempts)

        def write(db: Any, number: int) -> None:
            performance: Any = threading.current_thread()
            performance.connection = db.connection().connection.dbapi_connection
            db.execute(sa.text("INSERT INTO effect VALUES (:number)"), {"number": number})
            performance.pause()

        @self._bq.processor(retry_policy=policy)
        def writes(db: Any, number: int) -> None:
            write(db, number)

        @self._bq.processor(retry_policy=policy)
        def plain(number: int) -> None:
            performance: Any = threading.current_thread()
            performance.pause()

        @self._bq.processor(retry_policy=policy, auto_complete=False)
        def parks(db: Any, number: int) -> None:
            write(db, number)

    def _hear(self, state: str) -> Any:
        return lambda app, task, **_: self._heard.append((task.priority, state))

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._clean_up.close()

    def _sql(self, statement: str, **parameters: Any) -> Any:
        return self._control.execute(sa.text(statement), parameters)

    # A walk.

    def walk(self, steps: list[tuple[model.Step, model.State]]) -> None:
        """Take steps from the first state on, and compare what comes of each with the model."""
        taken: list[str] = []
        self._before = self._model.initial
        self._begin()
        try:
            for step, after in steps:
                taken.append(str(step))
                self._heard.clear()
                actor = () if step.worker is None else (self._workers[step.worker],)
                getattr(self, step.action)(*actor, step.target)
                seen, expected = self._seen(after), self._expected(after)
                assert seen == expected, f"{seen} instead of {expected}"
                if step.action in ("write", "commit", "late_commit"):
                    heard, expected = sorted(self._heard), announced(self._before, after)
                    assert heard == expected, f"signals: {heard} instead of {expected}"
                self._before = after
            self._find_nothing_else(self._before)
        except BaseException as error:
            error.add_note("\n".join(taken))
            raise
        finally:
            self._end()

    def _find_nothing_else(self, state: model.State) -> None:
        """What the model does not find, the package does not find either."""
        orphans = Orphans(self._models, 1).next_part(self._control, [])
        assert sorted(outcome.claim.priority for outcome in orphans) == self._model.orphans(state)
        if not self._model.claimable(state, "claim"):
            levels = [Level("default", t) for t in range(len(state.tasks))]
            assert not claim_tasks(self._control, self._models, self._ids[0], levels, 100)
        if not self._model.claimable(state, "claim_quarantined"):
            quarantine = Quarantine(self._models, self._ids[0], ["default"], 8_000)
            assert not quarantine.take(self._control)

    def _begin(self) -> None:
        self._tasks = [uuid7() for _ in self._model.kinds]
        self._workers = [
            Worker(self._bq, *each, self._control)
            for each in zip(self._apps, self._ids, self._lines, strict=True)
        ]
        #: Statements that were sent, and the backends in which COMMIT waits.
        self._sent: dict[model.Statement, list[Any]] = {}
        self._backends: dict[int, int] = {}
        for t, kind in enumerate(self._model.kinds):
            self._sql("SELECT pg_advisory_lock(42, :t)", t=t)
            self._sql(
                "INSERT INTO bq_tasks (id, module, func_name, priority, kwargs) VALUES"
                " (:id, 'tests.replay', :kind, :t, jsonb_build_object('number', :t))",
                id=self._tasks[t],
                kind=kind,
                t=t,
            )
        for w, worker in enumerate(self._model.initial.workers):
            if worker.state is not None:
                self.add_worker(w)

    def _end(self) -> None:
        for worker in self._workers:
            self._end_threads(worker)
        for t in list(self._backends):
            self.roll_back(t)
        self._sql(
            "SELECT pg_advisory_unlock_all();"
            "DELETE FROM effect; DELETE FROM bq_tasks; DELETE FROM bq_workers"
        )

    def _seen(self, state: model.State) -> Any:
        numbers = {worker_id: w for w, worker_id in enumerate(self._ids)}
        tasks, workers = [], []
        for row in self._sql(LOOK):
            if row.number is None:
                workers.append((numbers[row.id], row.state))
            else:
                row_worker = numbers.get(row.worker_id)
                tasks.append((model.Row(row.state, row.claims, row_worker, *row[5:9]), row.effects))
        hands = []
        for worker, expected in zip(self._workers, state.workers, strict=True):
            if expected.process != model.GONE:
                hands.append(
                    (
                        sorted((claim.priority, claim.claims) for claim in worker.loop.held),
                        sorted(written(state, outcome) for outcome in backlog(worker.completer)),
                        worker.loop._stopping,
                    )
                )
        return tasks, sorted(workers), hands

    def _expected(self, state: model.State) -> Any:
        hands = [
            (
                sorted((claim.task, claim.claims) for claim in worker.claims if claim.held),
                sorted(known(state, claim) for claim in worker.claims if claim.outcome),
                worker.stopping,
            )
            for worker in state.workers
            if worker.process != model.GONE
        ]
        workers = [(w, worker.state) for w, worker in enumerate(state.workers) if worker.state]
        return [(task.row, task.effects) for task in state.tasks], workers, hands

    # The steps of a worker's loop.

    def claim(self, w: Worker, t: int) -> None:
        [claim] = self._claim(w.line.connection, w, t)
        self._take(w, t, claim)

    def _claim(self, connection: Any, w: Worker, t: int) -> list[Claim]:
        return claim_tasks(connection, self._models, w.id, [Level("default", t)], 1)

    def claim_quarantined(self, w: Worker, t: int) -> None:
        self._let_be_first(t)
        claim = self._quarantine(w).take(w.line.connection)
        assert claim is not None
        self._take(w, t, claim)

    def _quarantine(self, w: Worker) -> Quarantine:
        return Quarantine(self._models, w.id, ["default"], 8_000)

    def _let_be_first(self, t: int) -> None:
        """Suspects are claimed in the order of the queue, which the model has not."""
        self._sql(
            "UPDATE bq_tasks SET scheduled_at = now() - (CASE priority WHEN :t THEN 2 ELSE 1 END)"
            " * interval '1 hour' WHERE state = 'PENDING' AND crashes > 0",
            t=t,
        )

    def _take(self, w: Worker, t: int, claim: Claim) -> None:
        assert claim.priority == t
        w.loop.held.add(claim)
        w.claims[t, claim.claims] = claim

    def take_over(self, w: Worker, _: None) -> None:
        with w.writing_later():
            w.loop._take_over(w.line.connection)

    def come_back(self, w: Worker, _: None) -> None:
        w.line.close()
        with w.writing_later():
            w.loop._come_back(w.line.connection)

    def give_back_strays(self, w: Worker, _: None) -> None:
        with w.writing_later():
            w.loop._give_back_strays(w.line.connection)

    def write(self, w: Worker, _: None) -> None:
        w.loop._write(w.line.connection)

    def give_back_waiting(self, w: Worker, key: tuple[int, int]) -> None:
        w.loop._give_back([w.claims[key]])

    # Of its threads.

    def perform(self, w: Worker, key: tuple[int, int]) -> None:
        w.crew[key] = Performance(w.executor, w.claims[key])
        w.crew[key].start()
        w.crew[key].wait(model.RUNS)

    def failed(self, w: Worker, key: tuple[int, int]) -> None:
        w.crew[key].go_on(Raised())
        self._gather(w, key)

    def succeeded(self, w: Worker, key: tuple[int, int]) -> None:
        w.crew[key].go_on()
        self._gather(w, key)

    interrupted = succeeded

    def _gather(self, w: Worker, key: tuple[int, int]) -> None:
        performance = w.crew.pop(key)
        performance.wait(model.THROUGH)
        performance.join()
        if performance.outcome is None:
            w.loop._threads.through.append(performance.claim)
            w.loop._gather()
        else:
            w.completer.add(performance.outcome)

    def write_one(self, w: Worker, key: tuple[int, int]) -> None:
        performance = w.crew[key]
        backend = performance.connection.info.backend_pid
        performance.go_on()
        while not performance.is_through:
            waits = "FROM pg_locks WHERE pid = :pid AND locktype = 'advisory' AND NOT granted"
            if self._sql(f"SELECT count(*) {waits}", pid=backend).scalar_one():
                self._backends[key[0]] = backend
                return
        self._gather(w, key)

    def commit(self, w: Worker, key: tuple[int, int]) -> None:
        self._let_commit(key[0])
        self._gather(w, key)

    def _let_commit(self, t: int) -> None:
        self._backends.pop(t)
        self._sql("SELECT pg_advisory_unlock(42, :t)", t=t)
        self._sql("SELECT pg_advisory_lock(42, :t)", t=t)  # when the other one is through

    late_commit = commit

    def beat(self, w: Worker, other: int | None) -> None:
        if other is not None:
            long_ago = "UPDATE bq_workers SET last_heartbeat = '2000-01-01' WHERE id = :id"
            self._sql(long_ago, id=self._ids[other])
            # It has been seen to be silent for a while.
            _, silent = heartbeat.beat(self._control, self._models, w.id, TIMEOUT)
            w.heartbeat._silent = dict.fromkeys(silent, time.monotonic() - TIMEOUT)
        w.burials = 0
        w.heartbeat._terminate = lambda connection: None  # in a step of its own
        alive = w.heartbeat.beat()
        assert alive == (self._before.workers[self._workers.index(w)].state == RUNNING)
        assert w.burials == (other is not None)
        if not alive:
            w.heartbeat._on_death()

    def terminate(self, w: Worker, _: None) -> None:
        Heartbeat._terminate(w.heartbeat, self._control)
        for worker_id, state in self._sql("SELECT id, state FROM bq_workers").all():
            if state != RUNNING:
                self._workers[self._ids.index(worker_id)].line.close()

    # When it leaves.

    give_back = give_back_waiting

    def abandon_locked(self, w: Worker, _: None) -> None:
        self.write(w, _)  # finds out
        w.loop.held.difference_update(w.completer.abandon_locked())

    def retire(self, w: Worker, _: None) -> None:
        heartbeat.retire(w.line.connection, self._models, w.id)

    def exit(self, w: Worker, _: None) -> None:
        heartbeat.retire(self._control, self._models, w.id)  # it has done so, or counts as dead
        self.kill(w, _)

    def _end_threads(self, w: Worker) -> None:
        for performance in w.crew.values():
            performance.cut()
            performance.go_on(Raised())
            performance.join()
        w.crew.clear()

    # What nobody in particular does.

    def add_worker(self, w: int) -> None:
        heartbeat.add_worker(self._control, self._models, self._ids[w], "", ["default"])

    def end(self, t: int) -> None:
        with self._apps[0].app_context():
            self._bq.complete(self._tasks[t])
            self._db.session.commit()

    def arrive(self, target: int | model.Statement) -> None:
        if isinstance(target, int):
            self._let_commit(target)
        else:
            self._let_be_first(target.task)
            self._control.execute(*self._sent[target].pop())

    def vanish(self, sent: model.Statement) -> None:
        statement = self._sent[sent].pop()
        too_late = sent not in dict(self._model.arrive(self._before))
        if too_late and sent.action != "claim_quarantined":  # which may find another one
            with contextlib.suppress(sa.exc.OperationalError):  # the row is locked
                self._control.execute(*statement)

    def roll_back(self, t: int) -> None:
        pid = self._backends.pop(t)
        self._sql("SELECT pg_terminate_backend(:pid)", pid=pid)
        there = "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"
        while self._sql(there, pid=pid).scalar_one():
            pass  # pg_terminate_backend() itself looks only ten times a second

    def freeze(self, w: Worker, _: None) -> None:
        pass

    thaw = freeze

    def stop(self, w: Worker, _: None) -> None:
        w.package.stop()

    def kill(self, w: Worker, _: None) -> None:
        self._end_threads(w)
        w.line.close()

    def cancel(self, t: int) -> None:
        self._sql("UPDATE bq_tasks SET state = 'CANCELLED' WHERE id = :id", id=self._tasks[t])

    def lose_session(self, w: Worker, key: tuple[int, int]) -> None:
        w.crew[key].cut()

    def lose_claim(self, w: Worker, statement: model.Statement) -> None:
        claims = CLAIM.on(self._models), CLAIM_QUARANTINED.on(self._models)
        connection: Any = Unanswered(w.line.connection, *claims)
        with contextlib.suppress(sa.exc.OperationalError):
            if statement.action == "claim":
                self._claim(connection, w, statement.task)
            else:
                self._quarantine(w).take(connection)
        self._keep(w, statement, connection)

    def lose_write(self, w: Worker, statement: model.Statement) -> None:
        writes = settle.FINISH.on(self._models), settle.SETTLE.on(self._models)
        connection: Any = Unanswered(w.line.connection, *writes)
        with contextlib.suppress(sa.exc.OperationalError):
            w.loop._write(connection)
        self._keep(w, statement, connection)

    def _keep(self, w: Worker, statement: model.Statement, connection: Unanswered) -> None:
        assert connection.sent is not None
        self._sent.setdefault(statement, []).append(connection.sent)
        w.line.close()


def backlog(completer: Completer) -> list[Any]:
    return [*completer.backlog.values(), *completer.locked.values()]


def written(state: model.State, outcome: Any) -> Any:
    """What the package is about to write; of a claim that is lost, it does not matter what."""
    claim = outcome.claim
    counts = outcome.attempts, outcome.crashes, outcome.interruptions
    what = model.Outcome(outcome.state, *counts, outcome.parked)
    holds = model.holds(state.tasks[claim.priority].row, claim.claims)
    return claim.priority, claim.claims, what if holds else ()


def known(state: model.State, claim: model.Claim) -> Any:
    holds = model.holds(state.tasks[claim.task].row, claim.claims)
    return claim.task, claim.claims, claim.outcome if holds else ()


def announced(before: model.State, after: model.State) -> list[tuple[int, str]]:
    """What signals tell of a step."""
    heard = []
    for t, ((old, *_), (row, *_)) in enumerate(zip(before.tasks, after.tasks, strict=True)):
        retried = row.state == PENDING and row.attempts > old.attempts
        if row.state != old.state and (row.state in (DONE, FAILED) or retried):
            heard.append((t, row.state))
    return heard
