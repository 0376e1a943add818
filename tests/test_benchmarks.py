"""The benchmarks run and say what they measured; how much that is depends on the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.bars import BARS, Bar, of
from benchmarks.figures import Results
from benchmarks.report import markdown
from benchmarks.run import MEASURES
from benchmarks.step import Step
from benchmarks.tally import Tally
from benchmarks.worker import Worker

from .processes import Processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OURS = "Flask-BeanQueue"
#: For each measure some of its cases and systems, with figures that there must be.
EXPECTED: dict[str, list[tuple[str, str, set[str]]]] = {
    "throughput": [
        *(("nothing", f"Bare loop (batch {n})", {"rate"}) for n in (1, 10, 100, 500, 1000)),
        *(
            ("nothing", f"{OURS}{each}", {"rate"})
            for each in (" (threads 1)", "", " (processes 2)")
        ),
        *(
            ("write", f"{loop} loop (threads {n})", {"rate"})
            for n in (1, 4, 8)
            for loop in ("Session", "Statement")
        ),
        *(("write", f"{OURS}{each}", {"rate"}) for each in (" (threads 1)", "", " (processes 2)")),
    ],
    "processes": [("wait", f"{OURS} (processes {n})", {"rate"}) for n in (1, 2)],
    "limit": [
        *((f"commits, clients {n}", "pgbench", {"rate"}) for n in (1, 4, 8)),
        *((case, "psycopg2", {"rate"}) for case in ("rows", "tasks")),
        ("NOTIFY", "psycopg2", {"p50"}),
    ],
    "enqueue": [
        ("request", OURS, {"alone", "row", "task"}),
        ("many", OURS, {"rate"}),
        *(("many", f"COPY {each}", {"rate"}) for each in ("from arguments", "of ready text")),
    ],
    "wakeup": [
        (case, system, {"p50", "p99", "commit_p50", "commit_p99"})
        for case in ("idle", "200 commits/s")
        for system in ("Bare listener (batch 4)", OURS)
    ],
    "schedule": [("", OURS, {"p50", "p99"})],
    "depth": [
        (case, OURS, {"rate"}) for case in ("waiting 10", "waiting 500", "done 1,000", "later 500")
    ],
    "vacuum": [
        ("", OURS, {"beginning", "end", "points", "wakeup_before", "wakeup_after", "dead"}),
        *(
            ("", f"Bare loop{each} (batch 500)", {"beginning", "end", "points"})
            for each in ("", " from the front")
        ),
    ],
    "idle": [
        ("workers 2", OURS, {"statements", "processor", "rss", "pss", "notify", "notify_bare"})
    ],
    "channels": [
        (case, OURS, {"rate"})
        for case in (
            "channels 1, workers 2",
            "channels 8, workers 2",
            "priorities 1",
            "priorities 10",
        )
    ],
    "memory": [
        ("worker", OURS, {"start", "end", "growth", "points"}),
        ("import", OURS, {"flask", "package"}),
    ],
}


def bench(processes: Processes, *arguments: str) -> str:
    """Run the benchmark to its end, and return what it prints."""
    process = processes.python("-m", "benchmarks.run", *arguments)
    assert process.wait(240) == 0, process.output
    return process.output


def test_expected_are_all_measures() -> None:
    assert set(EXPECTED) == set(MEASURES)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_has_its_figures(measure: str, processes: Processes, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    output = bench(processes, "--tiny", "--only", measure, "--output", str(path))
    results = Results.load(path)
    for case, system, names in EXPECTED[measure]:
        figures, *_ = [
            record["figures"]
            for record in results.records
            if (record["case"], record["system"]) == (case, system)
        ]
        assert names <= figures.keys()
    assert results.failures == []
    assert results.machine["PostgreSQL"].startswith("PostgreSQL ")
    # The report says the same as the file, and each bar is there, measured or not.
    assert markdown(results) in output
    for bar in BARS:
        assert f"| {bar.text} | {bar.wanted} |" in output


def test_the_plan_names_every_measure(processes: Processes) -> None:
    output = bench(processes, "--list", "--no-peers")
    for measure in MEASURES:
        assert f" {measure}: " in output


def test_a_failure_is_noted_and_the_rest_goes_on(processes: Processes, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    process = processes.python(
        *("-m", "benchmarks.run", "--tiny", "--only", "enqueue", "--output", str(path)),
        BQ_BATCH_SIZE="none",  # which the app refuses
    )
    assert process.wait(240) == 1, process.output
    results = Results.load(path)
    assert {failure["measure"] for failure in results.failures} == {"enqueue"}
    assert "## Failures" in process.output


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [((9, 11, 12), "undecided"), ((10, 11), "yes"), ((8, 9), "**no**"), ((), "not measured")],
)
def test_a_bar_on_which_rounds_disagree_is_undecided(rates: tuple[int], verdict: str) -> None:
    results = Results({}, {})
    for turn, rate in enumerate(rates):
        step = Step("depth", "", OURS, run=dict, seconds=1.0)
        results.add(step, turn, {"rate": rate}, took=1.0)
    bar = Bar("speed", of("depth", "", OURS, "rate"), least=10)
    assert bar.verdict(results) == verdict
    assert bar.figures(results) == list(rates)


def test_who_stands_still_is_charged_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally(str(tmp_path / "tally"))
    monkeypatch.setattr("benchmarks.worker.tally", lambda: tally)
    tally.tick(2)
    with Worker(subprocess.Popen(["sleep", "60"])) as worker:
        told = worker.work(3, 0.5)
    assert told.done == 2
    assert 0 < told.rate <= 2
