"""``flask bq submit``."""

from __future__ import annotations

import json

import click
from flask.cli import with_appcontext

from ..exceptions import ArgumentError
from ..registry import import_packages
from .readable import current, readable_errors


@click.command("submit")
@click.argument("channel")
@click.argument("module")
@click.argument("func", metavar="FUNC")
@click.option(
    "-k",
    "--kwargs",
    default="{}",
    help="The task's arguments, as a JSON object.  [default: {}]",
    metavar="JSON",
)
@click.option(
    "--priority",
    type=int,
    default=0,
    show_default=True,
    help="The smaller comes first: -5 before 0.",
)
@with_appcontext
def command(channel: str, module: str, func: str, kwargs: str, priority: int) -> None:
    """Make a task and print its id.

    The processor FUNC of MODULE does it. CHANNEL is where it waits; it may be another than the
    processor's own, if a worker takes tasks from it.

    \b
    Example:
      flask bq submit images my_app.processors resize_image -k '{"width": 200}'
    """
    app, bq = current()
    try:
        arguments = json.loads(kwargs)
    except ValueError as error:
        raise click.BadParameter(f"This is not JSON: {error}.", param_hint="'--kwargs'") from None
    except RecursionError:
        raise click.BadParameter("This is nested too deeply.", param_hint="'--kwargs'") from None
    if not isinstance(arguments, dict):
        raise click.BadParameter(
            'This is no JSON object, such as {"width": 200}.', param_hint="'--kwargs'"
        )
    with readable_errors():
        import_packages(bq.config(app).PROCESSOR_PACKAGES)
    processor = bq.registry.get(module, func)
    if processor is None:
        known = "".join(f"\n  {each.module} {each.func_name}" for each in bq.registry)
        raise click.ClickException(
            f"No processor {module} {func} is registered in this app."
            + (f" There are:{known}" if known else " There is none at all.")
            + "\nImport its module in the app factory, or name it in BQ_PROCESSOR_PACKAGES."
        )
    try:
        task = processor.using(channel=channel, priority=priority).enqueue(**arguments)
    except (ArgumentError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if channel not in bq.registry.channels:
        click.echo(f"No processor has {channel!r} as its channel; is it spelt right?", err=True)
    task_id = task.id
    with readable_errors("GRANT INSERT on it"):
        bq.db.session.commit()
    click.echo(task_id)
