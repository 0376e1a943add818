"""The loop: claims tasks, hands them to threads, and writes what becomes of them."""

from __future__ import annotations

import collections
import itertools
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import Connection

from .. import clock as time
from ..config import Config
from ..log import log
from ..models.task import DONE, PENDING
from . import outcome as outcomes
from .claim import Claim, Claimer
from .completer import Completer
from .connection import OwnConnection
from .cursor import Cursor, look
from .database import SURVIVABLE, is_hopeless, reason
from .duties import Duty
from .heartbeat import beat
from .listener import Source
from .quarantine import Quarantine
from .queue import Queue
from .stuck import Stuck
from .takeover import SIZE, Orphans, claims_of
from .threads import Threads
from .wakeup import Wakeup

#: Seconds that an outcome waits for others to be written with.
FLUSH_AFTER = 0.02
#: Seconds after which a busy loop attends to what it is told. Not each time: Python's lock is given
#: away for it, and got back only when the threads are through or have had their turns.
ATTEND_AFTER = 0.1
#: Longest sleep, in seconds, while LISTEN is wanted and cannot be had.
LISTEN_LOST = 1.0
#: Seconds that a claimed task may wait before it is given back.
GIVE_BACK_AFTER = 0.5
NEVER = float("inf")


class Loop:
    """The turns of one worker.

    :param connection: its own, on which it claims and writes.
    :param threads: where tasks run.
    :param wakeup: what it sleeps on.
    :param source: what tells it of news.
    :param burst: whether it ends when no task is due.
    :param on_trouble: called when the database fails.
    :param on_death: called when this worker finds itself declared dead.
    """

    def __init__(
        self,
        app: Flask,
        queue: Queue,
        config: Config,
        connection: OwnConnection,
        worker_id: uuid.UUID,
        name: str,
        channels: t.Sequence[str],
        *,
        threads: Threads,
        wakeup: Wakeup,
        source: Source,
        burst: bool,
        on_trouble: t.Callable[[], None],
        on_death: t.Callable[[], None],
    ) -> None:
        self._queue = queue
        self._models = models = queue.models
        self._config = config
        self._own = connection
        self._worker_id = worker_id
        self._name = name
        self._channels = channels
        self._threads = threads
        self._wakeup = wakeup
        self._source = source
        self._burst = burst
        self._on_trouble = on_trouble
        self._on_death = on_death

        #: Every claim whose outcome is not written yet.
        self.held: set[Claim] = set()
        #: How many tasks have run here, by the state that they got.
        self.ended: collections.Counter[str] = collections.Counter()
        self._completer = Completer(app, queue, config.BATCH_SIZE)
        self._cursor = Cursor(channels)
        self._claimer = Claimer(
            models, worker_id, self._cursor, config.BATCH_SIZE, config.largest_held
        )
        self._quarantine = Quarantine(models, worker_id, channels, config.largest_held)
        self._orphans = Orphans(models, config.MAX_CRASHES)

        timeout = config.WORKER_HEARTBEAT_TIMEOUT
        self._taking_over = Duty(self._take_over, retry_after=timeout / 4)
        self._strays = Duty(self._give_back_strays, at=NEVER)
        stuck = Stuck(threads, config.STUCK_AFTER, name, lambda: self._occupied)
        self._duties = [self._strays, self._taking_over, Duty(stuck.look)]

        #: There is nothing to claim before this time, unless there is news.
        self._quiet_until = 0.0
        self._looked = False
        self._empty = False
        self._failures = 0
        self._attend_at = 0.0
        self._stopping = False
        self._grace_until = NEVER

    def stop(self, grace: float) -> None:
        """Let it claim no more, and leave when what runs has ended. For any thread, and for signal
        handlers. Called again, it changes nothing, unless there is less time.

        :param grace: seconds that running tasks have.
        """
        self._grace_until = min(self._grace_until, time.monotonic() + grace)
        self._stopping = True
        self._wakeup.ring()

    def run(self) -> None:
        """Work until told to stop, or until a burst is through."""
        while not self._stopping:
            try:
                self._turn()
            except SURVIVABLE as error:
                self._fail(error)
                continue
            self._failures = 0
            if self._is_through:
                break
            self._wait()

    def _turn(self) -> None:
        connection = self._own.connection
        if self._failures:
            self._come_back(connection)
        self._claim(connection)
        self._gather()
        self._write(connection)
        self._attend_quarantine(connection)
        if self._threads.waited_for > GIVE_BACK_AFTER:
            self._give_back_waiting(connection)
        for duty in self._duties:
            if time.monotonic() >= duty.at:
                duty.do(connection)

    @property
    def _is_through(self) -> bool:
        """Whether a burst has done what is due, also what dead workers left behind."""
        idle = self._burst and self._empty and not self.held
        return idle and time.monotonic() < self._taking_over.at

    # Claiming.

    def _claim(self, connection: Connection) -> None:
        """Claim as much as will start within a short while."""
        if self._stopping or self._occupied or time.monotonic() < self._quiet_until:
            return
        if self._quarantine.may_follow and self._claim_quarantined(connection):
            return
        self._quarantine.end_turn()
        if not self._looked and not self._look(connection):
            return
        wanted = self._claimer.at_once(self._threads.wanted)
        if wanted <= 0:
            return
        start = time.monotonic()
        if (claims := self._claimer.claim(connection, wanted)) is None:
            if self._cursor.may_look(busy=True):  # what is more urgent does not wait for it
                self._look(connection)
            return
        self.held.update(claims)
        self._threads.add(claims)
        if self._cursor.pass_by(claims, wanted):
            return
        enough = len(claims) == wanted
        if self._cursor.may_look(busy=enough):
            self._look(connection)
        elif not enough:
            self._quiet_until = self._cursor.next_claim(time.monotonic() - start)

    def _look(self, connection: Connection) -> bool:
        """Look from the front for what the cursor has passed, and for how long to sleep.

        :return: whether there is anything to claim.
        """
        start = time.monotonic()
        found = look(connection, self._models, self._channels)
        quarantined = self._quarantine.any_waits(connection)
        now = time.monotonic()
        due = self._cursor.take_in(found, now - start)
        self._looked = True
        welcome = quarantined and (self._quarantine.welcome or not self.held)
        if welcome and self._claim_quarantined(connection):
            return False
        self._empty = not due or self._cursor.in_vain
        if self._empty and self._burst:
            self._taking_over.soon()
        if not due:
            pause = self.poll_timeout if found.next_due is None else found.next_due
            self._quiet_until = now + min(pause, self.poll_timeout)
        return due

    def _look_again(self) -> None:
        self._quiet_until = 0.0
        self._empty = False

    # Tasks that were in a crash.

    def _claim_quarantined(self, connection: Connection) -> bool:
        if (claim := self._quarantine.take(connection)) is None:
            return False
        self.held.add(claim)
        return True

    @property
    def _occupied(self) -> bool:
        """Whether a task in quarantine is here, beside which nothing may begin. One that is through
        and waits for somebody's lock is no danger."""
        claim = self._quarantine.claim
        return claim is not None and not self._completer.keeps(claim)

    def _attend_quarantine(self, connection: Connection) -> None:
        """Start the task in quarantine as soon as nothing else is held that it could take along;
        give it back if that lasts too long."""
        if not self._quarantine.waits:
            return
        if self._free == 1:
            claim = self._quarantine.begin()
            # Should it hang the process, nothing else says which task that was.
            log.info("%s was in a crash, and runs alone", claim.label, extra=claim.log_extra())
            self._threads.add([claim])
        elif (claim_back := self._quarantine.give_way()) is not None:
            self._give_back([claim_back])
            self._write(connection)

    # Completing.

    def _gather(self, *, everything: bool = False) -> None:
        """Take what the threads are through with: let go of it, or let it be written if it is
        time."""
        while self._threads.through:
            claim = self._threads.through.popleft()
            if claim in self.held:  # otherwise it has come before
                self.ended[DONE] += 1
                self._completer.forget(claim)  # it may have been given back meanwhile
                self._release(claim)
        done = self._threads.done
        if done and (everything or time.monotonic() >= self._flush_at):
            # What is more than one statement takes can wait for others.
            count = len(done) if everything else min(len(done), self._config.BATCH_SIZE)
            for _ in range(count):
                outcome = done.popleft().outcome
                if outcome.claim in self.held:  # otherwise it has come before
                    self._completer.add(outcome)

    @property
    def _flush_at(self) -> float:
        """When to write what is done: at once if nothing else is held."""
        done = self._threads.done
        if len(done) >= min(self._free, self._config.BATCH_SIZE):
            return 0.0
        return done[0].at + FLUSH_AFTER

    @property
    def _free(self) -> int:
        """How many claims are held whose rows are not known to be locked."""
        return len(self.held) - sum(claim in self.held for claim in self._completer.locked)

    def _write(self, connection: Connection) -> None:
        if time.monotonic() < self._completer.next_try:
            return
        try:
            self._completer.write(connection)
        finally:
            for outcome in self._completer.take_released():
                if outcome.written:
                    self.ended[outcome.state] += outcome.attempts
                self._release(outcome.claim, waits=outcome.written and outcome.state == PENDING)

    def _release(self, claim: Claim, *, waits: bool = False) -> None:
        """Hold a claim no longer.

        :param waits: whether its task waits again.
        """
        self.held.discard(claim)
        if claim is self._quarantine.claim:
            self._quarantine.release()
            self._cursor.look_soon()  # there may be more of them
            self._look_again()
        elif waits or self._burst:  # it is due again, or may have made others
            self._look_again()

    def _give_back(self, claims: t.Iterable[Claim]) -> None:
        """Let tasks wait again, uncounted."""
        for claim in claims:
            self._completer.add(outcomes.given_back(claim))

    def _give_back_waiting(self, connection: Connection) -> None:
        """Give back what no thread has begun, so that other workers can have it."""
        self._give_back(self._threads.take_back())
        self._write(connection)
        self._cursor.look_soon()
        self._looked = False  # what was given back lies before the cursor: look from the front

    # Duties.

    def _known(self) -> set[str]:
        """The tokens of all claims in hand, those of others that are taken over among them."""
        claims = itertools.chain(self.held, self._completer.backlog, self._completer.locked)
        return {claim.token for claim in claims}

    def take_over_soon(self) -> None:
        """From the heartbeat's thread: others have been declared dead."""
        self._orphans.begin()
        self._taking_over.soon()
        self._wakeup.ring()

    def _take_over(self, connection: Connection) -> float:
        """Let what dead workers held wait again: a part of it."""
        if len(self._completer.backlog) < SIZE:
            for outcome in self._orphans.next_part(connection, self._known()):
                self._completer.add(outcome)
        self._write(connection)
        is_through = self._orphans.is_through and not self._completer.backlog
        return self._config.WORKER_HEARTBEAT_TIMEOUT if is_through else 0.0

    def _give_back_strays(self, connection: Connection) -> float:
        """Give back claims that were committed although the answer was lost with a connection."""
        known = self._known()
        mine = claims_of(connection, self._models, self._worker_id)
        strays = [claim for claim in mine if claim.token not in known]
        self.held.update(strays)
        self._give_back(strays)
        self._write(connection)
        return NEVER

    # Waiting.

    def _wait(self) -> None:
        """Sleep until there is something to do."""
        now = time.monotonic()
        if now < self._attend_at and self._timeout() <= 0.0:
            return
        self._attend_at = now + ATTEND_AFTER
        self._threads.watch()
        watched = [self._source] if self._source.fileno() >= 0 else []
        if self._wakeup.wait(self._timeout, *watched) and self._source.drain():
            self._quiet_until = 0.0
        self.listen()

    def _timeout(self) -> float:
        """Seconds until there is something to do without news."""
        now = time.monotonic()
        until = [now + self.poll_timeout, self._completer.next_try]
        if self._threads.through:  # since the last turn; nobody rings again for it
            until.append(now)
        if self._threads.done:
            until.append(self._flush_at)
        if self._threads.waiting:
            until.append(now + GIVE_BACK_AFTER / 2)
        if self._stopping:
            until.append(self._grace_until)
        else:
            until += [duty.at for duty in self._duties]
            if self._quarantine.waits:
                until.append(self._quarantine.until)
            elif not self._occupied and self._threads.wanted > 0:
                until.append(self._quiet_until)
            if self._config.LISTEN and not self._source.listens:
                until.append(self._source.next_try)
        return max(min(until) - now, 0.0)

    @property
    def poll_timeout(self) -> float:
        timeout = self._config.poll_timeout
        if self._config.LISTEN and not self._source.listens:
            return min(timeout, LISTEN_LOST)
        return timeout

    def listen(self) -> None:
        """LISTEN, if that is not so, and look for what came before; poll if it cannot be had."""
        if not self._config.LISTEN or self._stopping or self._source.listens:
            return
        if self._source.listen():
            self._cursor.look_soon()
            self._look_again()
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
        self._on_trouble()
        self._own.close()
        until: float = time.monotonic() + min(0.05 * 2**self._failures, 2.0)
        self._failures = min(self._failures + 1, 10)

        def left() -> float:
            return max(min(until, self._grace_until) - time.monotonic(), 0.0)

        # A worker that is told to stop, and holds nothing, leaves at once.
        while (self.held or not self._stopping) and left() > 0.0:
            self._wakeup.wait(left)

    def _come_back(self, connection: Connection) -> None:
        """Tell the others that this worker lives, and see what has become of its claims."""
        timeout = self._config.WORKER_HEARTBEAT_TIMEOUT
        alive, _ = beat(connection, self._models, self._worker_id, timeout)
        if not alive and not self._stopping:
            self._on_death()
        # Something else than the outcomes may be what fails again and again.
        self._gather(everything=True)
        self._strays.do(connection)
        # A backend that was lost may be at work still.
        self._strays.at = time.monotonic() + timeout
        self._cursor.look_soon()
        self._look_again()

    # Leaving.

    def leave(self, say_goodbye: t.Callable[[Connection], None]) -> None:
        """Give back what has not started, and wait for what runs.

        :param say_goodbye: called when nothing is held any more.
        """
        self._give_back(self._threads.take_back())
        if self._quarantine.claim is not None and self._quarantine.waits:
            self._give_back([self._quarantine.claim])
        while not self._has_left(say_goodbye):
            if not self._failures:
                self._wait()

    def _has_left(self, say_goodbye: t.Callable[[Connection], None]) -> bool:
        """Write what there is to write, and say goodbye if all is written, or the grace time is
        over and the rest given back; tell whether that is so."""
        try:
            connection = self._own.connection
            self._gather()
            if self._failures:
                self._come_back(connection)
            self._write(connection)
            self._failures = 0
            if self.held and time.monotonic() >= self._grace_until:
                self._give_back_rest(connection)
            if self.held:
                return False
            say_goodbye(connection)
            return True
        except SURVIVABLE as error:
            # A worker that holds nothing can leave without a word: nobody waits for it.
            if time.monotonic() >= self._grace_until or not self.held:
                log.error("Worker %s could not say goodbye: %s", self._name, reason(error))
                return True
            self._fail(error)
            return False

    def _give_back_rest(self, connection: Connection) -> None:
        """Give back what still runs, and leave to others what is locked."""
        self._gather(everything=True)  # in one go with what is given back
        undecided = [claim for claim in self.held if not self._completer.keeps(claim)]
        for claim in undecided:
            log.warning("%s is given back while it runs", claim.label)
        self._give_back(undecided)
        self._write(connection)
        if locked := self._completer.abandon_locked():
            self.held.difference_update(locked)
            log.warning("Tasks left to other workers, for their rows are locked: %d", len(locked))
