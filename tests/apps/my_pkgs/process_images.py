"""A worker in a script of its own: ``python -m my_pkgs.process_images``."""

from __future__ import annotations

from . import create_app
from .extensions import bq

if __name__ == "__main__":
    bq.process_tasks(channels=("images",), app=create_app())
