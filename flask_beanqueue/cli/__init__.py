"""The command line: ``flask bq …``. Each command is imported when it is called."""

from __future__ import annotations

import importlib
import typing as t

import click
import sqlalchemy as sa
from flask.cli import AppGroup, NoAppException

#: The modules of the commands.
COMMANDS = {"worker": "worker", "create-tables": "tables", "submit": "submit"}


class Group(AppGroup):
    """Commands that say in words why the app cannot be loaded, if it is its database's URL."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if (module := COMMANDS.get(name)) is None:
            return None
        command: click.Command = importlib.import_module(f".{module}", __name__).command
        return command

    def invoke(self, ctx: click.Context) -> t.Any:
        try:
            return super().invoke(ctx)
        except (NoAppException, ImportError, sa.exc.ArgumentError, ValueError) as error:
            from .readable import why_no_engine

            if (words := why_no_engine(error)) is None:
                raise
            raise click.ClickException(words) from error


bq_cli = Group("bq", help="Run workers and make tasks.")
