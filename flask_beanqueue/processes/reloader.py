"""The reloader: a worker that starts again when code changes."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click
from flask import Flask


def run_again(app: Flask, shutdown_timeout: float) -> None:
    """Run this command without ``--reload``, and again after each change of the app's code.

    :param shutdown_timeout: seconds that running tasks have to end before the next start.
    :raises click.UsageError: if watchfiles is not installed.
    """
    try:
        from watchfiles import PythonFilter, run_process
    except ImportError as error:
        raise click.UsageError(
            '--reload needs watchfiles: pip install watchfiles (the extra "reload").'
        ) from error
    os.environ["BQ_WATCHDOG"] = "false"  # whoever reloads may stand in a debugger
    run_process(
        *{Path.cwd(), Path(app.root_path)},
        target=shlex.join(each for each in sys.orig_argv if each != "--reload"),
        target_type="command",
        watch_filter=PythonFilter(),
        sigint_timeout=int(shutdown_timeout) + 5,
        ignore_permission_denied=True,
    )
