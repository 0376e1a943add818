"""When threads call for whoever watches them, and what it does when something is raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from flask_beanqueue.engine import outcome as outcomes
from flask_beanqueue.engine import threads
from flask_beanqueue.engine.claim import Claim
from flask_beanqueue.engine.outcome import Outcome
from flask_beanqueue.engine.threads import Threads
from flask_beanqueue.models.uuid7 import uuid7

from .probe import wait_until

#: Outcomes that are written at once; a crew wants twice as many short tasks.
MANY = 10


def claim() -> Claim:
    return Claim(
        "(0,1)", str(uuid7()), 1, "default", "app", "work", "{}", 0, 0.0, 0, 0, 0, unknown_for=None
    )


class Scene:
    """One thread that begins a task for each turn that it is given."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.news, self.loss = threading.Event(), threading.Event()
        self.writes = False
        self.crew = Threads(1, self.perform, self.news.set, self.loss.set, MANY)
        self.crew.start()

    def perform(self, claim: Claim) -> Outcome | None:
        self.turns.acquire()
        return outcomes.succeeded(claim, None, event=False) if self.writes else None

    def add(self, number: int) -> None:
        self.crew.add([claim() for _ in range(number)])

    def let_run(self, number: int) -> None:
        """Let so many tasks run to their end."""
        ended = self.ended + number
        self.turns.release(number)
        wait_until(lambda: self.ended == ended)

    @property
    def ended(self) -> int:
        return len(self.crew.through) + len(self.crew.done)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """With 20 claims, of which a thread has begun one, and a crew that knows its tasks for short
    ones."""
    monkeypatch.setattr(threads, "HORIZON", 60.0)  # however slow the machine
    scene = Scene()
    scene.add(200)
    scene.let_run(200)
    scene.add(2 * MANY)
    wait_until(lambda: scene.crew.running == 1)
    scene.news.clear()
    yield scene
    scene.turns.release(1000)
    scene.crew.dismiss()


def test_claims_that_run_short_are_news(scene: Scene) -> None:
    scene.crew.watch()
    scene.let_run(MANY - 2)
    assert not scene.news.is_set()
    scene.let_run(3)
    assert scene.news.wait(10)
    assert 0 < scene.crew.waiting <= MANY, "there is time to claim more"


def test_the_first_outcome_is_news_and_the_next_ones_are_not(scene: Scene) -> None:
    scene.writes = True
    scene.crew.watch()
    scene.let_run(1)
    assert scene.news.wait(10)
    scene.news.clear()
    scene.crew.watch()
    scene.let_run(3)
    assert not scene.news.is_set()


def test_as_many_outcomes_as_are_written_at_once_are_news(scene: Scene) -> None:
    scene.writes = True
    scene.let_run(1)
    scene.add(MANY)  # so that claims do not run short
    scene.news.clear()
    scene.crew.watch()
    scene.let_run(MANY - 2)
    assert not scene.news.is_set()
    scene.let_run(1)
    assert scene.news.wait(10)


def test_the_last_of_the_tasks_is_news_though_nothing_is_to_be_written(scene: Scene) -> None:
    scene.let_run(2 * MANY - 1)
    scene.crew.watch()
    scene.news.clear()
    scene.let_run(1)
    assert scene.news.wait(10)


def test_a_claim_has_waited_since_it_was_added(scene: Scene) -> None:
    before = time.monotonic()
    scene.let_run(2 * MANY - 1)
    wait_until(lambda: scene.crew.waiting == 0)
    assert scene.crew.waited_for == 0.0, "there is none"
    scene.add(2)
    assert 0.0 < scene.crew.waited_for <= time.monotonic() - before
    waited = scene.crew.waited_for
    scene.add(1)
    assert scene.crew.waited_for > waited, "the first counts"
    scene.crew.take_back()
    assert scene.crew.waited_for == 0.0


class Raised(BaseException):
    """What a timeout raises in a thread from without."""


def test_what_is_raised_around_a_task_ends_the_task_and_not_the_thread(scene: Scene) -> None:
    perform = scene.crew._perform

    def raising(claim: Claim) -> Outcome | None:
        scene.crew._perform = perform
        perform(claim)
        raise Raised

    scene.let_run(2 * MANY)
    scene.crew._perform = raising
    first, second = claim(), claim()
    scene.crew.add([first, second])
    scene.turns.release(2)
    wait_until(lambda: second in scene.crew.through)
    [done] = scene.crew.done
    assert (done.outcome.claim, done.outcome.state) == (first, "FAILED")
    assert done.outcome.error_message == "Raised"
    assert first not in scene.crew.through
    assert scene.crew.running == 0


def test_what_is_raised_when_a_task_has_its_outcome_changes_nothing_of_it(scene: Scene) -> None:
    def raising() -> None:
        scene.crew._on_news = scene.news.set
        raise Raised

    scene.let_run(2 * MANY)
    scene.writes = True
    scene.crew._on_news = raising
    first, second = claim(), claim()
    scene.crew.add([first, second])
    scene.turns.release(2)
    wait_until(lambda: len(scene.crew.done) == 2)
    assert [done.outcome.claim for done in scene.crew.done] == [first, second]
    assert {done.outcome.state for done in scene.crew.done} == {"DONE"}
