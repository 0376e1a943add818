"""Signals that make processes leave: a handler may be interrupted by the next signal."""

from __future__ import annotations

import os
import signal
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from flask_beanqueue import BeanQueue
from flask_beanqueue.engine.shutdown import Relay, handling
from flask_beanqueue.engine.wakeup import Wakeup


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is passed on."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    return sent


def test_an_interrupt_that_comes_while_another_is_passed_on_means_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    relay = Relay([1])

    def kill(pid: int, number: int) -> None:
        sent.append(number)
        if len(sent) == 1:
            relay.stop(signal.SIGINT)

    monkeypatch.setattr(os, "kill", kill)
    relay.stop(signal.SIGINT)
    assert sent == [signal.SIGTERM, signal.SIGQUIT]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_a_process_manager_sends_on_top_is_no_impatience(sent: list[int], number: int) -> None:
    relay = Relay([1])
    relay.stop(number)
    relay.stop(signal.SIGTERM)
    relay.stop(signal.SIGHUP)
    assert sent == [signal.SIGTERM] * 3


def test_sigquit_is_passed_on_as_it_is(sent: list[int]) -> None:
    relay = Relay([1])
    relay.stop(signal.SIGQUIT)
    assert sent == [signal.SIGQUIT]
    assert relay.stopping


def call_handler(number: int) -> None:
    handler: Any = signal.getsignal(number)
    handler(number, None)


@pytest.mark.parametrize(
    ("first", "second", "at_once"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGQUIT, True),
        (signal.SIGINT, signal.SIGTERM, False),
        (signal.SIGTERM, signal.SIGTERM, False),
        (signal.SIGTERM, signal.SIGINT, False),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_a_worker_leaves_at_once_for_sigquit_or_a_second_interrupt(
    app: Flask, bq: BeanQueue, first: int, second: int, at_once: bool, within: bool
) -> None:
    """A terminal, a parent and a process manager may each send one, at the same time."""
    worker = bq.worker(["default"], app=app)
    calls: list[int] = []

    class Config(types.SimpleNamespace):
        @property
        def SHUTDOWN_TIMEOUT(self) -> float:
            calls.append(1)
            if len(calls) == 1 and within:  # before the first has had any effect
                call_handler(second)
            return 1000.0

    worker.config = Config()  # type: ignore[assignment]
    with worker._wakeup, worker._signal_handlers():
        call_handler(first)
        if not within:
            call_handler(second)
    assert worker._loop._stopping
    assert (worker._loop._grace_until <= time.monotonic()) is at_once


def test_the_first_interrupt_of_a_worker_that_stops_already_is_no_impatience(
    app: Flask, bq: BeanQueue
) -> None:
    worker = bq.worker(["default"], app=app)
    with worker._wakeup, worker._signal_handlers():
        worker.stop()
        call_handler(signal.SIGINT)
        assert worker._loop._grace_until > time.monotonic()
        call_handler(signal.SIGINT)
        assert worker._loop._grace_until <= time.monotonic()


def test_a_terminal_that_is_closed_makes_a_worker_leave_and_is_never_impatient(
    app: Flask, bq: BeanQueue
) -> None:
    worker = bq.worker(["default"], app=app)
    with worker._wakeup, worker._signal_handlers():
        call_handler(signal.SIGHUP)
        call_handler(signal.SIGHUP)
        assert worker._loop._stopping
        assert worker._loop._grace_until > time.monotonic()


def test_nohup_lets_a_worker_outlive_its_terminal(app: Flask, bq: BeanQueue) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        worker = bq.worker(["default"], app=app)
        with worker._wakeup, worker._signal_handlers():
            signal.raise_signal(signal.SIGHUP)
            assert not worker._loop._stopping
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def unheeded() -> Iterator[int]:
    """A signal whose handler does nothing, as if Python had not come to call it yet."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_comes_just_before_the_sleep_ends_it(unheeded: int) -> None:
    bell = Wakeup()
    with bell:
        with handling({}, bell.wakes):
            signal.raise_signal(unheeded)
            bell.wait(lambda: None)
        signal.raise_signal(unheeded)
        assert not bell.drain()


def test_a_signal_that_comes_just_before_a_worker_sleeps_wakes_it(
    app: Flask, bq: BeanQueue, unheeded: int
) -> None:
    worker = bq.worker(["default"], app=app)
    with worker._wakeup, worker._signal_handlers():
        signal.raise_signal(unheeded)
        assert worker._wakeup.drain()
