"""How the package is built: what may import what, and where things are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_beanqueue

#: From top to bottom. A module imports only what stands below it.
FLOORS = """
    cli
    extension
    worker
    heartbeat crew writer suspect supervisor
    executor
    fence
    outcome
    registry
    processor
    queue notify
    queries
    models
    marks reloader fanout
    bell listen signals retry
    connection
    arguments options config claim log errors shutdown
"""
FLOOR = {
    module: number
    for number, line in enumerate(FLOORS.strip().splitlines())
    for module in line.split()
}

#: Imports within functions: who, where, what.
LATE = {
    ("extension", "init_app", "cli"),  # not every process has a command line
    ("worker", "_introduce", "__version__"),
}

FOLDER = Path(flask_beanqueue.__file__).parent
SOURCES = {path.stem: ast.parse(path.read_text()) for path in sorted(FOLDER.glob("*.py"))}
INSIDE = sorted(set(SOURCES) - {"__init__", "__main__"})


def imports(node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """The package's modules that a module imports, each with the function that does so."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level:
            for name in [child.module] if child.module else [each.name for each in child.names]:
                yield function, name
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        yield from imports(child, inside)


def texts(module: str) -> Iterator[str]:
    """The text literals of a module, without its docstrings."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_module_has_its_floor() -> None:
    assert set(INSIDE) == set(FLOOR)


@pytest.mark.parametrize("module", INSIDE)
def test_imports_point_downwards(module: str) -> None:
    for function, name in imports(SOURCES[module]):
        if function:
            assert (module, function, name) in LATE
        else:
            assert FLOOR[name] > FLOOR[module], f"{module} imports {name}, which is not below it"


def test_late_imports_are_there() -> None:
    found = {
        (module, function, name)
        for module in INSIDE
        for function, name in imports(SOURCES[module])
        if function
    }
    assert found == LATE


@pytest.mark.parametrize("module", INSIDE)
def test_nobody_imports_the_package_by_its_name(module: str) -> None:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            assert not any(each.name.startswith("flask_beanqueue") for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert not (node.module or "").startswith("flask_beanqueue")


def test_one_module_knows_of_a_current_app() -> None:
    found = {
        module
        for module in INSIDE
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.Name) and node.id == "current_app"
    }
    assert found == {"claim"}


#: What is said to a connection and not about the queue.
TO_THE_CONNECTION = {
    "connection": {"SELECT current_setting('default_transaction_isolation'), pg_backend_pid()"},
    "listen": {"SELECT pg_backend_pid()"},
}


@pytest.mark.parametrize("module", sorted(set(INSIDE) - {"queries"}))
def test_sql_is_in_queries(module: str) -> None:
    statement = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|MERGE|TRUNCATE)\b")
    found = {text for text in texts(module) if statement.match(text)}
    assert found == TO_THE_CONNECTION.get(module, set())


@pytest.mark.parametrize("module", sorted(set(INSIDE) - {"queries", "notify"}))
def test_sql_is_not_built_elsewhere_either(module: str) -> None:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("sa", "sqlalchemy"):
            assert node.attr not in ("select", "insert", "update", "delete")
