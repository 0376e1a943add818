"""The bars: what this queue has to reach, each beside what was measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from flask_beanqueue.config import Config

from .figures import Results
from .systems.bare import BareLoop, FrontLoop, Listener, SessionLoop, StatementLoop
from .systems.ours import FlaskBeanQueue

OURS = FlaskBeanQueue.name
#: How other systems name what ours does if nothing is said.
DEFAULT = f" (threads {Config.CONCURRENCY})"
PGQUEUER = "PgQueuer"
LIMITS = (BareLoop.name, FrontLoop.name, Listener.name, SessionLoop.name, StatementLoop.name)

Figure = Callable[[Results], float | None]


@dataclasses.dataclass(frozen=True)
class Bar:
    """:param text: what is wanted.
    :param figure: what was measured in a round; None if it was not.
    :param least: how much it has to be, at least; likewise ``most``.
    """

    text: str
    figure: Figure
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    def value(self, results: Results) -> float | None:
        """The median of the rounds."""
        return statistics.median(figures) if (figures := self.figures(results)) else None

    def verdict(self, results: Results) -> str:
        """Whether it is met; undecided if some rounds say so and others do not."""
        verdicts = {self.met(each) for each in self.figures(results)}
        if len(verdicts) > 1:
            return "undecided"
        return {(): "not measured", (True,): "yes", (False,): "**no**"}[tuple(verdicts)]

    def figures(self, results: Results) -> list[float]:
        """What was measured in each round that has all that it takes. What is compared is always of
        one round, for the machine may be another in the next."""
        rounds = map(self.figure, results.of_each_round())
        return [value for value in rounds if value is not None]

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


def is_ours(system: str) -> bool:
    return system.startswith(OURS)


def is_peer(system: str) -> bool:
    return not is_ours(system) and not system.startswith(LIMITS)


def is_one_pgqueuer(system: str) -> bool:
    return system.startswith(PGQUEUER) and "processes" not in system


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def best(case: str, wanted: Callable[[str], bool]) -> Figure:
    """The highest median throughput of some systems."""

    def figure(results: Results) -> float | None:
        rates = [
            results.median("throughput", case, system, "rate")
            for system in results.systems("throughput", case)
            if wanted(system)
        ]
        return max(filter(None, rates), default=None)

    return figure


def share(above: Figure, below: Figure) -> Figure:
    return lambda results: ratio(above(results), below(results))


def of(measure: str, case: str, system: str, name: str) -> Figure:
    return lambda results: results.median(measure, case, system, name)


def of_case(measure: str, prefix: str, system: str, name: str, position: int) -> Figure:
    """A figure of the first case, or the last, whose name begins so: its numbers depend on the
    sizes."""

    def figure(results: Results) -> float | None:
        cases = [case for case in results.cases(measure) if case.startswith(prefix)]
        return results.median(measure, cases[position], system, name) if cases else None

    return figure


def within(measure: str, above: str, below: str) -> Figure:
    """What is left of a speed between two figures of the same steps."""
    return share(of(measure, "", OURS, above), of(measure, "", OURS, below))


def least_share(others: Callable[[str], bool]) -> Figure:
    """The smallest share of ours in theirs, over equal numbers of threads."""

    def figure(results: Results) -> float | None:
        shares = []
        for system in filter(is_ours, results.systems("throughput", "write")):
            settings = system.removeprefix(OURS) or DEFAULT
            for other in filter(others, results.systems("throughput", "write")):
                if other.endswith(settings):
                    ours = results.median("throughput", "write", system, "rate")
                    theirs = results.median("throughput", "write", other, "rate")
                    shares.append(ratio(ours, theirs))
        return min((each for each in shares if each is not None), default=None)

    return figure


def depth(prefix: str, position: int) -> Figure:
    return share(
        of_case("depth", prefix, OURS, "rate", position),
        of_case("depth", "waiting", OURS, "rate", 0),
    )


NOTHING = of("throughput", "nothing", OURS, "rate")

BARS = [
    Bar(
        "do nothing: times PgQueuer's best, one process each",
        share(NOTHING, best("nothing", is_one_pgqueuer)),
        least=2,
    ),
    Bar(
        "do nothing: share of the fastest bare loop",
        share(NOTHING, best("nothing", lambda system: system.startswith(BareLoop.name))),
        least=0.8,
    ),
    Bar(
        "do nothing: times the fastest peer",
        share(best("nothing", is_ours), best("nothing", is_peer)),
        least=1,
    ),
    Bar(
        "write a row: share of the session loop, worst of 1, 4 and 8 threads",
        least_share(lambda system: system.startswith(SessionLoop.name)),
        least=0.85,
    ),
    Bar(
        "write a row through db.session: times the fastest peer",
        share(best("write", is_ours), best("session", is_peer)),
        least=1,
    ),
    Bar(
        "wait: two processes, times one",
        share(
            of("processes", "wait", f"{OURS} (processes 2)", "rate"),
            of("processes", "wait", f"{OURS} (processes 1)", "rate"),
        ),
        least=1.6,
    ),
    Bar(
        "do nothing: two processes, times one",
        share(of("throughput", "nothing", f"{OURS} (processes 2)", "rate"), NOTHING),
        least=1,
    ),
    Bar(
        "enqueue: time of a request, beside that with a second row",
        share(of("enqueue", "request", OURS, "task"), of("enqueue", "request", OURS, "row")),
        most=1.3,
    ),
    Bar(
        "enqueue_many: speed beside COPY, both from arguments to commit",
        share(
            of("enqueue", "many", OURS, "rate"),
            of("enqueue", "many", "COPY from arguments", "rate"),
        ),
        least=0.8,
    ),
    Bar(
        "wake-up when idle: median, beside a bare listener's",
        share(
            of("wakeup", "idle", OURS, "commit_p50"),
            of("wakeup", "idle", f"{Listener.name} (batch 4)", "commit_p50"),
        ),
        most=1.5,
    ),
    Bar(
        "wake-up at 200 commits/s: median, beside a bare listener's",
        share(
            of("wakeup", "200 commits/s", OURS, "commit_p50"),
            of("wakeup", "200 commits/s", f"{Listener.name} (batch 4)", "commit_p50"),
        ),
        most=1.5,
    ),
    Bar("scheduled tasks: p99 of the lateness in s", of("schedule", "", OURS, "p99"), most=0.05),
    Bar("depth: speed with most waiting, beside fewest", depth("waiting", -1), least=0.9),
    Bar("depth: speed with most done, beside none", depth("done", -1), least=0.9),
    Bar("depth: speed with many due later, beside none", depth("later", -1), least=0.9),
    Bar(
        "held snapshot: speed at the end, beside the beginning",
        within("vacuum", "end", "beginning"),
        least=0.9,
    ),
    Bar(
        "held snapshot: wake-up before, beside after",
        within("vacuum", "wakeup_before", "wakeup_after"),
        least=0.9,
    ),
    Bar(
        "idle: statements a second, of each of many workers",
        of_case("idle", "workers", OURS, "statements", -1),
        most=1,
    ),
    Bar(
        "idle: commits with NOTIFY beside many workers of one parent, and as many bare listeners",
        share(
            of_case("idle", "workers", OURS, "notify", -1),
            of_case("idle", "workers", OURS, "notify_bare", -1),
        ),
        least=0.95,
    ),
    Bar(
        "channels: speed with many, beside one, with many workers",
        share(
            of_case("channels", "channels", OURS, "rate", -1),
            of_case("channels", "channels", OURS, "rate", 0),
        ),
        least=0.9,
    ),
    Bar(
        "priorities: speed with ten, beside one",
        share(
            of_case("channels", "priorities", OURS, "rate", -1),
            of_case("channels", "priorities", OURS, "rate", 0),
        ),
        least=0.9,
    ),
    Bar("memory: growth after the first tenth", of("memory", "worker", OURS, "growth"), most=0.02),
    Bar(
        "import: time in s, after Flask-SQLAlchemy",
        of("memory", "import", OURS, "package"),
        most=0.05,
    ),
]
