"""The package's logger."""

from __future__ import annotations

import logging

log = logging.getLogger("flask_beanqueue")


def reason(error: BaseException) -> str:
    """An error of the database in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
