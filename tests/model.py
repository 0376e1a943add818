"""The life of tasks as a model that is so small that each of its states can be looked at.

A step of the model is one statement that is committed, or one thing that happens to a thread, a
process or a connection. Steps have the names of the functions of the package that do the same::

    a task     PENDING <------------------ write -----------------+   failed, crashed (not the
                  |                                               |   last time), interrupted,
                  +-- claim, claim_quarantined --> PROCESSING --------+   given back
                                                |  |
               DONE, FAILED <-- commit, write --+  +-- commit --> parked --- end --> DONE

    a claim    waits --- perform --> runs --- write_one --> fenced --- commit --> (nothing left)
                 |                    | |                     |
                 |                    | +--> cut <------------+        lose_session, terminate
                 |                    |       |
                 | give_back          |       | interrupted
                 +--> through <-------+-------+   failed, succeeded: its outcome is in the backlog

    a worker   RUNNING --- retire --> SHUTDOWN
                  +------- beat of another --> NO_HEARTBEAT

    a process  alive --- freeze --> frozen --- kill --> gone       also from alive: kill, exit
                  ^------ thaw -------+

In ``fenced`` the task's row is locked until COMMIT. Who was declared dead while it was frozen and
thaws is a zombie, and does all that a worker does until its own beat tells it. A lost connection
takes the answer to a claim, a write or a COMMIT with it; what was sent may arrive later, or never.

Left out:

- Time. Whatever takes a while may take any while. But a claim that was sent on a lost connection
  arrives, if at all, before the second look for strays.
- The order of the queue, cursors, wake-ups, events, messages: they do not decide what becomes of a
  task, only when.
- How a task is made: an INSERT in the app's own transaction, which PostgreSQL keeps whole.
- Unknown processors, outcomes that the database refuses, rows that are changed or deleted by hand
  but for ``cancel``, and what processors commit or set by themselves (``fence.guard`` and
  ``fence.take_state``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flask_beanqueue.models.task import CANCELLED, DONE, FAILED, PENDING, PROCESSING
from flask_beanqueue.models.worker import NO_HEARTBEAT, RUNNING, SHUTDOWN

ENDED = (DONE, FAILED, CANCELLED)
#: What a processor does: it writes through ``db.session``; it does not; it writes, and leaves the
#: end to something else (``auto_complete=False``).
WRITES, PLAIN, PARKS = "writes", "plain", "parks"
#: How far the thread of a claim is.
WAITS, RUNS, FENCED, CUT, THROUGH = "waits", "runs", "fenced", "cut", "through"
BEFORE = (WAITS, RUNS, FENCED, CUT)
#: What has become of a process.
ALIVE, FROZEN, GONE = "alive", "frozen", "gone"

# Who takes which steps: a worker's loop, which needs its connection; its other threads; a frozen
# worker, by chance; nobody in particular.
LOOP = ("claim", "claim_quarantined", "take_over", "give_back_strays", "give_back_waiting", "write",
        "abandon_locked", "retire", "lose_claim", "lose_write")  # fmt: skip
THREADS = ("perform", "failed", "succeeded", "write_one", "commit", "interrupted", "give_back",
           "beat", "terminate", "come_back", "exit", "freeze", "stop", "lose_session")  # fmt: skip
CHANCES = ("thaw", "late_commit")
NOBODY = ("add_worker", "end", "arrive", "vanish", "roll_back", "cancel")
#: Steps that are taken a few times at most. Nothing may depend on them, nor on the chances.
FAULTS = ("freeze", "kill", "stop", "cancel", "give_back_waiting",
          "lose_session", "lose_claim", "lose_write")  # fmt: skip
#: What no function of the package does.
WORLD = ("freeze", "thaw", "kill", "exit", "lose_session", "lose_claim", "lose_write", "arrive",
         "vanish", "roll_back", "late_commit", "cancel")  # fmt: skip


class Row(NamedTuple):
    """A row of ``bq_tasks``, as it is committed."""

    state: str = PENDING
    claims: int = 0
    worker: int | None = None
    attempts: int = 0
    crashes: int = 0
    interruptions: int = 0
    parked: bool = False

    @property
    def is_claimed(self) -> bool:
        return self.state == PROCESSING and not self.parked


class Lock(NamedTuple):
    """An open transaction that has written a task's effects, and its outcome through the fence."""

    worker: int
    claims: int
    #: The client is gone; COMMIT may have been sent.
    adrift: bool = False


