"""UUIDs of version 7, which sort by the time at which they were made."""

from __future__ import annotations

import os
import struct
import threading
import time
import uuid

_uuid7_lock = threading.Lock()
_uuid7_last = 0


def uuid7() -> uuid.UUID:
    """Make a UUID of version 7 (RFC 9562) that sorts behind all that this process made before.

    The 12 bits after the milliseconds hold a fraction of one (the RFC's method 3), so that tasks
    of one transaction, whose times are equal, keep the order in which they were made. Python has
    a function of this name from 3.14 on.
    """
    return uuid7s(1)[0]


def uuid7s(count: int) -> list[uuid.UUID]:
    """Make several such UUIDs, in order."""
    global _uuid7_last
    with _uuid7_lock:
        first = max(_uuid7_last + 1, time.time_ns() * 4096 // 1_000_000)
        _uuid7_last = first + count - 1
    tails = struct.unpack(f"{count}Q", os.urandom(8 * count))
    return [
        uuid.UUID(
            int=ticks >> 12 << 80 | 0x7000 << 64 | (ticks & 0xFFF) << 64 | 0b10 << 62 | tail >> 2
        )
        for ticks, tail in enumerate(tails, first)
    ]
