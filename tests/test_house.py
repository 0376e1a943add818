"""How the package is built: what may import what, and where things are."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flask_beanqueue

#: From top to bottom: packages, and modules that are in none. Each imports only what stands below
#: it, or what is in its own package.
ROOMS = """
    commands
    extension processes
    engine
    registry
    processor signals
    models
    cli current sql
    codec config retry
    clock exceptions log options signature version
"""
FLOOR = {
    room: number for number, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()
}

#: Imports within functions: who, where, what.
LATE = {
    ("extension", "worker", "engine.worker"),  # which a web process does without
    ("cli", "invoke", "cli.readable"),
}

FOLDER = Path(flask_beanqueue.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {name_of(path): ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}
INSIDE = sorted(set(SOURCES) - {""})
PACKAGES = {name for name in INSIDE if (FOLDER / name.replace(".", "/")).is_dir()}


def room(module: str) -> str:
    if module.startswith("cli."):
        return "commands"  # the group itself is light
    return module.partition(".")[0]


def imports(module: str, node: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """The package's modules that a module imports when it runs, each with the function that does
    so."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.level:
            here = module.split(".") if module in PACKAGES else module.split(".")[:-1]
            base = here[: len(here) - child.level + 1]
            for each in child.names:
                path = [*base, *(child.module.split(".") if child.module else []), each.name]
                yield function, ".".join(path if ".".join(path) in SOURCES else path[:-1])
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        yield from imports(module, child, inside)


def texts(module: str) -> Iterator[str]:
    """The text literals of a module, without its docstrings."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in INSIDE} == set(FLOOR)


@pytest.mark.parametrize("module", INSIDE)
def test_imports_point_downwards(module: str) -> None:
    for function, name in imports(module, SOURCES[module]):
        if not function and room(name) != room(module):
            assert FLOOR[room(name)] > FLOOR[room(module)], f"{module} imports {name}"


def test_no_imports_go_round() -> None:
    below = {
        module: {name for function, name in imports(module, SOURCES[module]) if not function}
        for module in INSIDE
    }
    graphlib.TopologicalSorter(below).prepare()


def test_late_imports_are_known() -> None:
    found = {
        (module, function, name)
        for module in INSIDE
        for function, name in imports(module, SOURCES[module])
        if function
    }
    assert found == LATE


def test_the_page_on_the_architecture_has_every_module() -> None:
    page = (FOLDER.parent / "docs" / "architecture.md").read_text()
    folder, named = "", set()
    for line in page.partition("```\n")[2].partition("```")[0].splitlines()[1:]:
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            named.add(name if line.startswith("  " + name) else folder + name)
    here = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")}
    assert named == {path for path in here if not path.endswith("/__init__.py")}


#: What a web process does without.
HEAVY = (
    *("engine.worker", "engine.loop", "engine.threads", "engine.listener", "engine.heartbeat"),
    *("engine.attempt", "engine.completer", "engine.watchdog", "processes", "cli.worker"),
)
SET_UP = """
import sys
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_beanqueue import BeanQueue
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
db = SQLAlchemy(app)
bq = BeanQueue(app)
print(*(name for name in sys.modules if name.startswith("flask_beanqueue.")))
"""


def test_a_web_process_imports_neither_the_loop_nor_the_commands() -> None:
    run = [sys.executable, "-c", SET_UP]
    loaded = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    assert "flask_beanqueue.engine.fence" in loaded
    assert not {f"flask_beanqueue.{name}" for name in HEAVY} & set(loaded)


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
    assert found == {"current"}


#: What is said to a connection and not about the queue, or as the driver takes it.
TO_THE_CONNECTION = {
    "engine.connection": {
        "SELECT current_setting('default_transaction_isolation'), pg_backend_pid(),"
        " current_setting('server_encoding'), CASE pg_backend_pid() WHEN :pid THEN"
        " set_config('idle_session_timeout', '0', false) END"
    },
    "engine.listener": {"SELECT pg_backend_pid()"},
    "engine.notify": {"SELECT pg_notify(%(name)s, '')"},
}


def statements(module: str) -> Iterator[ast.Call]:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Sql":
            yield node


@pytest.mark.parametrize("module", INSIDE)
def test_sql_is_in_whole_statements(module: str) -> None:
    """As constants of a module, to be read and to be found."""
    constants = [node.value for node in SOURCES[module].body if isinstance(node, ast.Assign)]
    whole = set()
    for statement in statements(module):
        assert statement in constants
        [text] = statement.args
        assert isinstance(text, ast.Constant)
        assert all(isinstance(part.value, ast.Name) for part in statement.keywords)
        whole.add(text.value)
    begins = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|MERGE|TRUNCATE)\b")
    found = {text for text in texts(module) if begins.match(text)} - whole
    assert found == TO_THE_CONNECTION.get(module, set())


def test_core_statements_are_for_the_tables_as_they_are() -> None:
    found = {
        module
        for module in INSIDE
        for node in ast.walk(SOURCES[module])
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("sa.select", "sa.insert", "sa.update", "sa.delete")
    }
    assert found == {"engine.checks", "engine.queue"}


#: Where modules are imported by name, and whose names: the configuration's, and a constant's.
BY_NAME = {
    ("cli", "get_command"),  # COMMANDS
    ("registry", "import_packages"),  # BQ_PROCESSOR_PACKAGES
    ("extension", "load_model"),  # BQ_TASK_MODEL and the like
}


def functions(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All nodes of a module, each with the innermost function or class that it is in."""
    for child in ast.iter_child_nodes(node):
        yield function, child
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else function
        yield from functions(child, inside)


