"""Processors of one name: the same function that comes again, what replaces it, what is refused."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flask_beanqueue import BeanQueue

Decorator = Callable[[Any], Any]


def wrapping(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(**kwargs: Any) -> Any:
        return function(**kwargs)

    return wrapper


def renaming(function: Any) -> Any:
    """As many decorators do that are older than functools.wraps."""

    def wrapper(**kwargs: Any) -> Any:
        return function(**kwargs)

    wrapper.__name__, wrapper.__module__ = function.__name__, function.__module__
    return wrapper


class Holding:
    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__, self.__module__ = function.__name__, function.__module__

    def __call__(self, **kwargs: Any) -> Any:
        return self.function(**kwargs)


class Updating(Holding):
    def __init__(self, function: Any) -> None:
        super().__init__(function)
        functools.update_wrapper(self, function)


def filling(function: Any) -> Any:
    return functools.update_wrapper(functools.partial(function, note="x"), function)


def naming(function: Any) -> Any:
    partial: Any = functools.partial(function)
    partial.__name__, partial.__module__ = function.__name__, function.__module__
    return partial


DECORATORS = [
    wrapping,
    renaming,
    Holding,
    Updating,
    filling,
    naming,
    functools.cache,
    staticmethod,
    lambda function: renaming(wrapping(function)),
    lambda function: wrapping(renaming(function)),
    lambda function: Updating(Updating(function)),
]


@pytest.mark.parametrize("decorate", DECORATORS)
def test_two_functions_of_one_name_are_refused_also_under_one_decorator(
    bq: BeanQueue, decorate: Decorator
) -> None:
    @bq.processor()
    @decorate
    def build(note: str = "") -> str:
        return "first"

    first = bq.registry.get(__name__, "build")
    with pytest.raises(ValueError, match=r"two processors called .*\.build.*rename one") as refused:

        @bq.processor()
        @decorate
        def build(note: str = "") -> str:
            return "second"

    lines = [code.co_firstlineno for code in functions_here("build")]
    assert [f"{__file__}:{line}" in str(refused.value) for line in lines] == [True, True]
    assert bq.registry.get(__name__, "build") is first


def functions_here(name: str) -> list[types.CodeType]:
    """The code of the functions of a name in the test that calls."""
    consts = sys._getframe(1).f_code.co_consts
    return [each for each in consts if isinstance(each, types.CodeType) and each.co_name == name]


@pytest.fixture(autouse=True)
def levels_of_old(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever level a command has given the logger in another test."""
    caplog.set_level(logging.NOTSET, "flask_beanqueue")


@pytest.mark.parametrize("decorate", [lambda function: function, *DECORATORS])
def test_a_factory_may_register_its_function_again_also_decorated(
    bq: BeanQueue, decorate: Decorator, caplog: pytest.LogCaptureFixture
) -> None:
    def create_app(number: int) -> Any:
        @bq.processor()
        @decorate
        def build(note: str = "") -> int:
            return number

        return build

    first, second = create_app(1), create_app(2)
    assert (first(), second()) == (1, 2)
    assert bq.registry.get(__name__, "build") is second
    assert not caplog.records  # of the level WARNING


def test_a_factory_may_give_its_function_another_one_to_call(bq: BeanQueue) -> None:
    def create_app(when_done: Callable[[], int]) -> Any:
        @bq.processor()
        def build() -> int:
            return when_done()

        return build

    assert create_app(lambda: 1)() == 1
    assert create_app(lambda: 2)() == 2


def test_that_a_function_came_again_is_said_to_those_who_listen_closely(
    bq: BeanQueue, caplog: pytest.LogCaptureFixture
) -> None:
    def create_app() -> None:
        @bq.processor()
        def build() -> None:
            pass

    caplog.set_level(logging.INFO)
    create_app()
    assert caplog.messages == []
    create_app()
    [message] = caplog.messages
    assert re.match(rf"{__name__}\.build, from ({__file__}:\d+), replaces that from \1$", message)


def test_functions_of_two_factories_are_two(bq: BeanQueue) -> None:
    def create_shop() -> None:
        @bq.processor()
        def build() -> str:
            return "shop"

    def create_bank() -> None:
        @bq.processor()
        def build() -> str:
            return "bank"

    create_shop()
    with pytest.raises(ValueError, match="two processors called"):
        create_bank()


class Repeating(Updating):
    def __call__(self, **kwargs: Any) -> Any:
        return [self.function(**kwargs) for _ in range(2)]


@pytest.mark.parametrize("decorate", [wrapping, renaming, Repeating, lambda each: each])
def test_one_function_under_two_decorators_is_two(bq: BeanQueue, decorate: Decorator) -> None:
    def build() -> None:
        pass

    bq.processor()(Updating(build))
    with pytest.raises(ValueError, match="two processors called"):
        bq.processor()(decorate(build))


def test_a_class_is_told_from_another_by_what_it_holds(bq: BeanQueue) -> None:
    def create_app() -> None:
        class Build:
            def __init__(self, width: int) -> None:
                self.width = width

        bq.processor()(Build)

    create_app()
    create_app()

    class Build:
        def __init__(self, height: int) -> None:
            self.height = height

    with pytest.raises(ValueError, match="two processors called"):
        bq.processor()(Build)


