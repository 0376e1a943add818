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
    STAYS,
    Front,
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


def test_a_mark_stays_behind_what_was_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    marks = Marks(["default"])
    first, second, third = (
        Front("default", 0, at, str(uuid.UUID(int=9)), -1.0) for at in (1, 2, 5)
    )
    [level] = marks.turn()
    assert marks.step_over(first)
    now += 10.0
    assert not marks.step_over(second), "right after the first, so the time begins anew"
    assert level.mark == (2, second.id)
    now += STAYS - 1
    assert marks.seen(Look([first], None, False), 0.0)
    assert level.mark == (2, second.id)
    marks.passed([CLAIM], wanted=1)
    assert not marks.step_over(third), "something was claimed between them: it does not"
    now += 1
    marks.seen(Look([first], None, False), 0.0)
    assert level.mark == (0, NIL)


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


def test_a_mark_that_has_gone_further_than_it_was_returns_nowhere() -> None:
    marks = Marks(["default"])
    [level] = marks.turn()
    level.mark = 2, NIL
    marks.seen(look(0), 0.0)
    assert not marks.passed([CLAIM], wanted=2)
    assert level.mark == (CLAIM.scheduled_at, CLAIM.key)
