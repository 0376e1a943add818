"""The trials themselves: they pass what is sound, and notice what is not."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

from .chaos import failpoint, report, trial, watch
from .chaos.__main__ import passed
from .chaos.ledger import Verdict, rate, recovered
from .chaos.scenarios import SCENARIOS, plain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "tests/chaos/results").glob("*.json"))


def conduct(name: str, **env: str) -> Verdict:
    """Conduct a scenario in a hurry."""
    scenario = SCENARIOS[name]
    scenario = dataclasses.replace(scenario, env={**scenario.env, **env})
    return trial.conduct(scenario, "ours", hasty=True)


FROZEN = "a worker frozen and woken, in turn"
LISTENERS = "LISTEN connections killed, each second"
KILLED = "a worker killed, every two seconds"


@pytest.mark.parametrize("name", [FROZEN, KILLED])
def test_with_all_safeguards_nothing_is_lost_or_doubled(name: str) -> None:
    verdict = conduct(name)
    assert (verdict.lost, verdict.doubled, verdict.unfinished) == (0, 0, 0)
    assert verdict.faults == 3
    assert passed(verdict, hasty=True), verdict.broken
    assert verdict.tasks > 500


def test_a_trial_does_not_pass_without_a_fault_or_if_workers_end_that_should_not() -> None:
    def kill(here: trial.Trial) -> None:
        """Not that anybody is told."""
        here.workers[0].send(signal.SIGKILL)

    verdict = trial.conduct(trial.Scenario("a surprise", kill, plain), "ours", hasty=True)
    assert verdict.broken == ["0 faults seen of 1", "workers ended with [-9] by themselves"]
    assert not passed(verdict, hasty=True)


def test_without_the_fence_a_trial_finds_doubles() -> None:
    assert conduct(FROZEN, CHAOS_WITHOUT="fence").doubled > 0


def test_without_the_rescue_a_trial_finds_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 10.0)
    assert conduct(KILLED, CHAOS_WITHOUT="rescue").lost > 0


def test_without_the_outcomes_of_plain_tasks_a_trial_finds_them_unfinished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although each sale has been seen to, once."""
    monkeypatch.setattr(trial, "PATIENCE", 10.0)
    verdict = conduct(LISTENERS, CHAOS_WITHOUT="plain")
    assert (verdict.lost, verdict.doubled) == (0, 0)
    assert verdict.unfinished > 0


def test_each_point_at_which_a_worker_kills_itself_is_one_that_it_comes_to(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Callable[..., None]
) -> None:
    @bq.processor()
    def plain() -> None:
        pass

    @bq.processor()
    def asks(db: Any) -> None:
        db.execute(sa.select(1))

    sent: list[str] = []
    with app.app_context():
        sa.event.listen(
            db.engine,
            "before_cursor_execute",
            lambda *args: sent.append(" ".join(args[2].split())),
        )
        plain.enqueue()
        asks.enqueue()
        db.session.commit()
    work()
    beginnings = {beginning for _, beginning, _ in failpoint.POINTS.values()}
    never = {each for each in beginnings if not any(one.startswith(each) for one in sent)}
    assert never == {"INSERT INTO shipment"}  # the trials' own


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What is not there soon does not come, and how it was before is not asked for long."""
    monkeypatch.setattr(trial, "PATIENCE", 10.0)
    monkeypatch.setattr(trial, "BEFORE", 2.0)
    return monkeypatch


def test_without_the_watchdog_a_trial_finds_tasks_unfinished(
    impatient: pytest.MonkeyPatch,
) -> None:
    """No process is left that works."""
    impatient.setattr(watch, "LEAVES_WITHIN", 3.0)
    verdict = conduct("a task hangs its process, in a C function", BQ_WATCHDOG="false")
    assert verdict.unfinished > 100
    assert verdict.recovery is None
    assert verdict.faults == 0


def test_where_a_copys_worker_ends_connections_of_the_original_a_trial_finds_it(
    impatient: pytest.MonkeyPatch,
) -> None:
    verdict = conduct("a copy of the database on the same server", CHAOS_WITHOUT="datname")
    assert verdict.faults == 2
    assert any("of the original" in each for each in verdict.broken), verdict.broken


def test_where_only_lost_connections_are_passing_trouble_a_trial_finds_tasks_unfinished(
    impatient: pytest.MonkeyPatch,
) -> None:
    name = "a database that is read-only for four seconds, twice"
    verdict = conduct(name, CHAOS_WITHOUT="passing")
    assert verdict.unfinished > 0
    assert any("tasks are FAILED" in each for each in verdict.remarks)


def test_where_large_arguments_are_claimed_at_once_a_trial_finds_tasks_unfinished(
    impatient: pytest.MonkeyPatch,
) -> None:
    name = "claims of large arguments under a memory limit"
    verdict = conduct(name, CHAOS_WITHOUT="halving", BQ_CLAIM_BYTES="2100000000")
    assert verdict.unfinished > 0


def test_where_no_outcome_goes_without_its_notify_a_trial_finds_tasks_unfinished(
    impatient: pytest.MonkeyPatch,
) -> None:
    verdict = conduct("a NOTIFY queue that is full", CHAOS_WITHOUT="silence")
    assert verdict.unfinished > 0
    assert any("tasks are FAILED" in each for each in verdict.remarks)


def test_workers_are_killed_at_all_points_in_turn(tmp_path: Path) -> None:
    points = list(failpoint.POINTS)
    assert [failpoint.next_point(tmp_path) for _ in range(2 * len(points))] == points * 2


def test_the_rate_is_back_when_it_stays_so() -> None:
    """Ten a second, nothing for five seconds, a short burst, and ten a second again."""
    times = [each / 10 for each in range(100)]
    times += [12 + each / 100 for each in range(50)]
    times += [15 + each / 10 for each in range(100)]
    assert rate(times, 1.0, 9.0) == pytest.approx(10)
    back = recovered(times, 10.0, 25.0, 10.0)
    assert back is not None
    assert 14.5 < back < 15.5
    assert recovered(times, 10.0, 16.0, 10.0) is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_documents_have_what_the_trials_came_to(path: Path) -> None:
    results = json.loads(path.read_text())
    table = path.with_suffix(".md").read_text()
    if "scenario" in results[0]:
        verdicts = [Verdict(**each) for each in results]
        assert table == f"{report.table(verdicts)}\n\n{report.total(verdicts)}\n"
    assert table in (ROOT / "docs/reliability.md").read_text()
