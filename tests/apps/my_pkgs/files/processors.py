from __future__ import annotations

from ..extensions import bq


@bq.processor(channel="files")
def upload_to_s3_for_backup() -> str:
    return "uploaded"
