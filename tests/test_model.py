"""The model of a task's life: it keeps its promises, would not without what it is made of, and is
the package's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask_sqlalchemy import SQLAlchemy
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import completer, fence, heartbeat, outcome, settle
from flask_beanqueue.engine.attempt import Executor
from flask_beanqueue.engine.claim import Claimer
from flask_beanqueue.engine.completer import Completer
from flask_beanqueue.engine.loop import Loop
from flask_beanqueue.models.task import DONE, PENDING, PROCESSING
from flask_beanqueue.models.worker import NO_HEARTBEAT

from . import model
from .checker import Violation, check, explore, tours
from .model import FAULTS, PARKS, PLAIN, WRITES, Model, Row, State, Step, Steps
from .replay import TIMEOUT, Replay

# The checker itself.


class Numbers:
    """A model whose states are digits: 7 must not be, and 9 is the end. Two digits are a step that
    may not come, to the second one."""

    initial = 0

    def __init__(self, ways: dict[int, list[int]]) -> None:
        self.ways = ways

    def steps(self, state: int) -> Iterator[tuple[int, int]]:
        return ((way, way % 10) for way in self.ways.get(state, []))

    def broken(self, before: int, after: int) -> Iterator[str]:
        if after == 7:
            yield "seven"

    def may_not_come(self, step: int) -> bool:
        return step > 9

    def has_ended(self, state: int) -> bool:
        return state == 9


@pytest.mark.parametrize(
    ("ways", "rule", "steps"),
    [
        ({0: [1, 2], 1: [2], 2: [3, 7], 3: [7]}, "seven", "27"),
        ({0: [1, 2], 1: [9], 2: [3]}, "nothing can happen any more", "23"),
        ({0: [1], 1: [19]}, "nothing can happen any more", "1"),
        ({0: [1, 9], 1: [2], 2: [1, 9]}, "it can go round for ever", "1"),
    ],
)
def test_the_checker_tells_the_shortest_way_to_what_is_wrong(
    ways: dict[int, list[int]], rule: str, steps: str
) -> None:
    with pytest.raises(Violation, match=rule) as caught:
        check(Numbers(ways))
    assert caught.value.steps == list(steps)


def test_the_checker_lets_pass_what_comes_to_its_end() -> None:
    """It may go back, but need not."""
    graph = check(Numbers({0: [1, 2], 1: [2], 2: [3], 3: [12, 9]}))
    assert graph.states == [0, 1, 2, 3, 9]


# What the model promises.

TWO_DEATHS = {"workers": 3, "faults": 2, "may": ("kill",)}
#: All faults but that of a process that may go on afterwards.
NO_ZOMBIES = tuple(fault for fault in FAULTS if fault != "freeze")


@pytest.mark.parametrize(
    ("kinds", "limits", "states"),
    [
        ([WRITES], {}, 7492),
        ([PLAIN], {}, 5706),
        ([PARKS], {}, 8208),
        ([WRITES, PLAIN], {"may": ("kill",)}, 3770),
        pytest.param([WRITES], {"faults": 2}, 181654, marks=pytest.mark.slow),
        pytest.param([WRITES, PLAIN], {"may": NO_ZOMBIES}, 82034, marks=pytest.mark.slow),
        pytest.param([WRITES, PLAIN], TWO_DEATHS, 72954, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_whatever_happens_no_task_is_lost_and_no_effect_is_doubled(
    kinds: list[str], limits: dict[str, Any], states: int
) -> None:
    graph = check(Model(*kinds, **limits))
    assert len(graph.states) == states


# What it would not promise if something were missing.


class FencesByState(Model):
    """Does not compare claims."""

    def holds(self, row: Row, claims: int) -> bool:
        return row.is_claimed


class FencesNothing(Model):
    def holds(self, row: Row, claims: int) -> bool:
        return True


class CompletesApart(Model):
    """Commits what the processor wrote, and then the completion by itself."""

    def commit(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(model.FENCED):
            after = s.task(claim.task, lock=None, effects=s.tasks[claim.task].effects + 1)
            yield claim.key, after.put(w, claim, model.Outcome(DONE, attempts=1))


class GivesClaimsBack(Model):
    """Counts as not claimed what is given back."""

    def settle(self, s: State, t: int, outcome: model.Outcome) -> State:
        after = super().settle(s, t, outcome)
        if outcome == model.GIVEN_BACK:
            after = after.row(t, claims=s.tasks[t].row.claims - 1)
        return after


class TakesNothingOver(Model):
    def take_over(self, s: State, w: int) -> Steps:
        yield from ()


class TakesOverItsOwn(Model):
    """Knows only what it is about to write."""

    def in_hand(self, s: State, w: int) -> list[model.Claim]:
        return s.workers[w].backlog


class TakesOverParked(Model):
    def take_over(self, s: State, w: int) -> Steps:
        parked = [t for t, (row, *_) in enumerate(s.tasks) if row.state == PROCESSING]
        for t in parked:
            if s.tasks[t].row.parked:
                yield None, s.row(t, state=PENDING, parked=False)


class BuriesNobody(Model):
    def beat(self, s: State, w: int) -> Steps:
        return ((other, after) for other, after in super().beat(s, w) if other is None)


class TerminatesNobody(Model):
    def is_dead(self, s: State, w: int) -> bool:
        return False


class TerminatesTheSilent(Model):
    """Not those that have shut down."""

    def is_dead(self, s: State, w: int) -> bool:
        return s.workers[w].state == NO_HEARTBEAT


class LooksForNoStrays(Model):
    def with_strays(self, s: State, w: int) -> State:
        return s


class LooksForStraysOnce(Model):
    def come_back(self, s: State, w: int) -> Steps:
        return ((target, after.worker(w, looks=False)) for target, after in super().come_back(s, w))


class LetsSuspectsRunBesideOthers(Model):
    def perform(self, s: State, w: int) -> Steps:
        for claim in s.workers[w].at(model.WAITS):
            after = s.task(claim.task, performed=True)
            yield claim.key, after.change(w, claim, thread=model.RUNS)


class WritesWhatIsLost(Model):
    """Writes outcomes again whose answer it has lost, without looking."""

    def write(self, s: State, w: int) -> Steps:
        after = s
        for claim in s.workers[w].backlog:
            assert claim.outcome is not None
            after = self.settle(after, claim.task, claim.outcome)
            after = after.change(w, claim, outcome=None, held=False)
        if after is not s:
            yield None, after


APART = "effect and completion are not committed together"
TWICE = "an effect is committed twice"
STUCK = "nothing can happen any more"


@pytest.mark.parametrize(
    ("mutant", "may", "rule", "alone"),
    [
        (FencesByState, "freeze", "a lost claim is about to be committed", False),
        (FencesNothing, "freeze", TWICE, True),
        (CompletesApart, "", APART, False),
        (CompletesApart, "kill", TWICE, True),
        (GivesClaimsBack, "give_back_waiting", "claims goes back", False),
        (GivesClaimsBack, "stop", "one claim is in two hands", True),
        (WritesWhatIsLost, "lose_write", "a claim is counted twice", True),
        (TakesNothingOver, "kill", STUCK, False),
        (TakesOverItsOwn, "freeze", "one claim is twice in one hand", False),
        (TakesOverParked, "", APART, False),
        (TakesOverParked, "", TWICE, True),
        (BuriesNobody, "kill", STUCK, False),
        (TerminatesNobody, "freeze", STUCK, False),
        (TerminatesTheSilent, "stop freeze", STUCK, False),
        (LooksForNoStrays, "lose_claim", STUCK, False),
        (LooksForStraysOnce, "lose_claim", STUCK, False),
        (LetsSuspectsRunBesideOthers, "kill", "a suspect runs beside another task", False),
    ],
)
def test_nothing_could_be_left_out(mutant: type[Model], may: str, rule: str, alone: bool) -> None:
    """The checker finds what goes wrong then.

    :param alone: whether other rules are broken before.
    """
    kinds = {TakesOverParked: [PARKS], LetsSuspectsRunBesideOthers: [WRITES, PLAIN]}
    faults = tuple(may.split())
    limits: dict[str, Any] = {"may": faults, "faults": len(faults), "max_attempts": 1}
    broken = mutant(*kinds.get(mutant, [WRITES]), **limits)
    with pytest.raises(Violation, match=rule) as caught:
        check(broken, rule if alone else None)
    way = " ".join(caught.value.steps)
    assert all(fault in way for fault in faults)


# That it is the package's.


def test_the_steps_have_the_names_of_the_package() -> None:
    package = [Executor, Loop, Claimer, Completer, fence, heartbeat, outcome, settle]
    steps = {*model.LOOP, *model.THREADS, *model.NOBODY, *model.CHANCES, "kill"}
    named = {
        step
        for step in steps
        if any(hasattr(each, step) or hasattr(each, f"_{step}") for each in package)
    }
    assert steps - named == set(model.WORLD)


@pytest.fixture
def make_replay(
    make_app: Any,
    db: SQLAlchemy,
    bq: BeanQueue,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Callable[[Model], Replay]]:
    """Makes replays in which nothing takes time."""
    monkeypatch.setattr(completer, "LOCK_TIMEOUT", 0.005)
    monkeypatch.setattr(completer, "LOCKED_AGAIN", 0.0)
    monkeypatch.setattr(outcome, "INTERRUPTION_DELAY", 0.0)
    caplog.set_level(logging.CRITICAL, "flask_beanqueue")
    made = []

    def make(of: Model) -> Replay:
        options = {
            "SQLALCHEMY_ENGINE_OPTIONS": {"pool_pre_ping": True},
            "BQ_WORKER_HEARTBEAT_TIMEOUT": TIMEOUT,
            "BQ_MAX_CRASHES": of.max_crashes,
        }
        apps = [make_app(db, bq, **options) for _ in of.initial.workers]
        made.append(Replay(db, bq, apps, of))
        return made[-1]

    yield make
    for replay in made:
        replay.close()


def coarse(before: State, step: Step, after: State) -> Any:
    """Steps of a kind: what becomes of the rows' states and locks, by a worker in which state."""
    rows = [
        (task.row.state, task.row.parked, task.lock is None, task.row.worker == step.worker)
        for state in (before, after)
        for task in state.tasks
    ]
    return step.action, step.worker is not None and before.workers[step.worker].state, *rows


