"""The queues that are put to the test, in one way of asking."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Protocol

from ...processes import Process

#: Those that `make chaos` and `make chaos-others` know.
NAMES = ("ours", "beanqueue", "procrastinate")


class System(Protocol):
    """A queue, and the shop on it.

    :param url: the database, as the app reaches it.
    """

    #: What tables call it.
    name: str
    #: The exit code of a worker that was told to leave.
    code: int

    def __init__(self, url: str) -> None: ...

    def create(self) -> None:
        """Make the tables: its own, ``sale`` and ``shipment``."""

    def sell(self, numbers: Iterable[int]) -> None:
        """Commit sales with their tasks; raise if that may not have happened."""

    def start(self, env: dict[str, str], *prefix: str, processes: int = 1) -> Process:
        """Start a worker of four threads.

        :param prefix: what comes before the command.
        :param processes: how many such workers, under one parent, where it has that.
        """

    def dead(self, dsn: str) -> int:
        """How many workers count as dead."""

    def undone(self, dsn: str) -> dict[str, int]:
        """How many tasks are not done, by state."""

    def remarks(self, dsn: str) -> list[str]:
        """What else its own books say in the end."""

    def close(self) -> None:
        """Let go of the database."""


def load(name: str) -> type[System]:
    module = importlib.import_module(f"{__name__}.{name}")
    return module.SYSTEM  # type: ignore[no-any-return]
