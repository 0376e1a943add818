"""Measures this queue beside bare loops, and beside other queues where they are installed.

Run it with ``make bench``, or ``make bench-quick`` for a quick look without other queues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import click

from .figures import Results
from .machine import machine
from .report import write
from .sizes import FULL, QUICK, TINY, Sizes
from .step import Step
from .system import System

MEASURES = (
    "throughput",
    "processes",
    "limit",
    "enqueue",
    "wakeup",
    "schedule",
    "depth",
    "vacuum",
    "idle",
    "channels",
    "memory",
)
PEERS = (
    "beanqueue",
    "procrastinate",
    "pgqueuer",
    "awa",
    "chancy",
    "celery",
    "rq",
    "dramatiq",
    "huey",
)
#: Measures in which each peer takes part with its first setting only.
ONCE = ("wakeup", "vacuum")
RESULTS = Path(__file__).parent / "results"
#: Minutes that the whole run may take; on a slow machine there are fewer rounds for it.
MINUTES = 18


def peers(names: Sequence[str]) -> Iterator[list[System]]:
    """The settings of each other queue that can be measured here."""
    for name in names:
        try:
            module = importlib.import_module(f".systems.{name}", __package__)
        except ImportError as error:
            click.echo(f"Not measured: {name} ({error})", err=True)
            continue
        systems: list[System] = module.SYSTEMS
        if systems and systems[0].store == "Redis" and "REDIS_URL" not in os.environ:
            click.echo(f"Not measured: {name} (there is no REDIS_URL)", err=True)
        elif systems:
            yield systems


@contextlib.contextmanager
def tally_file() -> Iterator[None]:
    """A place for the tally, in memory where the machine has such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        os.environ["BENCH_TALLY"] = f"{folder}/tally"
        yield


@click.command()
@click.option("--quick", is_flag=True, help="Measure less, and no other queues: a few minutes.")
@click.option("--tiny", is_flag=True, help="Measure next to nothing, to see that all runs.")
@click.option("--only", multiple=True, type=click.Choice(MEASURES), help="Measure only this.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds, of which the median counts.")
@click.option("--peers/--no-peers", "with_peers", default=None, help="Measure other queues.")
@click.option("--list", "lists", is_flag=True, help="Print what would be measured.")
@click.option("--output", type=click.Path(path_type=Path), help="The JSON file to write.")
def main(
    quick: bool,
    tiny: bool,
    only: tuple[str, ...],
    rounds: int | None,
    with_peers: bool | None,
    lists: bool,
    output: Path | None,
) -> None:
    """Measure, print a report, and keep all figures as JSON in benchmarks/results."""
    sizes = TINY if tiny else QUICK if quick else FULL
    small = quick or tiny
    rounds = rounds or (1 if small else 3)
    with_peers = not small if with_peers is None else with_peers
    with tally_file():
        others = list(peers(PEERS if with_peers else ()))
        plan = [
            (turn, step)
            for name in MEASURES
            if not only or name in only
            for turn, step in turns(name, sizes, others, rounds)
        ]
        if lists:
            for turn, step in plan:
                click.echo(f"{step.takes(turn):6.1f} s  round {turn + 1}  {step}")
            seconds = sum(step.takes(turn) for turn, step in plan)
            click.echo(f"{seconds / 60:6.1f} min in all, about")
            return
        raise SystemExit(measure(plan, sizes, output or default_output(sizes)))


def turns(
    name: str, sizes: Sizes, others: Sequence[Sequence[System]], rounds: int
) -> Iterator[tuple[int, Step]]:
    """The steps of one measure: within a round, the systems take turns."""
    module: ModuleType = importlib.import_module(f".measures.{name}", __package__)
    taking_part = [
        system for systems in others for system in (systems[:1] if name in ONCE else systems)
    ]
    steps = list(module.steps(sizes, taking_part))
    for turn in range(rounds):
        yield from ((turn, step) for step in steps if turn < step.rounds)


def default_output(sizes: Sizes) -> Path:
    kind = "full" if sizes is FULL else "quick" if sizes is QUICK else "tiny"
    return RESULTS / f"{time.strftime('%Y-%m-%d-%H%M')}-{kind}.json"


def label(step: Step | None) -> str:
    return str(step or "")


def measure(plan: Sequence[tuple[int, Step]], sizes: Sizes, output: Path) -> int:
    """Measure step by step; what fails is noted, and the rest goes on. When it takes longer than it
    may, rounds after the first are left out."""
    results = Results(machine(), dataclasses.asdict(sizes))
    seconds = sum(step.takes(turn) for turn, step in plan)
    slowest = max(MINUTES * 60 / seconds, 1.0)
    start, planned = time.monotonic(), 0.0
    with click.progressbar(
        length=int(seconds),
        label="Measuring",
        item_show_func=label,
        file=sys.stderr,
    ) as bar:
        for (_, turn), group in itertools.groupby(plan, lambda each: (each[1].measure, each[0])):
            steps = [step for _, step in group]
            # A whole round or none: what is compared is to be of the same one.
            late = time.monotonic() - start > slowest * planned
            planned += sum(step.takes(turn) for step in steps)
            for step in steps if turn == 0 or not late else ():
                if not step.worth(turn):
                    continue
                bar.current_item = step
                bar.render_progress()
                begun = time.monotonic()
                try:
                    figures = step.run()
                except Exception as error:
                    results.fail(step, turn, f"{type(error).__name__}: {error}")
                    click.echo(f"\n{step}: {error}", err=True)
                    if "BENCH_VERBOSE" in os.environ:
                        traceback.print_exc()
                else:
                    results.add(step, turn, figures, time.monotonic() - begun)
                results.save(output)
                bar.update(int(step.takes(turn)))
    click.echo(write(results, output))
    return 1 if results.failures else 0


if __name__ == "__main__":
    main()