def test_modules_are_imported_by_names_of_the_configuration_and_of_constants_alone() -> None:
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


@pytest.mark.parametrize("module", sorted(set(INSIDE) - {"log", "cli.worker"}))
def test_what_others_say_is_an_argument_of_what_is_logged_and_so_escaped(module: str) -> None:
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
            name = ast.unparse(node.func).removeprefix("log.")
            assert name in LOGGING[0] | LOGGING[1]
            assert name in LOGGING[1] or isinstance(node.args[0], ast.Constant)


#: What takes SQL.
TAKES_SQL = {
    *("execute", "executemany", "exec_driver_sql", "scalar", "scalars", "mogrify", "copy_expert"),
    *("text", "literal_column", "DDL", "CheckConstraint"),
}
#: What it takes in each module and function that is neither a literal nor a whole statement.
NO_LITERALS = {
    # Statements that SQLAlchemy makes, and functions.
    ("cli.readable", "ask", "function"),
    ("engine.checks", "check_tables", "nothing"),
    ("engine.checks", "check_tables", "sa.insert(table).from_select(['id'], nothing)"),
    # With what the app's own retry policy answers.
    ("engine.queue", "evaluate", "statement"),
    # A constant of its own.
    ("engine.notify", "notify", "NOTIFY"),
    # Which is CANCELLED, for the length of the line.
    ("engine.completer", "_lose", "statement"),
    # With the names of the tables, quoted.
    ("sql", "on", "self.text.format(**tables.names, **self.parts)"),
    # With the constants for states.
    ("models.indexes", "add_constraints", "f'state IN ({values})'"),
    # With a name that is made of a UUID or a constant.
    ("engine.connection", "connect", "f\"SET application_name = '{name}'\""),
    ("engine.listener", "hears", "f'LISTEN \"{name}\"'"),
    ("engine.listener", "hears", "f'NOTIFY \"{name}\"'"),
    # With the name of a channel, quoted: LISTEN takes no parameters.
    ("engine.listener", "_connect", "f'LISTEN \"{quoted}\"'"),
}


def test_no_sql_is_built_from_values() -> None:
    found = set()
    for module in INSIDE:
        for function, node in functions(SOURCES[module]):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            [sql, *_] = node.args
            name = ast.unparse(node.func).rpartition(".")[2]
            text = ast.unparse(sql)
            if name not in TAKES_SQL or isinstance(sql, ast.Constant):
                continue
            if re.fullmatch(r"[A-Z_]+\.on\([\w.]+\)", text) or text.startswith("sa.text("):
                continue  # a whole statement; or one that comes by itself
            found.add((module, function, text))
    assert found == NO_LITERALS
