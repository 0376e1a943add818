"""One LISTEN connection for several processes, as seen by those that share it."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterator

import pytest
from flask import Flask

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine import listener as listen
from flask_beanqueue.engine.listener import Listener
from flask_beanqueue.processes.fanout import Fanout, Subscription

from .probe import connect, query


@pytest.fixture
def fanout(app: Flask, bq: BeanQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fanout]:
    monkeypatch.setattr(listen, "LASTS", 0.0)  # whoever loses a connection may have another
    listener = Listener(bq.engine(app), ["default"], name="beanqueue listener", timeout=20)
    with contextlib.closing(Fanout(listener, 2)) as fanout:
        yield fanout


@pytest.fixture
def subscription(fanout: Fanout) -> Subscription:
    return fanout.subscription(1)


@pytest.fixture
def lose(fanout: Fanout, database_url: str) -> Callable[[], None]:
    """Ends the LISTEN connection, and lets the parent see it."""

    def lose() -> None:
        query(
            database_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'beanqueue listener' AND datname = current_database()",
        )
        while fanout.listens:
            assert readable(fanout)
            fanout.drain()

    return lose


def readable(source: Fanout | Subscription, timeout: float = 30) -> bool:
    return bool(select.select([source], [], [], timeout)[0])


def test_a_notification_reaches_each_child_once(fanout: Fanout, database_url: str) -> None:
    assert fanout.listen()
    children = [fanout.subscription(each) for each in range(2)]
    query(database_url, 'NOTIFY "default"')
    assert readable(fanout)
    assert fanout.drain()
    for child in children:
        assert child.listen()
        assert readable(child)
        assert child.drain()
        assert child.listens
        assert not child.drain()


def test_a_child_hears_that_its_parent_listens(fanout: Fanout, subscription: Subscription) -> None:
    assert not subscription.listen()
    assert not readable(subscription, 0)
    assert fanout.listen()
    assert readable(subscription)
    assert subscription.drain()
    assert subscription.listen()
    assert subscription.listens
    assert not subscription.listen()


def test_a_child_hears_that_its_parent_has_lost_the_connection(
    fanout: Fanout, subscription: Subscription, lose: Callable[[], None]
) -> None:
    fanout.listen()
    subscription.listen()
    subscription.drain()
    lose()
    assert readable(subscription)
    assert subscription.drain()
    assert not subscription.listens
    assert not subscription.listen()


def test_a_gap_that_is_over_when_a_child_looks_is_still_a_gap(
    fanout: Fanout, subscription: Subscription, lose: Callable[[], None]
) -> None:
    fanout.listen()
    subscription.listen()
    lose()
    assert fanout.listen()
    assert subscription.drain()
    assert not subscription.listens
    assert subscription.listen()
    assert subscription.listens


def test_a_child_that_does_not_look_holds_nobody_up_and_misses_no_gap(
    fanout: Fanout, subscription: Subscription, database_url: str, lose: Callable[[], None]
) -> None:
    fanout.listen()
    subscription.listen()
    other = fanout.subscription(0)
    with contextlib.closing(connect(database_url)) as connection:
        for _ in range(1000):  # more than a pipe takes
            connection.cursor().execute('NOTIFY "default"')
            assert readable(fanout)
            assert fanout.drain()
            assert other.drain()
    lose()
    while subscription.drain():
        pass
    assert not subscription.listens