class Task(NamedTuple):
    row: Row = Row()
    lock: Lock | None = None
    #: How often what the processor wrote through ``db.session`` was committed.
    effects: int = 0
    #: Whether what it does besides was done at least once.
    performed: bool = False


class Outcome(NamedTuple):
    """What is to become of a row: its state, and what is added to its counts."""

    state: str
    attempts: int = 0
    crashes: int = 0
    interruptions: int = 0
    parked: bool = False


GIVEN_BACK = Outcome(PENDING)
INTERRUPTED = Outcome(PENDING, interruptions=1)
#: The fence has let nothing through.
LOST = Outcome(FAILED, attempts=1)


class Claim(NamedTuple):
    """What a worker has in its hands of a task."""

    task: int
    claims: int
    crashes: int
    thread: str = WAITS
    #: In the completer's backlog.
    outcome: Outcome | None = None
    #: In ``Loop.held``.
    held: bool = True

    @property
    def key(self) -> tuple[int, int]:
        return self.task, self.claims


class Worker(NamedTuple):
    """A row of ``bq_workers``, and its process."""

    #: None: it has not started.
    state: str | None
    process: str = ALIVE
    stopping: bool = False
    #: Its loop has no connection.
    lost: bool = False
    #: It has a second look for strays before it.
    looks: bool = False
    claims: tuple[Claim, ...] = ()

    @property
    def is_well(self) -> bool:
        return self.state == RUNNING and self.process == ALIVE and not self.stopping

    @property
    def backlog(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.outcome is not None]

    @property
    def may_leave(self) -> bool:
        return self.stopping and not any(claim.held for claim in self.claims)

    def at(self, *threads: str) -> list[Claim]:
        return [claim for claim in self.claims if claim.thread in threads]


class Statement(NamedTuple):
    """A statement that was sent on a lost connection."""

    action: str
    worker: int
    task: int
    claims: int = 0
    outcome: Outcome | None = None


class State(NamedTuple):
    tasks: tuple[Task, ...]
    workers: tuple[Worker, ...]
    adrift: tuple[Statement, ...]
    #: How many faults may still come.
    faults: int

    def task(self, t: int, **changes: Any) -> State:
        task = self.tasks[t]._replace(**changes)
        return self._replace(tasks=(*self.tasks[:t], task, *self.tasks[t + 1 :]))

    def row(self, t: int, **changes: Any) -> State:
        return self.task(t, row=self.tasks[t].row._replace(**changes))

    def worker(self, w: int, **changes: Any) -> State:
        worker = self.workers[w]._replace(**changes)
        return self._replace(workers=(*self.workers[:w], worker, *self.workers[w + 1 :]))

    def gone(self, w: int) -> State:
        return self.worker(w, process=GONE, stopping=False, lost=False, looks=False, claims=())

    def add(self, w: int, claim: Claim) -> State:
        claims = (*self.workers[w].claims, claim)
        return self.worker(w, claims=tuple(sorted(claims, key=lambda c: (c[:4], c[4] or ()))))

    def change(self, w: int, claim: Claim, **changes: Any) -> State:
        """Change a claim, and let go of it if there is nothing left to do or to write."""
        claims = list(self.workers[w].claims)
        claims.remove(claim)
        state, new = self.worker(w, claims=tuple(claims)), claim._replace(**changes)
        return state if (new.thread, new.outcome) == (THROUGH, None) else state.add(w, new)

    def put(self, w: int, claim: Claim, outcome: Outcome) -> State:
        """The claim's thread is through; its outcome goes into the backlog."""
        return self.change(w, claim, thread=THROUGH, outcome=outcome)


class Step(NamedTuple):
    action: str
    worker: int | None
    #: A task, a claim's key, another worker, or a statement.
    target: Any

    def __str__(self) -> str:
        who = "" if self.worker is None else f"worker {self.worker}: "
        return f"{who}{self.action}" + ("" if self.target is None else f" {self.target}")


