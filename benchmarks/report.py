"""What a run's figures say: a table against the bars, one of all systems, and plots.

``python -m benchmarks.report FILE.json`` writes them beside the file.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from .bars import BARS, is_ours, is_peer
from .figures import Results

#: The columns of the table of all systems: heading, measure, case, figure, factor.
COLUMNS = (
    ("nothing /s", "throughput", "nothing", "rate", 1),
    ("write /s", "throughput", "write", "rate", 1),
    ("write through db.session /s", "throughput", "session", "rate", 1),
    ("wake-up idle, p50 ms", "wakeup", "idle", "p50", 1000),
    ("p99", "wakeup", "idle", "p99", 1000),
    ("at 200/s, p50 ms", "wakeup", "200 commits/s", "p50", 1000),
    ("p99", "wakeup", "200 commits/s", "p99", 1000),
    ("held snapshot: beginning /s", "vacuum", "", "beginning", 1),
    ("end /s", "vacuum", "", "end", 1),
)
#: The plots of throughput.
TITLES = {
    "nothing": "do nothing",
    "write": "write a row",
    "session": "write through db.session",
}


def markdown(results: Results) -> str:
    """All tables."""
    return "\n".join(
        [
            *about(results),
            "\n## Bars\n",
            *rows(("bar", "wanted", "measured", "met", "rounds"), bars(results)),
            "\n## Systems\n",
            "Medians of the rounds. Wake-ups here count from the call that enqueues. Other queues"
            " write a row over a driver of their own, and through db.session, as this one does.\n",
            *rows(("system", *(heading for heading, *_ in COLUMNS)), systems(results)),
            "\n## All figures\n",
            *rows(("measure", "case", "system", "figure", "median", "from", "to"), all_(results)),
            *failures(results),
        ]
    )


def about(results: Results) -> Iterator[str]:
    machine = results.machine
    yield f"# {machine['PostgreSQL']}, {machine['processor']}, {machine['cores']} cores\n"
    yield ", ".join(f"{name} {value}" for name, value in machine["settings"].items()) + "\n"
    packages = {"Python": machine["Python"], "Redis": machine["Redis"], **machine["packages"]}
    yield ", ".join(f"{name} {version}" for name, version in packages.items() if version) + "\n"
    yield f"{machine['system']}, {machine['memory'] / 2**30:.0f} GiB, commit {machine['commit']}"


def rows(headings: Iterable[str], cells: Iterable[Iterable[str]]) -> Iterator[str]:
    headings = list(headings)
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for row in cells:
        yield f"| {' | '.join(row)} |"


def bars(results: Results) -> Iterator[tuple[str, ...]]:
    for bar in BARS:
        value = bar.value(results)
        measured = "" if value is None else number(value)
        rounds = ", ".join(map(number, bar.figures(results)))
        yield bar.text, bar.wanted, measured, bar.verdict(results), rounds


def systems(results: Results) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(
        system for _, measure, case, *_ in COLUMNS for system in results.systems(measure, case)
    )
    for name in names:
        values = [
            (results.median(measure, own(measure, case, name), name, figure), factor)
            for _, measure, case, figure, factor in COLUMNS
        ]
        yield name, *("" if value is None else number(value * by) for value, by in values)


def own(measure: str, case: str, system: str) -> str:
    """The case that a system has: ours writes through the session and no other way."""
    return "write" if (measure, case) == ("throughput", "session") and is_ours(system) else case


def all_(results: Results) -> Iterator[tuple[str, ...]]:
    for *key, values in results.table():
        figures = (statistics.median(values), min(values), max(values))
        yield *key, *map(number, figures)


def failures(results: Results) -> Iterator[str]:
    if results.failures:
        yield "\n## Failures\n"
        for each in results.failures:
            what = ": ".join(filter(None, (each["measure"], each["case"], each["system"])))
            yield f"- {what}, round {each['round'] + 1}: {each['why']}"


def number(value: float) -> str:
    """A figure with as many digits as it is worth."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"


