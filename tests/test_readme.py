"""What README and docs show runs, and what they list is there."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from example_app.models import db as example
from flask_beanqueue import Config
from flask_beanqueue.cli import COMMANDS, bq_cli
from flask_beanqueue.config import OF_BEANQUEUE

from .probe import query

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, section: str = "", text: str = README) -> list[str]:
    """The code blocks of a section (or what comes before the first) in a language."""
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        if part.startswith(section + "\n") or (not section and part.startswith("# ")):
            found = re.findall(rf"^```{language}\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
            assert found
            return found
    raise AssertionError(f"There is no section {section!r}")


@pytest.fixture
def app_py(tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's app, in a folder of its own."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    [code] = blocks("python")
    path = tmp_path / "app.py"
    path.write_text(code)
    return path


def load(path: Path) -> Any:
    """Import a file as the module ``app``, without leaving it behind."""
    module = types.ModuleType("app")
    exec(compile(path.read_text(), path, "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def context(app: Flask, db: SQLAlchemy) -> Iterator[None]:
    """An app context; closes the connections after it, when its session has given its own back."""
    with app.app_context():
        yield
    with app.app_context():
        db.engine.dispose()


def shell(script: str, folder: Path) -> str:
    """Run a block as a person would, and return what it prints."""
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what a block started behind its back
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def test_every_block_of_the_readme_is_run_here() -> None:
    """A new block needs a test: this counts them."""
    assert len(re.findall(r"^```\w+$", README, re.MULTILINE)) == 13
    assert set(re.findall(r"^```(\w+)$", README, re.MULTILINE)) == {
        "python",
        "sh",
    }


def test_the_first_app_has_few_lines() -> None:
    [code] = blocks("python")
    imports = [line for line in code.splitlines() if re.match("import|from", line)]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) - len(imports) <= 20


def test_the_commands_to_install_and_try_are_there() -> None:
    assert blocks("sh") == ["pip install .\n"]
    assert 'name = "Flask-BeanQueue"' in (ROOT / "pyproject.toml").read_text()
    assert blocks("sh", "See it work") == ["make demo\n", "make test\n"]
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_tutorial_runs(app_py: Path, tmp_path: Path, database_url: str) -> None:
    create, save, start, fail, kill = blocks("sh", "Five minutes")
    [wrap] = blocks("python", "Five minutes")
    assert "bq_tasks created" in shell(create, tmp_path)
    output = shell(save, tmp_path)
    assert "{'id': 1}" in output
    assert "[('pack', 'PENDING')]" in output
    assert "[('tea', True)]" in shell(start, tmp_path)
    assert "1 1\n" in shell(fail, tmp_path)

    app_py.write_text(app_py.read_text() + wrap)
    # Instead of a time that is long enough on most machines, until it is so on this one.
    until = (
        'until python -c \'import os, sys; sys.path.insert(0, os.environ["PYTHONPATH"]);'
        ' from tests.probe import query; sys.exit(not query(os.environ["DATABASE_URL"],'
        ' "SELECT 1 FROM bq_tasks WHERE func_name = %s AND state = %s", "wrap", "{}"))'
        "'; do :; done"
    )
    assert "& sleep 3" in kill
    assert "& sleep 8" in kill
    kill = kill.replace("& sleep 3", "& " + until.format("PROCESSING"))
    kill = kill.replace("& sleep 8", "& " + until.format("DONE"))
    output = shell(kill, tmp_path)
    assert "wrapping, for the time no. 2" in output
    assert "DONE 2 1 rescuer" in output
    assert "says `DONE 2 1 rescuer`" in README


def test_the_ways_to_make_tasks_work(app_py: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(app_py)
    [code] = blocks("python", "Making tasks")
    with context(module.app, module.db):
        module.db.create_all()
        module.db.session.add_all([module.Order(item="tea"), module.Order(item="cake")])
        module.db.session.commit()
        exec(code, module.__dict__)
        module.db.session.commit()
        count = sa.select(sa.func.count()).select_from(module.bq.Task)
        assert module.db.session.scalar(count) == 8
        module.bq.process_tasks(burst=True)
        done = count.where(module.bq.Task.state == "DONE")
        assert module.db.session.scalar(done) == 6  # two are for later
        module.db.session.rollback()
        assert module.db.session.scalars(sa.select(module.Order.packed)).all() == [True, True]


def test_the_ways_to_do_tasks_work(app_py: Path) -> None:
    module = load(app_py)
    [code] = blocks("python", "Doing tasks")
    exec(code, module.__dict__)
    with context(module.app, module.db):
        module.db.create_all()
        shipped, paid = module.ship.enqueue(order_id=1), module.pay.enqueue(order_id=1)
        module.db.session.commit()
        module.bq.process_tasks(burst=True)
        module.db.session.rollback()
        assert (shipped.state, shipped.result) == ("DONE", {"parcel": str(shipped.id)})
        assert (paid.state, paid.parked) == ("PROCESSING", True)
        module.bq.complete(paid.id)
        module.db.session.commit()
        assert paid.state == "DONE"


@pytest.mark.parametrize("source", ["README.md", "docs/own-tables.md"])
def test_own_tables_work(
    source: str, tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    if source == "README.md":
        [code] = blocks("python", "Own tables")
    else:
        code = "import os\nfrom flask import Flask\n"
        code += blocks("python", "", "# " + (ROOT / source).read_text().partition("# ")[2])[0]
        code += (
            "def create_app():" + blocks("python", "Own tables")[0].partition("create_app():")[2]
        )
    (tmp_path / "app.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("app")
    try:

        @module.bq.processor(channel="orders")
        def pack() -> None:
            pass

        app = module.create_app()
        with context(app, module.db):
            module.db.create_all()
            pack.enqueue()
            module.db.session.commit()
            module.bq.process_tasks(burst=True)
        assert query(
            database_url,
            "SELECT task.state, worker.state FROM task JOIN worker ON worker.id = worker_id",
        ) == [("DONE", "SHUTDOWN")]
    finally:
        del sys.modules["app"]


def test_the_page_on_typing_is_what_type_checkers_read() -> None:
    page = (ROOT / "docs" / "typing.md").read_text()
    found = blocks("python", "", "# " + page.replace("\n## ", "\n### "))
    read = (ROOT / "tests" / "typing" / "page.py").read_text()
    assert "".join(read.split("# What the page says")[0].split()).endswith(
        "".join("".join(found).split())
    )
    module: dict[str, Any] = {"__name__": "page"}
    exec("".join(found), module)
    assert module["resize"].run(width=1).kwargs == {"width": 1}


def test_the_configuration_table_is_the_configuration() -> None:
    section = README.partition("## Configuration")[2].partition("\n## ")[0]
    listed = {
        name: default
        for names, default in re.findall(r"^\| (.*?) \| (.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`BQ_(\w+)`", names)
    }
    values = vars(Config())
    assert set(listed) == set(values)
    for name, value in values.items():
        shown = listed[name].strip("`")
        if value is None:
            assert shown == "unset"
        else:
            assert ast.literal_eval(
                shown.capitalize() if shown in ("true", "false") else shown
            ) == (value), name


def test_the_command_line_is_the_one_described() -> None:
    section = README.partition("## Command line")[2].partition("\n## ")[0]
    commands = set(re.findall(r"`flask bq ([\w-]+)", section))
    assert commands == set(COMMANDS)
    options = {
        option
        for parameter in bq_cli.get_command(click.Context(bq_cli), "worker").params
        for option in parameter.opts
        if option.startswith("--")
    }
    assert set(re.findall(r"`(--[\w-]+)", section)) == options


def test_the_table_for_those_who_come_from_beanqueue_names_what_warns() -> None:
    section = README.partition("## Coming from BeanQueue")[2]
    for name in OF_BEANQUEUE:
        assert f"`BQ_{name}" in section


def test_links_lead_somewhere() -> None:
    for source in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)]+)\)", source.read_text()):
            assert link.startswith("https://") or (source.parent / link).exists(), link


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_whoever_refers_to_tasks_is_shown_an_index(path: Path) -> None:
    shown = re.findall(r'ForeignKey\("bq_tasks\.id"[^`\n]*', path.read_text())
    assert all("index=True" in each for each in shown)
    assert shown or path.name != "README.md"


def test_the_example_app_has_an_index_wherever_it_refers_to_rows() -> None:
    """A unique value has one, too."""
    tables = [each for each in example.metadata.sorted_tables if not each.name.startswith("bq_")]
    keys = [key for table in tables for key in table.foreign_keys]
    assert "bq_tasks.id" in {key.target_fullname for key in keys}
    assert all(key.parent.index or key.parent.unique for key in keys)