def holds(row: Row, claims: int) -> bool:
    """The fence: whether a claim is the row's, and not over."""
    return row.is_claimed and row.claims == claims


#: Targets, and what comes of the step.
Steps = Iterator[tuple[Any, State]]


class Model:
    """Two workers, more to take the places of those that end, and some tasks.

    :param kinds: what the tasks' processors do.
    :param workers: how many workers there may be in all.
    :param faults: how many faults there may be, of those in ``may``.
    """

    def __init__(
        self,
        *kinds: str,
        workers: int = 2,
        faults: int = 1,
        may: tuple[str, ...] = FAULTS,
        max_attempts: int = 2,
        max_crashes: int = 2,
    ) -> None:
        self.kinds = kinds
        self.may = may
        self.max_attempts = max_attempts
        self.max_crashes = max_crashes
        started = tuple(Worker(RUNNING if w < 2 else None) for w in range(workers))
        self.initial = State(tuple(Task() for _ in kinds), started, (), faults)

    def steps(self, s: State) -> Iterator[tuple[Step, State]]:
        """All that can happen next."""
        for who, actions in self._who(s):
            for action in actions:
                fault = action in FAULTS
                if fault and (not s.faults or action not in self.may):
                    continue
                for target, after in getattr(self, action)(s, *who):
                    step = Step(action, who[0] if who else None, target)
                    yield step, after._replace(faults=s.faults - 1) if fault else after

    def _who(self, s: State) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
        for w, worker in enumerate(s.workers):
            if worker.state is not None and worker.process == FROZEN:
                yield (w,), ("kill", *CHANCES)
            elif worker.state is not None and worker.process == ALIVE:
                yield (w,), ("kill", *THREADS, *(() if worker.lost else LOOP))
        yield (), NOBODY

    # What has to be so.

    def broken(self, before: State, s: State) -> Iterator[str]:
        """The rules that a step breaks."""
        for kind, (row, lock, effects, performed), (old, *_) in zip(
            self.kinds, s.tasks, before.tasks, strict=True
        ):
            if effects > 1:
                yield "an effect is committed twice"
            if kind != PLAIN and bool(effects) != (row.state == DONE or row.parked):
                yield "effect and completion are not committed together"
            if row.state == DONE and not performed:
                yield "a task is done that never ran"
            if row.state == FAILED and not (
                row.attempts == self.max_attempts or row.crashes == self.max_crashes
            ):
                yield "a task fails for nothing"
            if row.attempts + row.crashes + row.interruptions + row.is_claimed > row.claims:
                yield "a claim is counted twice"
            if row.claims < old.claims:
                yield "claims goes back"
            if old.state in ENDED and row != old:
                yield "a task that has ended changes"
            if lock is not None and not holds(row, lock.claims):
                yield "a lost claim is about to be committed"
        threads = [claim.key for worker in s.workers for claim in worker.at(*BEFORE)]
        if len(set(threads)) < len(threads):
            yield "one claim is in two hands"
        for worker in s.workers:
            if len({claim.key for claim in worker.claims}) < len(worker.claims):
                yield "one claim is twice in one hand"
            running = worker.at(RUNS, FENCED)
            if len(running) > 1 and any(claim.crashes for claim in running):
                yield "a suspect runs beside another task"

    def may_not_come(self, step: Step) -> bool:
        return step.action in FAULTS or step.action in CHANCES

    def has_ended(self, s: State) -> bool:
        """Whether all tasks have ended, and nobody has anything of them in hand or locked."""
        idle = not any(worker.claims for worker in s.workers if worker.process == ALIVE)
        return idle and all(task.row.state in ENDED and task.lock is None for task in s.tasks)

    # What the statements do.

    def holds(self, row: Row, claims: int) -> bool:
        return holds(row, claims)

    def settle(self, s: State, t: int, outcome: Outcome) -> State:
        row = s.tasks[t].row
        return s.row(
            t,
            state=outcome.state,
            attempts=row.attempts + outcome.attempts,
            crashes=row.crashes + outcome.crashes,
            interruptions=row.interruptions + outcome.interruptions,
            parked=outcome.parked,
            worker=None if outcome.state in (PENDING, PROCESSING) else row.worker,
        )

    def committed(self, s: State, t: int) -> State:
        parks = self.kinds[t] == PARKS
        outcome = Outcome(PROCESSING if parks else DONE, attempts=1, parked=parks)
        return self.settle(s.task(t, lock=None, effects=s.tasks[t].effects + 1), t, outcome)

    def claimed(self, s: State, w: int, t: int) -> State:
        return s.row(t, state=PROCESSING, worker=w, claims=s.tasks[t].row.claims + 1)

    def claimable(self, s: State, action: str) -> list[int]:
        suspect = action == "claim_quarantined"
        rows = [task.row for task in s.tasks]
        if suspect and any(row.is_claimed and row.crashes for row in rows):
            return []
        return [
            t for t, row in enumerate(rows) if row.state == PENDING and (row.crashes > 0) == suspect
        ]

    # The loop.

    def locked(self, s: State, claim: Claim) -> bool:
        """Whether an outcome cannot be written, for the row is locked."""
        row, lock, *_ = s.tasks[claim.task]
        return claim.outcome is not None and lock is not None and self.holds(row, claim.claims)

    def claim(self, s: State, w: int, action: str = "claim") -> Steps:
        suspects = [claim for claim in s.workers[w].claims if claim.held and claim.crashes]
        if s.workers[w].stopping or not all(self.locked(s, claim) for claim in suspects):
            return
        for t in self.claimable(s, action):
            row = s.tasks[t].row
            yield t, self.claimed(s, w, t).add(w, Claim(t, row.claims + 1, row.crashes))

    def claim_quarantined(self, s: State, w: int) -> Steps:
        if not any(claim.held and claim.crashes for claim in s.workers[w].claims):
            yield from self.claim(s, w, "claim_quarantined")

    def in_hand(self, s: State, w: int) -> list[Claim]:
        return [claim for claim in s.workers[w].claims if claim.held or claim.outcome is not None]

    def orphans(self, s: State) -> list[int]:
        """What belongs to no living worker."""
        dead = [w for w, worker in enumerate(s.workers) if worker.state != RUNNING]
        return [t for t, (row, *_) in enumerate(s.tasks) if row.is_claimed and row.worker in dead]

    def take_over(self, s: State, w: int) -> Steps:
        """Find orphans; what becomes of them is written with the rest."""
        after = s
        known = [claim.task for claim in self.in_hand(s, w)]
        for t in [] if s.workers[w].stopping else self.orphans(s):
            row = s.tasks[t].row
            last = row.crashes + 1 == self.max_crashes
            outcome = Outcome(FAILED if last else PENDING, crashes=1)
            if row.worker is not None and s.workers[row.worker].state == SHUTDOWN:
                outcome = GIVEN_BACK
            if t not in known:
                claim = Claim(t, row.claims, row.crashes, THROUGH, outcome, held=False)
                after = after.add(w, claim)
        if after is not s:
            yield None, after

    def come_back(self, s: State, w: int) -> Steps:
        """Connect again, and see what has become of oneself and of one's claims."""
        worker = s.workers[w]
        if worker.lost:
            stopping = worker.stopping or worker.state != RUNNING
            after = s.worker(w, lost=False, stopping=stopping, looks=not stopping)
            yield None, self.with_strays(after, w)

    def give_back_strays(self, s: State, w: int) -> Steps:
        """The second look: what was sent has arrived by now, or never will."""
        if s.workers[w].looks and not any(a.worker == w and a.outcome is None for a in s.adrift):
            yield None, self.with_strays(s.worker(w, looks=False), w)

    def with_strays(self, s: State, w: int) -> State:
        known = [claim.key for claim in self.in_hand(s, w)]
        for t, (row, *_) in enumerate(s.tasks):
            if row.is_claimed and row.worker == w and (t, row.claims) not in known:
                s = s.add(w, Claim(t, row.claims, row.crashes, THROUGH, GIVEN_BACK))
        return s

    def give_back_waiting(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(WAITS):
            if not s.workers[w].stopping:
                yield claim.key, s.put(w, claim, GIVEN_BACK)

    def write(self, s: State, w: int) -> Steps:
        after = s
        for claim in s.workers[w].backlog:
            if claim.outcome is not None and not self.locked(after, claim):
                if self.holds(after.tasks[claim.task].row, claim.claims):
                    after = self.settle(after, claim.task, claim.outcome)
                after = after.change(w, claim, outcome=None, held=False)
        if after is not s:
            yield None, after

    # The other threads.

    def perform(self, s: State, w: int) -> Steps:
        worker = s.workers[w]
        for claim in worker.at(WAITS):
            others = [other for other in worker.claims if other.held and other is not claim]
            alone = all(self.locked(s, other) for other in others) and not worker.stopping
            if alone or not claim.crashes:
                after = s.task(claim.task, performed=True)
                yield claim.key, after.change(w, claim, thread=RUNS)

    def failed(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(RUNS):
            last = s.tasks[claim.task].row.attempts + 1 >= self.max_attempts
            yield claim.key, s.put(w, claim, Outcome(FAILED if last else PENDING, attempts=1))

    def succeeded(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(RUNS):
            if self.kinds[claim.task] == PLAIN:
                yield claim.key, s.put(w, claim, Outcome(DONE, attempts=1))

    def write_one(self, s: State, w: int) -> Steps:
        """The fence, in the transaction of the effects."""
        for claim in s.workers[w].at(RUNS):
            row, lock, *_ = s.tasks[claim.task]
            if self.kinds[claim.task] == PLAIN:
                continue
            if not self.holds(row, claim.claims):
                yield claim.key, s.put(w, claim, LOST)
            elif lock is None:
                after = s.task(claim.task, lock=Lock(w, claim.claims))
                yield claim.key, after.change(w, claim, thread=FENCED)

    def commit(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(FENCED):
            after = self.committed(s, claim.task)
            yield claim.key, after.change(w, claim, thread=THROUGH, outcome=None)

    def interrupted(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(CUT):
            yield claim.key, s.put(w, claim, INTERRUPTED)

    def beat(self, s: State, w: int) -> Steps:
        """Learn that one counts as dead, or let another one that is silent do so."""
        if s.workers[w].state == SHUTDOWN:
            return
        if s.workers[w].state == NO_HEARTBEAT:
            if not s.workers[w].stopping:
                yield None, s.worker(w, stopping=True, looks=False)
            return
        for other, worker in enumerate(s.workers):
            if worker.state == RUNNING and worker.process != ALIVE:
                yield other, s.worker(other, state=NO_HEARTBEAT)

    def terminate(self, s: State, w: int) -> Steps:
        """End the backends of dead workers."""
        after = s
        for other in range(len(s.workers)):
            if self.is_dead(s, other):
                after = self.terminated(after, other)
        if after != s and s.workers[w].state != SHUTDOWN:
            yield None, after

    def is_dead(self, s: State, w: int) -> bool:
        left = any(row.is_claimed and row.worker == w for row, *_ in s.tasks)
        state = s.workers[w].state
        return state == NO_HEARTBEAT or (state == SHUTDOWN and left)

    def terminated(self, s: State, w: int) -> State:
        for t, task in enumerate(s.tasks):
            if task.lock is not None and task.lock.worker == w:
                s = s.task(t, lock=None)
        for claim in s.workers[w].at(RUNS, FENCED):
            if self.kinds[claim.task] != PLAIN:
                s = s.change(w, claim, thread=CUT)
        worker = s.workers[w]
        # Who leaves connects again, and that it may be cut off again is no news.
        return s if worker.stopping or worker.process == GONE else s.worker(w, lost=True)

    # Leaving.

    def give_back(self, s: State, w: int) -> Steps:
        """What has not begun; after the grace time, also what runs."""
        for claim in s.workers[w].at(*BEFORE):
            if s.workers[w].stopping and claim.held and claim.outcome is None:
                thread = THROUGH if claim.thread == WAITS else claim.thread
                yield claim.key, s.change(w, claim, thread=thread, outcome=GIVEN_BACK)

    def abandon_locked(self, s: State, w: int) -> Steps:
        after, backlog = s, s.workers[w].backlog
        if s.workers[w].stopping and all(self.locked(s, claim) for claim in backlog):
            for claim in backlog:
                after = after.change(w, claim, outcome=None, held=False)
        if after is not s:
            yield None, after

    def retire(self, s: State, w: int) -> Steps:
        if s.workers[w].may_leave and s.workers[w].state == RUNNING:
            yield None, s.worker(w, state=SHUTDOWN)

    def exit(self, s: State, w: int) -> Steps:
        if s.workers[w].may_leave and s.workers[w].state != RUNNING:
            yield None, s.gone(w)

    # What nobody in particular does.

    def add_worker(self, s: State) -> Steps:
        new = [w for w, worker in enumerate(s.workers) if worker.state is None]
        if new and sum(worker.is_well for worker in s.workers) < 2:
            yield new[0], s.worker(new[0], state=RUNNING)

    def end(self, s: State) -> Steps:
        for t, (row, *_) in enumerate(s.tasks):
            if row.state == PROCESSING and row.parked:
                yield t, self.settle(s, t, Outcome(DONE))

    def arrive(self, s: State) -> Steps:
        """What was sent arrives after its client has gone: a COMMIT, or a statement."""
        for t, after in self.roll_back(s):
            yield t, self.committed(after, t)
        for sent, after in self.vanish(s):
            row, lock, *_ = s.tasks[sent.task]
            if sent.outcome is None:
                if sent.task in self.claimable(s, sent.action):
                    yield sent, self.claimed(after, sent.worker, sent.task)
            elif self.holds(row, sent.claims) and lock is None:
                yield sent, self.settle(after, sent.task, sent.outcome)

    def vanish(self, s: State) -> Steps:
        """A statement never arrives, or does nothing."""
        for n, sent in enumerate(s.adrift):
            yield sent, s._replace(adrift=s.adrift[:n] + s.adrift[n + 1 :])

    def roll_back(self, s: State) -> Steps:
        """The server finds out that the client has gone."""
        for t, (_, lock, *_) in enumerate(s.tasks):
            if lock is not None and (lock.adrift or s.workers[lock.worker].process == GONE):
                yield t, s.task(t, lock=None)

    # Faults. A worker that is well is always left, or can start.

    def is_spared(self, s: State, w: int) -> bool:
        others = s.workers[:w] + s.workers[w + 1 :]
        return not any(other.is_well or other.state is None for other in others)

    def freeze(self, s: State, w: int) -> Steps:
        if not self.is_spared(s, w):
            yield None, s.worker(w, process=FROZEN)

    def thaw(self, s: State, w: int) -> Steps:
        yield None, s.worker(w, process=ALIVE)

    def late_commit(self, s: State, w: int) -> Steps:
        """COMMIT was sent before the process froze."""
        return self.commit(s, w)

    def kill(self, s: State, w: int) -> Steps:
        if not self.is_spared(s, w):
            yield None, s.gone(w)

    def stop(self, s: State, w: int) -> Steps:
        if not self.is_spared(s, w) and not s.workers[w].stopping:
            yield None, s.worker(w, stopping=True, looks=False)

    def cancel(self, s: State) -> Steps:
        for t, (row, lock, *_) in enumerate(s.tasks):
            if row.state not in ENDED and lock is None:
                yield t, s.row(t, state=CANCELLED)

    def lose_session(self, s: State, w: int) -> Steps:
        """A processor's connection is lost, perhaps when COMMIT has been sent."""
        for claim in s.workers[w].at(RUNS, FENCED):
            after = s.change(w, claim, thread=CUT)
            if claim.thread == FENCED:
                after = after.task(claim.task, lock=Lock(w, claim.claims, adrift=True))
            if self.kinds[claim.task] != PLAIN:
                yield claim.key, after

    def lose_claim(self, s: State, w: int) -> Steps:
        for action in ("claim", "claim_quarantined"):
            for t, _ in getattr(self, action)(s, w):
                yield self._lose(s, Statement(action, w, t))

    def lose_write(self, s: State, w: int) -> Steps:
        backlog = s.workers[w].backlog
        if len(backlog) == 1 and not self.locked(s, backlog[0]):
            yield self._lose(s, Statement("write", w, *backlog[0].key, backlog[0].outcome))

    def _lose(self, s: State, sent: Statement) -> tuple[Statement, State]:
        adrift = tuple(sorted((*s.adrift, sent), key=repr))
        return sent, s._replace(adrift=adrift).worker(sent.worker, lost=True)
