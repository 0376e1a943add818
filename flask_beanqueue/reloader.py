"""The reloader: a worker that starts again when code changes."""

from __future__ import annotations

import contextlib
import os
import threading
import typing as t

# What Flask's own run command uses: how to find a change, and how to start the same command again.
from werkzeug._reloader import _get_args_for_reloading, reloader_loops

from .log import log
from .shutdown import SIGNALS, Relay, end_on_signals

#: The exit code of a worker that is to start again.
CHANGED = 3
#: Set, as Werkzeug sets it, for the process that works.
WORKS = "WERKZEUG_RUN_MAIN"


def works() -> bool:
    """Whether this is the process that works, and not the one that starts it again."""
    return os.environ.get(WORKS) == "true"


def start_again() -> int:
    """Start the process that works, and again after each change, until it ends by itself or by a
    signal; return its exit code."""
    pids: list[int] = []
    relay = Relay(pids)
    relay.listen()
    args, env = _get_args_for_reloading(), os.environ | {WORKS: "true"}
    code, changed = 0, False
    while True:
        with relay.held() as mask:
            if relay.stopping:
                break
            pids[:] = [os.posix_spawn(args[0], args, env, setsigmask=mask)]
        code = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
        pids.clear()
        if code != CHANGED:
            if code == 0 or relay.stopping or not changed:
                break
            wait_for_change(code, relay)  # the code may be half written
        changed = True
    # A signal that was passed on may meet a process that has done with its handlers already.
    if code == CHANGED or (relay.stopping and -code in SIGNALS):
        return 0
    return code if code >= 0 else 128 - code  # as a shell says it


def wait_for_change(code: int, relay: Relay) -> None:
    news = threading.Event()
    with on_change(news.set):
        log.error("The worker left with exit code %d; it starts again when code changes", code)
        while not (relay.stopping or news.wait(1)):
            pass


def until_change(run: t.Callable[[], int], stop: t.Callable[[], None]) -> int:
    """In the process that works: run until the end, or until code changes.

    :param stop: called from another thread to let ``run`` end.
    """
    changed = threading.Event()

    def change() -> None:
        changed.set()
        stop()

    end_on_signals()
    with on_change(change):
        code = run()
    return CHANGED if changed.is_set() else code


@contextlib.contextmanager
def on_change(call: t.Callable[[], None]) -> t.Iterator[None]:
    """Have another thread call this once when code has changed."""

    def watch() -> None:
        try:
            loop.run()
        except SystemExit:  # a loop's way to say so
            call()

    with reloader_loops["auto"]() as loop:
        threading.Thread(target=watch, name="beanqueue-reloader", daemon=True).start()
        yield
