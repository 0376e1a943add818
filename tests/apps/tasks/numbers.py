from __future__ import annotations

from ..commands import bq


@bq.processor(channel="numbers")
def double(number: int) -> int:
    return 2 * number
