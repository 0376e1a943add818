"""The cursor, without a database."""

from __future__ import annotations

import time
import types
import uuid

import pytest

from flask_beanqueue.engine import cursor as module
from flask_beanqueue.engine.claim import Claim
from flask_beanqueue.engine.cursor import IN_VAIN, MANY_LEVELS, NIL, STAYS, Cursor, Front, Look

CLAIM = Claim("(0,1)", str(uuid.UUID(int=1)), 1, "default", "app", "f", "{}", 0, 3, 0, 0, 0, None)


def look(*priorities: int, at: int = 1) -> Look:
    """What a look finds: a task that is due in each of these levels."""
    fronts = [
        Front("default", priority, at, str(uuid.UUID(int=9)), True) for priority in priorities
    ]
    return Look(fronts, None)


def test_a_new_priority_gets_a_level_and_comes_in_its_order() -> None:
    cursor = Cursor(["default"])
    assert cursor.take_in(look(5, -1, 0), 0.0)
    assert [level.priority for level in cursor.turn()] == [-1, 0, 5]


def test_levels_where_nothing_waits_are_forgotten_once_there_are_many() -> None:
    cursor = Cursor(["default"])
    cursor.take_in(look(*range(MANY_LEVELS + 1)), 0.0)
    assert len(cursor.turn()) == MANY_LEVELS + 1
    cursor.take_in(look(), 0.0)
    assert len(cursor.turn()) > 0
    cursor.take_in(look(7, 8), 0.0)
    assert [level.priority for level in cursor.turn()] == [7, 8]


def test_looks_that_find_what_cannot_be_had_are_told() -> None:
    """Somebody keeps the row locked, say."""
    cursor = Cursor(["default"])
    for _ in range(IN_VAIN):
        assert not cursor.in_vain
        cursor.take_in(look(0), 0.0)
        cursor.pass_by([], wanted=1)
    assert cursor.in_vain
    cursor.take_in(look(), 0.0)
    assert not cursor.in_vain


def test_a_level_goes_back_for_what_it_has_passed_and_then_returns() -> None:
    cursor = Cursor(["default"])
    cursor.take_in(look(0), 0.0)
    [level] = cursor.turn()
    level.place = last = (5, str(uuid.UUID(int=1)))
    cursor.take_in(look(0, at=2), 0.0)
    assert level.place == (1, NIL)
    cursor.pass_by([], wanted=1)
    assert level.place == last


def test_channels_of_one_priority_come_first_in_turn() -> None:
    cursor = Cursor(["a", "b", "c"])
    firsts = []
    for _ in range(3):
        firsts.append(cursor.turn()[0].channel)
        cursor.pass_by([], wanted=1)
    assert sorted(firsts) == ["a", "b", "c"]


def test_a_mark_stays_behind_what_was_refused_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))
    cursor = Cursor(["default"])
    first, second, third = (
        Front("default", 0, at, str(uuid.UUID(int=9)), True) for at in (1, 2, 5)
    )
    [level] = cursor.turn()
    assert cursor.step_over(level, (first.at, first.id))
    now += 10.0
    assert not cursor.step_over(level, (second.at, second.id)), (
        "right after the first, so the time begins anew"
    )
    assert level.place == (2, second.id)
    now += STAYS - 1
    assert cursor.take_in(Look([first], None), 0.0)
    assert level.place == (2, second.id)
    cursor.pass_by([CLAIM], wanted=1)
    assert not cursor.step_over(level, (third.at, third.id)), (
        "something was claimed between them: it does not"
    )
    now += 1
    cursor.take_in(Look([first], None), 0.0)
    assert level.place == (0, NIL)


def test_claims_move_the_mark_of_their_own_level_only() -> None:
    cursor = Cursor(["default", "other"])
    cursor.pass_by([CLAIM], wanted=1)
    levels = {level.channel: level.place for level in cursor.turn()}
    assert levels[CLAIM.channel] == (CLAIM.scheduled_at, CLAIM.key)
    assert levels["other"] < (0, NIL)


def test_a_claim_that_got_too_little_comes_again_before_the_next_look() -> None:
    cursor = Cursor(["default"])
    now = time.monotonic()
    cursor.take_in(look(0), took=1.0)
    assert cursor.next_claim(took=0.001) == cursor.next_look, "nothing could be had"
    cursor.pass_by([CLAIM], wanted=2)
    assert now < cursor.next_claim(took=0.001) < now + 0.5 < cursor.next_look


def test_a_mark_that_has_gone_further_than_it_was_returns_nowhere() -> None:
    cursor = Cursor(["default"])
    [level] = cursor.turn()
    level.place = 2, NIL
    cursor.take_in(look(0), 0.0)
    assert not cursor.pass_by([CLAIM], wanted=2)
    assert level.place == (CLAIM.scheduled_at, CLAIM.key)
