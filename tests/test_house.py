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
    heartbeat crew writer claimer suspect supervisor
    executor
    fence
    outcome
    registry
    processor
    queue notify
    handover
    queries
    models
    marks reloader fanout
    bell listen signals retry signature
    connection
    log
    arguments options config claim clock errors shutdown version watchdog
"""
FLOOR = {
    module: number
    for number, line in enumerate(FLOORS.strip().splitlines())
    for module in line.split()
}

#: Imports within functions: who, where, what.
LATE = {
    ("extension", "init_app", "cli"),  # not every process has a command line
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
    "connection": {
        "SELECT current_setting('default_transaction_isolation'), pg_backend_pid(),"
        " current_setting('server_encoding'), CASE pg_backend_pid() WHEN :pid THEN"
        " set_config('idle_session_timeout', '0', false) END"
    },
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


#: Where modules are imported by name, and whose names: the configuration's.
BY_NAME = {
    ("registry", "import_packages"),  # BQ_PROCESSOR_PACKAGES
    ("extension", "load_model"),  # BQ_TASK_MODEL and the like
}


def functions(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All nodes of a module, each with the innermost function or class that it is in."""
    for child in ast.iter_child_nodes(node):
        yield function, child
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else function
        yield from functions(child, inside)


def test_modules_are_imported_by_the_names_of_the_configuration_alone() -> None:
    found = {
        (module, function)
        for module in INSIDE
        for function, node in functions(SOURCES[module])
        if isinstance(node, ast.Attribute)
        and (node.attr == "import_module" or ast.unparse(node.value) == "pkgutil")
    }
    assert found == BY_NAME


@pytest.mark.parametrize("module", INSIDE)
def test_nothing_is_evaluated(module: str) -> None:
    evaluate = {"eval", "exec", "compile", "__import__", "__builtins__", "globals", "locals"}
    decode = {"pickle", "cPickle", "_pickle", "dill", "marshal", "shelve", "yaml", "jsonpickle"}
    run = {"ast", "code", "codeop", "builtins", "runpy", "imp", "subprocess", "pydoc", "ctypes"}
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Name):
            assert node.id not in evaluate
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"loads", "load"} or ast.unparse(node) in {
                "json.loads",
                "Config.load",
            }
            assert node.attr not in {"system", "popen", "spec_from_file_location", "exec_module"}
        elif isinstance(node, ast.Import):
            names = {each.name.partition(".")[0] for each in node.names}
            assert not names & (decode | run)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert str(node.module).partition(".")[0] not in decode | run
            assert node.module != "importlib"


#: What takes a message, and what says who wants it.
LOGGING = {"debug", "info", "warning", "error", "exception"}, {"isEnabledFor", "hasHandlers"}


@pytest.mark.parametrize("module", sorted(set(INSIDE) - {"log", "cli"}))
def test_what_others_say_is_an_argument_of_what_is_logged_and_so_escaped(module: str) -> None:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
            name = ast.unparse(node.func).removeprefix("log.")
            assert name in LOGGING[0] | LOGGING[1]
            assert name in LOGGING[1] or isinstance(node.args[0], ast.Constant)


#: What takes SQL.
TAKES_SQL = {
    *("execute", "executemany", "exec_driver_sql", "scalar", "scalars", "mogrify", "copy_expert"),
    *("text", "_text", "_returning_claims", "literal_column", "DDL", "CheckConstraint"),
}
#: What it takes in each module and function that is not a literal.
NO_LITERALS = {
    # Statements that SQLAlchemy makes, and functions.
    ("cli", "ask", "function"),
    ("queries", "check_tables", "nothing"),
    ("queries", "check_tables", "sa.insert(table).from_select(['id'], nothing)"),
    # With what the app's own retry policy answers.
    ("queries", "evaluate", "statement"),
    # A constant of queries.
    ("notify", "notify", "NOTIFY"),
    # With the names of the tables, quoted.
    ("queries", "_text", "sql.format(**self._names)"),
    ("queries", "_returning_claims", "sql.format(claim=columns, **self._names)"),
    # With the constants for states.
    ("models", "add_constraints", "f'state IN ({values})'"),
    # With a name that is made of a UUID or a constant.
    ("connection", "connect", "f\"SET application_name = '{name}'\""),
    ("listen", "hears", "f'LISTEN \"{name}\"'"),
    ("listen", "hears", "f'NOTIFY \"{name}\"'"),
    # With the name of a channel, quoted: LISTEN takes no parameters.
    ("listen", "_connect", "f'LISTEN \"{quoted}\"'"),
}


def sql(module: str) -> Iterator[tuple[str, ast.expr]]:
    """What a module hands over as SQL, and its functions that do so."""
    for function, node in functions(SOURCES[module]):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in TAKES_SQL and not isinstance(node.args[0], ast.Constant):
                yield function, node.args[0]


#: Where all statements are made, by whoever else is among them.
MAKERS = {"__init__"}


def test_no_sql_is_built_from_values() -> None:
    found = set()
    for module in INSIDE:
        for function, node in sql(module):
            text = ast.unparse(node)
            if text.startswith("sa.text("):
                continue  # which comes by itself
            if module == "queries" and (function in MAKERS or text.startswith("self._")):
                continue  # see the next test
            found.add((module, function, text))
    assert found == NO_LITERALS


def test_all_statements_are_made_when_nothing_but_the_models_is_known() -> None:
    [queries] = [
        node
        for node in SOURCES["queries"].body
        if isinstance(node, ast.ClassDef) and node.name == "Queries"
    ]
    makers = {"_text", "_returning_claims"}
    made = set()
    for function in queries.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        if function.name == "__init__":
            assert [each.arg for each in function.args.args] == ["self", "models"]
            names = {
                node.id
                for statement in function.body
                for node in ast.walk(statement)
                if isinstance(node, ast.Name)
            }
            texts = {"claim", "due", "suspect", "suspects"}
            known = {
                "self",
                "models",
                "quote",
                "micros",
                "moment",
                "has_parent",
                "postgresql",
            }
            assert names == known | texts
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr in makers:
                assert function.name in MAKERS
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                assert function.name == "__init__"
                made.add(f"self.{node.attr}")
    handed_over = {
        ast.unparse(part)
        for function, node in sql("queries")
        if function not in MAKERS
        for part in ast.walk(node)
    }
    assert {text for text in handed_over if re.fullmatch(r"self\._\w+", text)} < made