def write(results: Results, path: Path) -> str:
    """Write everything beside the JSON file of a run, and return the tables."""
    text = markdown(results)
    path.with_suffix(".md").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib"):
        plots(results, path)
    else:
        click.echo("There are no plots: matplotlib is not installed.", err=True)
    return text


def plots(results: Results, path: Path) -> None:
    """Draw what a table cannot show, as SVG beside the JSON file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # equal figures make equal files
    from matplotlib import pyplot

    for name, draw in (
        ("throughput", draw_throughput),
        ("wakeup", draw_wakeup),
        ("held-snapshot", draw_held),
        ("depth", draw_depth),
    ):
        figure = pyplot.figure(figsize=(8, 4.5), layout="constrained")
        if draw(results, figure):
            figure.savefig(path.with_name(f"{path.stem}-{name}.svg"), metadata={"Date": None})
        pyplot.close(figure)


def color(system: str) -> str:
    return "tab:blue" if is_ours(system) else "tab:orange" if is_peer(system) else "tab:gray"


def fastest(results: Results, case: str) -> dict[str, float]:
    """Rates by system; of another queue only that of its fastest setting."""
    rates: dict[str, float] = {}
    names = results.systems("throughput", case)
    if case == "session":
        names = [*filter(is_ours, results.systems("throughput", "write")), *names]
    for system in names:
        label = system.partition(" (")[0] if is_peer(system) else system
        rate = results.median("throughput", own("throughput", case, system), system, "rate") or 0.0
        rates[label] = max(rate, rates.get(label, 0.0))
    return rates


def draw_throughput(results: Results, figure: Any) -> bool:
    cases = [case for case in TITLES if results.systems("throughput", case)]
    figure.set_figwidth(4 * max(len(cases), 2))
    for position, case in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), position + 1)
        rates = dict(reversed(fastest(results, case).items()))
        axes.barh(list(rates), list(rates.values()), color=[color(each) for each in rates])
        axes.tick_params(labelsize=7)
        axes.set_xlabel("tasks per second")
        axes.set_title(TITLES[case])
    return bool(cases)


def draw_wakeup(results: Results, figure: Any) -> bool:
    cases = [case for case in ("idle", "200 commits/s") if results.systems("wakeup", case)]
    for position, case in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), position + 1)
        names = results.systems("wakeup", case)[::-1]
        for name, alpha in (("p99", 0.4), ("p50", 1.0)):
            times = [1000 * (results.median("wakeup", case, each, name) or 0) for each in names]
            axes.barh(names, times, color=[color(each) for each in names], alpha=alpha)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("ms to the first line, p50 and p99")
        axes.set_title(case)
    return bool(cases)


def draw_held(results: Results, figure: Any) -> bool:
    if not (names := results.systems("vacuum", "")):
        return False
    axes = figure.add_subplot()
    for name in names:
        points = results.all("vacuum", "", name, "points")[0]
        pairs = list(itertools.pairwise(points))
        rates = [
            (after - before) / (ended - begun)
            for (begun, before), (ended, after) in pairs
            if ended > begun
        ]
        done = [after / 1000 for (begun, _), (ended, after) in pairs if ended > begun]
        axes.plot(done, rates, label=name)
    axes.set_xlabel("thousands of tasks done while a snapshot is held")
    axes.set_ylabel("tasks per second")
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return True


def draw_depth(results: Results, figure: Any) -> bool:
    if not (cases := results.cases("depth")):
        return False
    axes = figure.add_subplot()
    for case in cases:
        for system in results.systems("depth", case):
            label = case.replace(" ", "\n")
            axes.bar(label, results.median("depth", case, system, "rate"), color=color(system))
    axes.set_ylabel("tasks per second")
    axes.set_xlabel("tasks in the table")
    return True


@click.command()
@click.argument("path", metavar="FILE.json", type=click.Path(exists=True, path_type=Path))
def main(path: Path) -> None:
    """Write the tables and plots of a run's figures beside their file, and print the tables."""
    click.echo(write(Results.load(path), path))


if __name__ == "__main__":
    main()
