"""An app whose processors start processes of their own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue
from tests.probe import tell

db = SQLAlchemy()
bq = BeanQueue(db=db)
#: Elsewhere, and in Python 3.14, a child inherits nothing.
forking = multiprocessing.get_context("fork")
#: For longer than any test waits.
LONG = 600
#: The app's own, from before the worker.
waker = socket.socketpair()


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    if "APP_HANDLES" in os.environ:
        signal.signal(signal.SIGTERM, app_handler)
        signal.signal(signal.SIGUSR1, app_handler)
        waker[1].setblocking(False)
        signal.set_wakeup_fd(waker[1].fileno())
    return app


def app_handler(*args: Any) -> None:
    pass


def ended(process: Any) -> int | None:
    """Wait for a child that should end soon, and see to it that it does."""
    process.join(10)
    code: int | None = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


@contextlib.contextmanager
def started(target: Any) -> Iterator[tuple[Any, Any]]:
    """A child that has begun to run a function; the function's argument is an end of a pipe, and
    the other end comes with the child."""
    here, there = forking.Pipe()
    process = forking.Process(target=target, args=(there,))
    process.start()
    here.recv()
    yield process, here


def sleep(pipe: Any) -> None:
    pipe.send("here I am")
    time.sleep(LONG)


def sleep_until_interrupted(pipe: Any) -> None:
    try:
        pipe.send("here I am")
        time.sleep(LONG)
    except KeyboardInterrupt:
        pipe.send("KeyboardInterrupt")


def report(pipe: Any) -> None:
    handlers = {
        signal.Signals(number).name: getattr(handler, "__name__", str(handler))
        for number in signal.valid_signals()
        if (handler := signal.getsignal(number)) not in (signal.SIG_DFL, signal.SIG_IGN, None)
    }
    wakes = signal.set_wakeup_fd(-1) == waker[1].fileno()
    blocked = [number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    pipe.send("here I am")
    pipe.send([handlers, wakes, blocked])


@bq.processor()
def terminate() -> int | None:
    with started(sleep) as (process, _):
        process.terminate()
        return ended(process)


@bq.processor()
def terminate_at_once() -> list[int | None]:
    """Before the child has come to run anything."""
    codes = []
    for _ in range(20):
        process = forking.Process(target=time.sleep, args=(LONG,))
        process.start()
        process.terminate()
        codes.append(ended(process))
        if codes[-1] is None:
            break
    return codes


@bq.processor()
def hang_up() -> int | None:
    with started(sleep) as (process, _):
        os.kill(process.pid, signal.SIGHUP)
        return ended(process)


@bq.processor()
def interrupt() -> Any:
    with started(sleep_until_interrupted) as (process, pipe):
        os.kill(process.pid, signal.SIGINT)
        raised = pipe.recv() if pipe.poll(10) else None
        ended(process)
        return raised


@bq.processor()
def handlers() -> Any:
    with started(report) as (process, pipe):
        ended(process)
        return pipe.recv()


@bq.processor()
def pool() -> list[int]:
    with forking.Pool(3) as pool:
        return pool.map(abs, [-1, -2])


@bq.processor()
def executor() -> int:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=forking) as executor:
        return executor.submit(pow, 2, 3).result()


@bq.processor()
def subprocesses() -> list[int]:
    codes = []
    for before in (None, os.getpid):  # with a function to call in the child, it is forked
        process = subprocess.Popen([sys.executable, "-c", SLEEPER], preexec_fn=before)
        process.terminate()
        codes.append(process.wait(10))
    return codes


SLEEPER = f"import time; time.sleep({LONG})"


@bq.processor()
def fork_and_exit() -> list[int]:
    """Leave the children as a script does."""
    codes = []
    for end in (lambda: None, lambda: sys.exit(3), lambda: sys.exit("a word"), lambda: 1 / 0):
        pid = os.fork()
        if pid == 0:
            print("a child's last words")
            end()
            return []
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return codes


@bq.processor(channel="long")
def long_process() -> None:
    with started(sleep) as (process, _):
        tell("it runs")
        process.join()


@bq.processor(channel="long")
def long_pool() -> None:
    with forking.Pool(3) as pool:
        pool.map(abs, [-1, -2])
        tell("it runs")
        pool.map(time.sleep, [LONG])


@bq.processor(channel="long")
def long_executor() -> None:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=forking) as executor:
        executor.submit(abs, -1).result()
        tell("it runs")
        executor.submit(time.sleep, LONG).result()
