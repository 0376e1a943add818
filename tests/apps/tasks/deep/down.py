from __future__ import annotations

from ...commands import bq


@bq.processor(channel="depth")
def fail() -> None:
    raise ValueError("no good")
