"""The checker: looks at every state that a model can come to, breadth first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol


class Model(Protocol):
    initial: Any

    def steps(self, state: Any) -> Iterable[tuple[Any, Any]]:
        """What can happen in a state, and what comes of it."""

    def broken(self, before: Any, after: Any) -> Iterable[str]:
        """The rules that a step breaks."""

    def may_not_come(self, step: Any) -> bool:
        """Whether nothing may depend on a step."""

    def has_ended(self, state: Any) -> bool:
        """Whether nothing more is to be done."""


class Violation(Exception):
    """A rule that a model breaks, and the shortest way there."""

    def __init__(self, rule: str, way: list[tuple[Any, Any]]) -> None:
        self.rule = rule
        self.steps = [str(step) for step, _ in way]
        super().__init__("\n".join([rule, *self.steps]))


@dataclasses.dataclass
class Graph:
    """The states in the order in which they were found, and the steps between them."""

    states: list[Any]
    #: By state: the state and the step from which it was found.
    found: list[tuple[int, Any]]
    #: By state: what can happen, and the state that comes of it.
    steps: list[list[tuple[Any, int]]]

    def way(self, number: int) -> list[tuple[Any, Any]]:
        """The shortest way to a state: steps, and what comes of them."""
        way = []
        while number:
            after = self.states[number]
            number, step = self.found[number]
            way.append((step, after))
        return way[::-1]


def explore(model: Model, rule: str | None = None) -> Graph:
    """Find all states.

    :param rule: the only one that counts.
    :raises Violation: at the first step that breaks a rule.
    """
    graph = Graph([model.initial], [(0, None)], [])
    numbers = {model.initial: 0}
    for number, state in enumerate(graph.states):  # more are appended meanwhile
        steps = []
        for step, after in model.steps(state):
            for broken in model.broken(state, after):
                if rule in (None, broken):
                    raise Violation(broken, [*graph.way(number), (step, after)])
            if after not in numbers:
                numbers[after] = len(graph.states)
                graph.states.append(after)
                graph.found.append((number, step))
            steps.append((step, numbers[after]))
        graph.steps.append(steps)
    return graph


def check(model: Model, rule: str | None = None) -> Graph:
    """Find all states, and see that from each of them, without any further fault, all comes to its
    end, whatever happens first.

    :raises Violation: where that is not so, or a rule is broken.
    """
    graph = explore(model, rule)
    count = len(graph.states)
    before: list[list[int]] = [[] for _ in range(count)]
    open_steps = [0] * count
    for number, steps in enumerate(graph.steps):
        for step, after in steps:
            if not model.may_not_come(step):
                before[after].append(number)
                open_steps[number] += 1
    safe = [number for number in range(count) if not open_steps[number]]
    for number in safe:
        if not model.has_ended(graph.states[number]):
            raise Violation("nothing can happen any more", graph.way(number))
    for number in safe:  # all that is left leads to a safe state; more are appended meanwhile
        for each in before[number]:
            open_steps[each] -= 1
            if not open_steps[each]:
                safe.append(each)
    if len(safe) < count:
        number, passed = open_steps.index(max(open_steps)), set()
        while number not in passed:
            passed.add(number)
            number = next(
                after
                for step, after in graph.steps[number]
                if open_steps[after] and not model.may_not_come(step)
            )
        raise Violation("it can go round for ever", graph.way(number))
    return graph


def tours(graph: Graph, key: Callable[[Any, Any, Any], Any]) -> Iterator[list[tuple[Any, Any]]]:
    """Walks from the first state on that together take a step of each kind.

    :param key: what a step is to be counted as, by the state before it, itself, and what comes.
    """
    left: dict[int, list[tuple[Any, int]]] = {}
    keys = set()
    for number, steps in enumerate(graph.steps):
        for step, after in steps:
            kind = key(graph.states[number], step, graph.states[after])
            if kind not in keys:
                keys.add(kind)
                left.setdefault(number, []).append((step, after))
    for first in range(len(graph.states)):
        while left.get(first):
            walk, number = graph.way(first), first
            while left.get(number):
                step, number = left[number].pop()
                walk.append((step, graph.states[number]))
            yield walk
