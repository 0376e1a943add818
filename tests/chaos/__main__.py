"""The command: conducts trials, and prints what they came to."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import report
from .ledger import Verdict
from .scenarios import SCENARIOS, NotHere
from .systems import NAMES
from .trial import conduct


def passed(verdict: Verdict, *, hasty: bool) -> bool:
    """Whether the books are right, no other promise is broken, and, where there is time to tell,
    the pace is back."""
    right = verdict.lost == verdict.doubled == verdict.unfinished == 0
    return right and not verdict.broken and (hasty or verdict.recovery is not None)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--system", type=click.Choice(NAMES), default="ours", help="Which queue.")
@click.option("--list", "lists", is_flag=True, help="List the scenarios.")
@click.option("--hasty", is_flag=True, help="Repeat each fault a few times only.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the verdicts to a JSON file, and the table beside it.",
)
def main(
    names: tuple[str, ...], system: str, lists: bool, hasty: bool, output: Path | None
) -> None:
    """Put the queue through faults, and see what is lost, what is doubled and what it takes.

    A SCENARIO is any part of a scenario's name; without one, all of them come about. The exit code
    is 1 if something was lost, doubled or left unfinished, if another promise was broken, or,
    unless it is to be hasty, if workers did not come back to 95 % of their rate.
    """
    chosen = [
        each for name, each in SCENARIOS.items() if not names or any(part in name for part in names)
    ]
    if not chosen:
        raise click.UsageError(f"No scenario has {' or '.join(names)} in its name: try --list.")
    if lists:
        click.echo("\n".join(each.name for each in chosen))
        return
    verdicts: list[Verdict] = []
    click.echo(report.HEAD)
    for each in chosen:
        try:
            verdict = conduct(each, system, hasty=hasty)
        except NotHere as reason:
            click.echo(f"| {each.name} | not done: {reason} |")
            continue
        verdicts.append(verdict)
        click.echo(report.row(verdict))
        if output is not None:
            report.save(verdicts, output)
    click.echo(f"\n{report.total(verdicts)}")
    sys.exit(0 if all(passed(each, hasty=hasty) for each in verdicts) else 1)


if __name__ == "__main__":
    main()
