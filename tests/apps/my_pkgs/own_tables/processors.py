from __future__ import annotations

from .by_name import bq


@bq.processor(channel="letters")
def post(number: int) -> int:
    return number
