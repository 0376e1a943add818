"""What a run has measured: the figures of every step and round, and where they are from."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .step import Step


@dataclasses.dataclass
class Results:
    """A run, as its JSON file has it.

    :param machine: on what it ran, with what.
    :param records: for each step and round ``measure``, ``case``, ``system``, ``round``,
        ``figures`` and the seconds that it ``took``.
    :param failures: steps that could not be measured, and why.
    """

    machine: dict[str, Any]
    sizes: dict[str, Any]
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, step: Step, turn: int, figures: dict[str, Any], took: float) -> None:
        self.records.append(self._record(step, turn) | {"took": took, "figures": figures})

    def fail(self, step: Step, turn: int, why: str) -> None:
        self.failures.append(self._record(step, turn) | {"why": why})

    def _record(self, step: Step, turn: int) -> dict[str, Any]:
        return {
            "measure": step.measure,
            "case": step.case,
            "system": step.system,
            "round": turn,
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls(**json.loads(path.read_text()))

    def all(self, measure: str, case: str, system: str, name: str) -> list[Any]:
        """A figure of all rounds."""
        key = (measure, case, system)
        return [
            record["figures"][name]
            for record in self.records
            if (record["measure"], record["case"], record["system"]) == key
            and name in record["figures"]
        ]

    def of_each_round(self) -> Iterator[Results]:
        """The rounds, each as a run of its own."""
        for turn in sorted({record["round"] for record in self.records}):
            records = [record for record in self.records if record["round"] == turn]
            yield dataclasses.replace(self, records=records)

    def median(self, measure: str, case: str, system: str, name: str) -> float | None:
        """The median of a figure over the rounds; None if it was not measured."""
        values = self.all(measure, case, system, name)
        return statistics.median(values) if values else None

    def systems(self, measure: str, case: str) -> list[str]:
        """Whose figures there are, in the order of the run."""
        return list(
            dict.fromkeys(
                record["system"]
                for record in self.records
                if record["measure"] == measure and record["case"] == case
            )
        )

    def cases(self, measure: str) -> list[str]:
        return list(
            dict.fromkeys(record["case"] for record in self.records if record["measure"] == measure)
        )

    def table(self) -> Iterator[tuple[str, str, str, str, list[float]]]:
        """Every figure that is a number, with its values of all rounds."""
        found: dict[tuple[str, str, str, str], list[float]] = {}
        for record in self.records:
            for name, value in record["figures"].items():
                if isinstance(value, int | float):
                    key = (record["measure"], record["case"], record["system"], name)
                    found.setdefault(key, []).append(value)
        for key, values in found.items():
            yield (*key, values)
