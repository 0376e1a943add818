"""The report: verdicts as a table, for the eye and for the documents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from .ledger import Verdict

HEAD = (
    "| scenario | faults | tasks | lost | doubled | unfinished | recovery | after / before |"
    " remarks |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)


def row(verdict: Verdict) -> str:
    cells = [
        verdict.scenario,
        str(verdict.faults),
        f"{verdict.tasks:,}",
        str(verdict.lost),
        str(verdict.doubled),
        str(verdict.unfinished),
        "never" if verdict.recovery is None else f"{verdict.recovery:.1f} s",
        f"{verdict.ratio:.2f} ({verdict.after:.0f}/s)",
        "; ".join([*(f"**{each}**" for each in verdict.broken), *verdict.remarks]),
    ]
    return f"| {' | '.join(cells)} |"


def total(verdicts: list[Verdict]) -> str:
    names = "faults", "tasks", "lost", "doubled", "unfinished"
    sums = [f"{sum(getattr(each, name) for each in verdicts):,} {name}" for name in names]
    return f"{', '.join(sums)}, {sum(len(each.broken) for each in verdicts)} other promises broken."


def table(verdicts: Iterable[Verdict]) -> str:
    return "\n".join([HEAD, *map(row, verdicts)])


def save(verdicts: list[Verdict], path: Path) -> None:
    """Write verdicts as JSON, and beside it as a table."""
    path.write_text(json.dumps([dataclasses.asdict(each) for each in verdicts], indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{table(verdicts)}\n\n{total(verdicts)}\n")