def fine(before: State, step: Step, after: State) -> Any:
    """Steps of a kind: what becomes of the rows, whichever the worker is."""
    rows = [
        (task.row._replace(worker=task.row.worker == step.worker), task.lock is None)
        for state in (before, after)
        for task in state.tasks
    ]
    return step.action, *rows


SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        (WRITES, coarse),
        pytest.param(PARKS, coarse, marks=SLOW),
        pytest.param(WRITES, fine, marks=SLOW),
        pytest.param(PLAIN, fine, marks=SLOW),
    ],
)
def test_the_package_does_what_the_model_does(
    make_replay: Callable[[Model], Replay], processor: str, kind: Any
) -> None:
    of = Model(processor)
    replay = make_replay(of)
    for walk in tours(explore(of), kind):
        replay.walk(walk)


def test_the_package_does_what_the_model_does_with_more_of_everything(
    make_replay: Callable[[Model], Replay],
) -> None:
    """Two tasks, three workers and three faults, at random."""
    of = Model(WRITES, PLAIN, workers=3, faults=3)
    replay = make_replay(of)

    @settings(max_examples=40)
    @given(st.data())
    def walk(data: st.DataObject) -> None:
        state = of.initial
        steps: list[Any] = []
        while len(steps) < 40:
            needed: list[Any] = []
            maybe: list[Any] = []
            for step, after in of.steps(state):
                (maybe if of.may_not_come(step) else needed).append((step, after))
            if not needed:
                break
            may = maybe and data.draw(st.integers(0, 5)) == 5
            step, state = data.draw(st.sampled_from(maybe if may else needed))
            steps.append((step, state))
        replay.walk(steps)

    walk()
