"""The shop: sells all the time, whatever happens, and keeps enough to do for the workers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable

from .ledger import Ledger

#: Single sales a second, each with a commit of its own.
SALES = 50
#: As many tasks wait, at least, and as many are sold at once to see to that.
STOCK = 1500
LOT = 500

Sell = Callable[[Iterable[int]], None]


class Shop:
    """Two threads that sell.

    :param sell: commits sales with their tasks, in one transaction; it raises if it may not have.
    """

    def __init__(self, sell: Sell, ledger: Ledger) -> None:
        self._sell = sell
        self._ledger = ledger
        self._numbers = itertools.count(1)
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._customers, self._stock)
        ]

    def open(self) -> None:
        self._try(LOT)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _customers(self) -> None:
        while not self._closed.wait(1 / SALES):
            self._try(1)

    def _stock(self) -> None:
        while not self._closed.wait(0.2):
            try:
                while self._ledger.waiting() < STOCK and self._try(LOT):
                    pass
            except Exception:  # the database is away; the books can wait
                time.sleep(0.2)

    def _try(self, count: int) -> bool:
        numbers = set(itertools.islice(self._numbers, count))
        try:
            self._sell(numbers)
        except Exception:
            self._ledger.refused |= numbers
            return False
        self._ledger.told |= numbers
        return True