def test_two_lambdas_of_one_name_are_refused(bq: BeanQueue) -> None:
    for function in (lambda: 1, lambda: 2):
        function.__name__ = "build"
        if bq.registry.get(__name__, "build") is None:
            bq.processor()(function)
        else:
            with pytest.raises(ValueError, match="two processors called"):
                bq.processor()(function)


# Modules that run again.


@pytest.fixture
def folder(bq: BeanQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported, and have the queue from a module ``shop_queue``."""
    queue: Any = types.ModuleType("shop_queue")
    queue.bq, queue.decorate = bq, wrapping
    monkeypatch.setitem(sys.modules, "shop_queue", queue)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("shop_tasks", None)


BEGIN = "from shop_queue import bq, decorate\n"
BUILD = "@bq.processor()\n@decorate\ndef build():\n    return {!r}\n"


def build(bq: BeanQueue, module: str = "shop_tasks") -> Any:
    processor = bq.registry.get(module, "build")
    assert processor is not None
    return processor()


def test_a_module_with_two_functions_of_one_name_is_refused(bq: BeanQueue, folder: Path) -> None:
    (folder / "shop_tasks.py").write_text(BEGIN + BUILD.format(1) + BUILD.format(2))
    with pytest.raises(ValueError, match=r"shop_tasks\.build, .*shop_tasks\.py:2 and .*\.py:6"):
        importlib.import_module("shop_tasks")


@pytest.mark.parametrize("edit", ["", "\n\n# Moved.\n"], ids=["the same again", "on other lines"])
def test_a_module_may_be_loaded_again(
    bq: BeanQueue, folder: Path, edit: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "shop_tasks.py"
    path.write_text(BEGIN + BUILD.format(1))
    module = importlib.import_module("shop_tasks")
    path.write_text(BEGIN + edit + BUILD.format(1))
    importlib.reload(module)
    assert build(bq) == 1
    assert len(caplog.messages) == bool(edit)


def test_a_module_that_was_edited_says_what_is_replaced(
    bq: BeanQueue, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "shop_tasks.py"
    path.write_text(BEGIN + BUILD.format(1))
    module = importlib.import_module("shop_tasks")
    path.write_text(BEGIN + "\n" + BUILD.format(2))
    importlib.reload(module)
    assert build(bq) == 2
    [message] = caplog.messages
    assert message == f"shop_tasks.build, from {path}:3, replaces that from {path}:2"
    path.write_text(BEGIN + BUILD.format(3) + BUILD.format(4))
    with pytest.raises(ValueError, match="two processors called"):
        importlib.reload(module)


def test_a_module_may_be_imported_anew(bq: BeanQueue, folder: Path) -> None:
    path = folder / "shop_tasks.py"
    for number in (1, 2):
        sys.modules.pop("shop_tasks", None)
        path.write_text(BEGIN + "\n" * number + BUILD.format(number))
        importlib.import_module("shop_tasks")
        assert build(bq) == number


@pytest.mark.parametrize("second", [1, 2], ids=["the same", "another"])
def test_two_modules_of_one_name_are_refused(bq: BeanQueue, folder: Path, second: int) -> None:
    for name, number in (("a.py", 1), ("b.py", second)):
        (folder / name).write_text(BEGIN + BUILD.format(number))
    runpy.run_path(str(folder / "a.py"), run_name="shop_tasks")
    with pytest.raises(ValueError, match=r"shop_tasks\.build, .*a\.py:2 and .*b\.py:2"):
        runpy.run_path(str(folder / "b.py"), run_name="shop_tasks")


def test_also_a_lambda_that_was_edited_is_replaced(bq: BeanQueue, folder: Path) -> None:
    path = folder / "shop_tasks.py"
    source = BEGIN + "import functools\nbuild = functools.cache(lambda: {})\n"
    source += "build.__name__ = 'build'\nbq.processor()(build)\n"
    path.write_text(source.format(1))
    module = importlib.import_module("shop_tasks")
    path.write_text(source.format(23))
    importlib.reload(module)
    assert build(bq) == 23


# Interactive sessions.


def enter(source: str, session: dict[str, Any], name: str) -> None:
    exec(compile(source, name, "exec"), session)


@pytest.fixture
def session(folder: Path) -> dict[str, Any]:
    session: dict[str, Any] = {"__name__": "__main__"}
    enter(BEGIN, session, "<cell 1>")
    return session


def test_a_cell_may_be_run_again_and_says_what_it_replaces(
    bq: BeanQueue, session: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    enter(BUILD.format(1), session, "<cell 2>")
    enter(BUILD.format(1), session, "<cell 2>")
    assert caplog.messages == []
    enter(BUILD.format(2), session, "<cell 3>")
    assert caplog.messages == ["__main__.build, from <cell 3>:1, replaces that from <cell 2>:1"]
    assert build(bq, "__main__") == 2


def test_two_functions_of_one_name_in_a_cell_are_refused(session: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two processors called"):
        enter(BUILD.format(1) + BUILD.format(2), session, "<cell 2>")


def test_a_prompt_takes_a_function_again(bq: BeanQueue, session: dict[str, Any]) -> None:
    """Each statement is one of its own."""
    for number in (1, 2):
        enter(BUILD.format(number), session, "<stdin>")
    assert build(bq, "__main__") == 2
