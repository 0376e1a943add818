"""The marks, without a database."""

from __future__ import annotations

import time
import types
import uuid

import pytest

from flask_beanqueue import marks as module
from flask_beanqueue.claim import Claim
from flask_beanqueue.marks import (
    IN_VAIN,
    MANY_LEVELS,
    NIL,
    PASSED_OVER,
    PASSED_SHARE,
    Front,
    Level,
    Look,
    Marks,
)

CLAIM = Claim("(0,1)", str(uuid.UUID(int=1)), 1, "default", "app", "f", "{}", 0, 3, 0, 0, 0, None)


def look(*priorities: int, at: int = 1) -> Look:
    """What a look finds: a task that is due in each of these levels."""
    fronts = [
        Front("default", priority, at, str(uuid.UUID(int=9)), -1.0) for priority in priorities
    ]
    return Look(fronts, None, False)


def test_a_new_priority_gets_a_level_and_comes_in_its_order() -> None:
    marks = Marks(["default"])
    assert marks.seen(look(5, -1, 0), 0.0)
    assert [level.priority for level in marks.turn()] == [-1, 0, 5]


def test_levels_where_nothing_waits_are_forgotten_once_there_are_many() -> None:
    marks = Marks(["default"])
    marks.seen(look(*range(MANY_LEVELS + 1)), 0.0)
    assert len(marks.turn()) == MANY_LEVELS + 1
    marks.seen(look(), 0.0)
    assert len(marks.turn()) > 0
    marks.seen(look(7, 8), 0.0)
    assert [level.priority for level in marks.turn()] == [7, 8]


def test_looks_that_find_what_cannot_be_had_are_told() -> None:
    """Somebody keeps the row locked, say."""
    marks = Marks(["default"])
    for _ in range(IN_VAIN):
        assert not marks.in_vain
        marks.seen(look(0), 0.0)
        marks.passed([], wanted=1)
    assert marks.in_vain
    marks.seen(look(), 0.0)
    assert not marks.in_vain


def test_a_mark_goes_back_for_what_it_has_passed_and_then_returns() -> None:
    marks = Marks(["default"])
    marks.seen(look(0), 0.0)
    [level] = marks.turn()
    level.mark = last = (5, str(uuid.UUID(int=1)))
    marks.seen(look(0, at=2), 0.0)
    assert level.mark == (1, NIL)
    marks.passed([], wanted=1)
    assert level.mark == last


def test_channels_of_one_priority_come_first_in_turn() -> None:
    marks = Marks(["a", "b", "c"])
    firsts = []
    for _ in range(3):
        firsts.append(marks.turn()[0].channel)
        marks.passed([], wanted=1)
    assert sorted(firsts) == ["a", "b", "c"]


def test_what_was_passed_over_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    marks = Marks(["default"])
    first, second = (Front("default", 0, at, str(uuid.UUID(int=9)), -1.0) for at in (1, 2))
    assert marks.step_over(first, 1.0) == now + PASSED_OVER
    now += 10.0
    assert marks.step_over(second, 9.0) is None
    [level] = marks.turn()
    assert level.mark == (2, second.id)
    now += 10 * PASSED_SHARE - 11
    assert marks.seen(Look([first], None, False), 0.0)
    assert level.mark == (2, second.id)
    now += 1
    marks.seen(Look([first], None, False), 0.0)
    assert level.mark == (0, NIL)


def test_passing_over_takes_a_third_of_the_time_at_most() -> None:
    now = 1000.0
    level = Level("default", 0)
    for at in range(1000):
        now += 1.0
        level.step_over(Front("default", 0, at, NIL, -1.0), now, 1.0)
    assert level.over_until == 1001.0 + 3000.0


def test_claims_move_the_mark_of_their_own_level_only() -> None:
    marks = Marks(["default", "other"])
    marks.passed([CLAIM], wanted=1)
    levels = {level.channel: level.mark for level in marks.turn()}
    assert levels[CLAIM.channel] == (CLAIM.scheduled_at, CLAIM.key)
    assert levels["other"] < (0, NIL)


def test_a_claim_that_got_too_little_comes_again_before_the_next_look() -> None:
    marks = Marks(["default"])
    now = time.monotonic()
    marks.seen(look(0), took=1.0)
    assert marks.next_claim(took=0.001) == marks.next_look, "nothing could be had"
    marks.passed([CLAIM], wanted=2)
    assert now < marks.next_claim(took=0.001) < now + 0.5 < marks.next_look


def test_tasks_that_were_passed_over_earlier_do_not_count_with_those_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    marks = Marks(["default"])
    first, good, last = (Front("default", 0, at, str(uuid.UUID(int=9)), -1.0) for at in (1, 40, 50))
    marks.step_over(last, 0.0)
    now += 3600.0
    marks.step_over(first, 0.0)
    [level] = marks.turn()
    level.mark = last.at, last.id
    marks.seen(Look([good], None, False), 0.0)
    assert level.mark < (good.at, good.id)


def test_a_mark_that_goes_back_for_nothing_is_found_out_beside_a_backlog() -> None:
    marks = Marks(["default"])
    marks.passed([CLAIM], wanted=1)
    for _ in range(2):
        assert not marks.fruitless
        marks.seen(look(0), 0.0)
        assert marks.passed([], wanted=1), "there may be more at the old mark"
        assert not marks.passed([CLAIM], wanted=1)
    assert marks.fruitless
    # And it is over as soon as nothing is there any more.
    marks.seen(look(0, at=9), 0.0)
    marks.passed([CLAIM], wanted=1)
    assert not marks.fruitless


def test_a_mark_that_goes_back_for_something_is_not_in_vain() -> None:
    marks = Marks(["default"])
    for _ in range(4):
        [level] = marks.turn()
        level.mark = 5, str(uuid.UUID(int=1))
        marks.seen(look(0), 0.0)
        marks.passed([CLAIM], wanted=2)
        assert not marks.fruitless


def test_a_mark_that_has_gone_further_than_it_was_returns_nowhere() -> None:
    marks = Marks(["default"])
    [level] = marks.turn()
    level.mark = 2, NIL
    marks.seen(look(0), 0.0)
    assert not marks.passed([CLAIM], wanted=2)
    assert level.mark == (CLAIM.scheduled_at, CLAIM.key)
