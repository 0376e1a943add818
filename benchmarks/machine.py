"""On what the figures were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil

from .system import execute

#: What decides how fast PostgreSQL is.
SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_level",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "max_connections",
    "autovacuum",
    "autovacuum_naptime",
    "jit",
)
PACKAGES = ("Flask", "Flask-SQLAlchemy", "SQLAlchemy", "psycopg2-binary", "psycopg", "click")
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def machine() -> dict[str, Any]:
    """PostgreSQL, its settings, the processor, the versions of what is measured."""
    [(version,)] = execute("SELECT version()")
    return {
        "PostgreSQL": str(version).split(" on ")[0],
        "settings": {name: execute(f"SELECT current_setting('{name}')")[0][0] for name in SETTINGS},
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "Python": platform.python_version(),
        "Redis": redis(),
        "packages": packages(),
        "commit": commit(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def packages() -> dict[str, str]:
    """The versions of what is measured, as far as it is installed."""
    names = ["Flask-BeanQueue", *PACKAGES]
    if REQUIREMENTS.exists():
        found = re.findall(r"^([A-Za-z0-9][\w.-]*)", REQUIREMENTS.read_text(), re.MULTILINE)
        names += [name for name in found if name.lower() not in {each.lower() for each in names}]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def redis() -> str | None:
    """The version of the Redis that some systems keep their tasks in, if there is one."""
    if "REDIS_URL" not in os.environ:
        return None
    from redis import Redis

    return str(Redis.from_url(os.environ["REDIS_URL"]).info("server")["redis_version"])


def commit() -> str | None:
    """The commit of the checkout, if it is one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
